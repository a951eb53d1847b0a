"""Source code of kvlib that notebooks show, and whether it is still what the files say."""

import ast
import inspect
import textwrap
from pathlib import Path

from kvlib.lab import definitions
from kvlib.lab.notebooks.files import code_cells


def source(thing) -> None:
    """Show the source of a kvlib function, class or module in a notebook, with a note of its name for `check`."""
    from IPython.display import Markdown, display

    thing = inspect.unwrap(thing)
    name = f"{thing.__name__}:" if inspect.ismodule(thing) else f"{thing.__module__}:{thing.__qualname__}"
    text = textwrap.dedent(inspect.getsource(thing)).strip()
    display(Markdown(f"```python\n{text}\n```"), metadata={"kvlib": {"source": name}})


def shown(notebook: dict) -> set[str]:
    """The names, as `module:qualified.name`, of everything that `source` displayed."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return {output.get("metadata", {}).get("kvlib", {}).get("source") for output in outputs} - {None}


def current_source(root: Path, name: str) -> str:
    """The text behind a name that `source` displayed, as it is today; empty if it is gone."""
    module, _, qualified = name.partition(":")
    file = definitions.file_of(module, root)
    text = file.read_text() if file else ""
    node = ast.parse(text)
    if not qualified:
        return text
    for part in qualified.split("."):
        node = next((child for child in getattr(node, "body", []) if getattr(child, "name", None) == part), None)
    if node is None:
        return ""
    first = min(part.lineno for part in (node, *node.decorator_list))
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
