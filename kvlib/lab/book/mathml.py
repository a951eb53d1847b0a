"""A Sphinx extension: formulas become MathML while the book is built, so that no page needs a script for them."""

import re
from html import escape

from docutils import nodes
from math_core import LatexToMathML

CONVERTER = LatexToMathML(fancy_error=False)
PRIMED = re.compile(r"<msup>(<mi>\w</mi>)<mo>(′+)</mo></msup>")


def mathml(latex: str, display: bool) -> str:
    """The formula as MathML. Primes, which fonts raise by themselves, stand on the line, or they would be tiny.

    Raises:
        ValueError: for what cannot be converted.
    """
    try:
        made = CONVERTER.convert_with_local_state(latex.strip(), displaystyle=display)
    except Exception as error:
        raise ValueError(f"{error}: {latex}") from error
    return PRIMED.sub(r'<mrow>\1<mo lspace="0" rspace="0">\2</mo></mrow>', made)


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
