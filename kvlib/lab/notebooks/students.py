"""Copies of the lessons to work in."""

from pathlib import Path

from kvlib.lab.notebooks.files import all_notebooks, code_cells, read, to_text
from kvlib.paths import ROOT


def copies(root: Path = ROOT) -> None:
    """Write each lesson to student/, without outputs, which would answer what is to be predicted.

    A copy that is there is left alone: somebody may have worked in it.
    """
    folder = root / "student"
    folder.mkdir(exist_ok=True)
    for path in all_notebooks(root):
        copy = folder / path.name
        if copy.exists():
            print(f"student/{path.name} is there already: delete it for a new one")
            continue
        notebook = read(path)
        notebook["metadata"].pop("kvlib", None)
        for cell in code_cells(notebook):
            cell |= {"outputs": [], "execution_count": None}
        copy.write_text(to_text(notebook))
        print(f"student/{path.name} is written")
