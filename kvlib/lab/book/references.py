"""What the lessons cite, each work once, with the lessons that cite it."""

import re
from pathlib import Path

from kvlib.lab.notebooks.files import all_notebooks, read

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def cited(path: Path) -> list[str]:
    """The numbered entries under a lesson's References."""
    prose = "\n\n".join(cell["source"] for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    _, _, listed = prose.partition("## References")
    return [" ".join(entry.split()) for entry in re.findall(r"(?m)^\d+\. (.+(?:\n {2,}.+)*)", listed)]


def page(root: Path) -> str:
    """A list in the order of authors; entries of the same arXiv number are one, the first lesson's words stand."""
    found, where = {}, {}
    for path in all_notebooks(root):
        for entry in cited(path):
            number = ARXIV.search(entry)
            key = number[1] if number else entry
            found.setdefault(key, entry)
            where.setdefault(key, []).append(f"[{path.stem.partition('_')[0]}](notebooks/{path.name})")
    entries = sorted(found, key=lambda key: found[key].lower())
    linked = {key: ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", found[key]) for key in entries}
    return "".join(f"- {linked[key]} Cited in {', '.join(dict.fromkeys(where[key]))}.\n" for key in entries)
