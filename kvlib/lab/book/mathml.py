"""A Sphinx extension: formulas become MathML while the book is built, so that no page needs a script or a font for them."""

from html import escape

from docutils import nodes
from math_core import LatexToMathML

CONVERTER = LatexToMathML(fancy_error=False)


def mathml(latex: str, display: bool) -> str:
    """The formula as MathML.

    Raises:
        ValueError: for what cannot be converted.
    """
    try:
        made = CONVERTER.convert_with_local_state(latex.strip(), displaystyle=display)
    except Exception as error:
        raise ValueError(f"{error}: {latex}") from error
    return made


def visit_math(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), display=False))
    raise nodes.SkipNode


def visit_displaymath(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula" title="{escape(node.astext())}">')
    translator.body.append(mathml(node.astext(), display=True) + "</div>")
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
