"""Notebooks as files: found, read, written in the form that is committed.

A lesson, notebooks/NN_name.ipynb, has stubs (cells `x-stub`); their solutions (cells `x-solution`) stand apart, in
notebooks/solutions/NN_name.ipynb, and are put behind the stubs when the lesson is run. Checks of stubs have Jupyter's
tag `raises-exception`: in JupyterLab "run all" passes over one that fails, papermill ends with its error.

Without nbformat, whose jsonschema takes a second to import: make starts the tool once per notebook.
"""

import ast
import copy
import json
import re
from pathlib import Path

from kvlib.paths import ROOT

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_METADATA = ("tags", "mystnb")  # mystnb holds captions and alternative texts of figures


def all_notebooks(root: Path = ROOT) -> list[Path]:
    """The notebooks in reading order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]*_*.ipynb"))


def root_of(path: Path) -> Path:
    return path.resolve().parents[1]


def each_text(notebook: dict, change) -> dict:
    """A copy in which `change` was applied to every text that notebook files may store as a list of lines."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        cell["source"] = change(cell["source"])
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = change(output["text"])
            data = output.get("data", {})
            data |= {kind: change(value) for kind, value in data.items() if not kind.endswith("json")}
    return notebook


def read(path: Path) -> dict:
    return each_text(json.loads(path.read_text()), "".join)


def files_of(path: Path) -> list[Path]:
    """The lesson, and its solutions if it has any."""
    return [file for file in (path, path.parent / "solutions" / path.name) if file.exists()]


def lesson(path: Path) -> dict:
    """The notebook that is run: each stub followed by its solution.

    Raises:
        ValueError: for a solution without a stub.
    """
    notebook, *solutions = (read(file) for file in files_of(path))
    found = {cell["id"]: cell for file in solutions for cell in code_cells(file)}
    cells = []
    for cell in notebook["cells"]:
        cells.append(cell)
        solution = f"{cell['id'].removesuffix('-stub')}-solution"
        if cell["id"].endswith("-stub") and solution in found:
            cells.append(found.pop(solution))
    if found:
        raise ValueError(f"{path.name}: there is no stub for {', '.join(found)}")
    return notebook | {"cells": cells}


def to_text(notebook: dict) -> str:
    """The file that nbformat would write."""
    lines = each_text(notebook, lambda text: text.splitlines(keepends=True))
    return json.dumps(lines, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def normalise(notebook: dict) -> dict:
    """A copy in the form that is committed: nothing tells when, where or how often it was run."""
    notebook = copy.deepcopy(notebook)
    own = notebook["metadata"].get("kvlib", {})
    notebook["metadata"] = {"kernelspec": KERNEL, "kvlib": own, "language_info": {"name": "python"}}
    count = 0
    for cell in notebook["cells"]:
        cell["metadata"] = {name: cell["metadata"][name] for name in CELL_METADATA if cell["metadata"].get(name)}
        if cell["cell_type"] != "code":
            continue
        if cell["execution_count"] is not None:
            count += 1
            cell["execution_count"] = count
        merged = []  # a stream comes in pieces that depend on timing
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count
            if output["output_type"] == "stream" and merged and merged[-1].get("name") == output["name"]:
                merged[-1]["text"] += output["text"]
            else:
                merged.append(output)
        cell["outputs"] = merged
    return notebook


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def parse(cell: dict) -> ast.Module:
    """The syntax tree of a code cell, without lines of IPython magic."""
    return ast.parse(re.sub(r"(?m)^\s*[%!?].*$", "", cell["source"]))
