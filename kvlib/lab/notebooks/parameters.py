"""The parameters of a notebook: its own defaults, and what a profile sets instead."""

import ast
import csv
import os
from pathlib import Path

import yaml

from kvlib.lab.notebooks.files import all_notebooks, code_cells, parse, read, root_of
from kvlib.paths import MODELS

WRITTEN_FOR = "smollm2"


def defaults(notebook: dict) -> dict:
    """The literals assigned in the cell tagged `parameters`."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    assignments = [line for cell in cells for line in parse(cell).body if isinstance(line, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in assignments}


def parameters(path: Path, profile: str) -> dict:
    """What the profile sets for this notebook, checked against the notebook's own defaults.

    Papermill only warns about unknown names, and YAML reads 1e-3 as a string: either way the notebook would run with
    other values than those written down.
    """
    file = path.parent / "params" / f"{profile}.yaml"
    profiles = yaml.safe_load(file.read_text()) or {}
    if strangers := profiles.keys() - {notebook.stem for notebook in all_notebooks(root_of(path))}:
        raise ValueError(f"{file.name}: there is no notebook {', '.join(sorted(strangers))}")
    values, known = profiles.get(path.stem) or {}, defaults(read(path))
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{file.name}: {path.stem} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        default = known[name]
        if default is None or type(value) is type(default) or (type(value), type(default)) == (int, float):
            continue
        kind = type(default).__name__
        raise ValueError(f"{file.name}: {path.stem}.{name} is {value!r}, not a value of type {kind} like {default!r}")
    return values


def other_model(profile: str) -> str:
    """The model that MODEL names in place of the one that lessons are written for, or nothing."""
    name = os.environ.get("MODEL", WRITTEN_FOR)
    return "" if name == WRITTEN_FOR or profile == "smoke" else name


def trained_for(path: Path) -> str:
    """The model that a lesson keeps whatever MODEL says, because it was trained for it, or nothing."""
    name = defaults(read(path)).get("model_name")
    with (MODELS / "arms.csv").open() as file:
        return name if name in {row["arm"] for row in csv.DictReader(file)} else ""


def build_folder(root: Path, profile: str) -> Path:
    """Where executed notebooks are: what another model gives never takes the place of what is stored."""
    return root / "build" / "-".join(filter(None, [profile, Path(other_model(profile)).name]))


def write_parameters(path: Path, profile: str) -> Path:
    """The notebook's own parameter file, rewritten only when its content changes: make looks at its date."""
    file = build_folder(root_of(path), profile) / f"{path.stem}.parameters.yaml"
    values, model = parameters(path, profile), other_model(profile)
    if model and "model_name" in defaults(read(path)) and not trained_for(path):
        values = values | {"model_name": model}
    text = yaml.safe_dump(values)
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file
