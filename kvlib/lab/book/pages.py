"""Which files the book is made of, and writing them to a folder for Sphinx.

The folder mirrors the repository (notebooks/, figures/, data/ ...), so that relative links of lessons lead where they
lead on a code host.
"""

import re
import shutil
from pathlib import Path

from kvlib.lab.book import course, glossary, lessons, methods, references, verdicts
from kvlib.lab.notebooks.files import all_notebooks

LINK = re.compile(r"\]\(((?:\.\./|params/|figures/)[^)#\s]+)\)")

AS_THEY_ARE = ("data/VERDICTS.md", "kvlib/methods/README.md", "kvlib/methods/systems/README.md")


def pages(root: Path) -> dict[str, bytes]:
    """Path in the book's source -> content. The same repository gives the same bytes."""
    found = {path.name: path.read_text() for path in sorted((root / "docs").glob("*.md"))}
    found |= {f"notebooks/{path.name}": lessons.copy(path) for path in all_notebooks(root)}
    for path in sorted((root / "notebooks" / "solutions").glob("*.ipynb")):
        found[f"notebooks/solutions/{path.name}"] = path.read_text()
    found["notebooks/README.md"] = lessons.overview(root)
    found |= {name: (root / name).read_text() for name in AS_THEY_ARE}
    found |= methods.pages(root)
    found["generated/glossary.md"] = glossary.page(root)
    found["generated/verdicts.md"] = verdicts.page(root)
    found["generated/references.md"] = references.page(root)
    found |= {f"generated/{name}.md": text for name, text in course.parts(root).items()}
    content = {name: text.encode() for name, text in found.items()}
    return content | linked(root, found)


def linked(root: Path, texts: dict[str, str]) -> dict[str, bytes]:
    """The files of the repository that pages link to or show, and that are not pages themselves."""
    found = {}
    for name, text in texts.items():
        folder = Path() if name.startswith("generated/") else Path(name).parent  # parts stand where they are included
        for target in LINK.findall(text):
            path = (root / folder / target).resolve()
            if path.suffix not in (".md", ".ipynb") and path.is_file():
                found[path.relative_to(root.resolve()).as_posix()] = path.read_bytes()
    return found


def lay(folder: Path, content: dict[str, bytes]) -> None:
    """Make `folder` hold these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
