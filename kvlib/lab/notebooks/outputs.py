"""Stored outputs: which may be stored, what they follow from, and whether they still do."""

import base64
import hashlib
import json
import os
import re
import struct
from pathlib import Path

from kvlib.lab import definitions
from kvlib.lab.notebooks.dependencies import reached, tables
from kvlib.lab.notebooks.files import all_notebooks, code_cells, files_of, lesson, normalise, read, root_of, to_text
from kvlib.lab.notebooks.parameters import parameters
from kvlib.lab.notebooks.sources import current_source, shown
from kvlib.paths import ROOT

MAX_BYTES = 2**20  # of a lesson: what opens at once, and what GitHub shows
MAX_IMAGE_WIDTH = 1000  # pixels: ten inches at 100 dpi
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|var|mnt|opt|srv|usr)/\w|" + re.escape(str(ROOT)))
MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def basis(path: Path, notebook: dict) -> str:
    """sha256 over everything that the outputs of `notebook`, a lesson with its solutions, follow from."""
    root = root_of(path)
    parts = {
        "cells": [cell["source"] for cell in code_cells(notebook)],
        "parameters": parameters(path, "default"),
        "tables": {table.name: hashlib.sha256(table.read_bytes()).hexdigest() for table in tables(path)},
        "definitions": definitions.as_text(reached(path)),
        "sources": {name.partition(":")[2]: current_source(root, name) for name in shown(notebook)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def problems(notebook: dict) -> list[str]:
    """What keeps outputs from being stored: errors, noise, and whatever would differ on another machine."""
    found = []
    for cell in code_cells(notebook):
        name = f"cell {cell['id']}"
        if cell["source"].strip() and cell["execution_count"] is None:
            found.append(f"{name} was never run")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = output.get("text", "") + "\n".join(str(data[kind]) for kind in data if kind != "image/png")
            if output["output_type"] == "error":
                found.append(f"{name} fails with {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"{name} writes to stderr: {text.strip()[:200]}")
            elif match := MACHINE_PATH.search(text) or MEMORY_ADDRESS.search(text):
                found.append(f"{name} shows {text[match.start() :][:60]!r}, which another machine would not")
            elif "image/png" in data:
                width = struct.unpack(">I", base64.b64decode(data["image/png"])[16:20])[0]  # from the PNG header
                if width > MAX_IMAGE_WIDTH:
                    found.append(f"{name} shows an image of {width} pixels, more than {MAX_IMAGE_WIDTH}")
    return found


def fail_if(found: dict[str, list[str]]) -> None:
    """Raise one error that lists all problems of all files."""
    lines = [f"{name}: {problem}" for name, problems_ in found.items() for problem in problems_]
    if lines:
        raise ValueError("\n".join(lines))


def publish(root: Path = ROOT) -> None:
    """Store the outputs of the executed default profile in notebooks/, or nothing if anything is wrong."""
    published, found = {}, {}
    for path in all_notebooks(root):
        executed = root / "build" / "default" / path.name
        if not executed.exists():
            raise ValueError(f"{path.name} has not been run: make figures")
        ran = {cell["id"]: cell for cell in read(executed)["cells"]}
        parts = {file: read(file) for file in files_of(path)}
        whole = lesson(path)
        for cell in [cell for notebook in (whole, *parts.values()) for cell in code_cells(notebook)]:
            # taking outputs only leaves out the cell of injected parameters
            if cell["source"] != ran.get(cell["id"], {}).get("source"):
                raise ValueError(f"{path.name}: cell {cell['id']} has changed since it was run: make figures")
            cell |= {name: ran[cell["id"]][name] for name in ("outputs", "execution_count")}
        parts[path]["metadata"].setdefault("kvlib", {})["hash"] = basis(path, whole)
        published |= {file: to_text(normalise(notebook)) for file, notebook in parts.items()}
        found[path.name] = problems(whole)
    fail_if(found)
    for path, text in published.items():
        changed = text != path.read_text()
        if changed:
            path.write_text(text)
            os.utime(root / "build" / "default" / path.name)  # new outputs are no reason to run it again
        print(f"{path.relative_to(root)}: {'stored' if changed else 'as before'}")


def check(root: Path = ROOT) -> None:
    """Raise unless every notebook holds complete outputs that still follow from code, parameters and tables."""
    found = {}
    for path in all_notebooks(root):
        notebook = lesson(path)
        wrong = found[path.name] = problems(notebook)
        if notebook["metadata"].get("kvlib", {}).get("hash") != basis(path, notebook):
            wrong.append("its outputs are stale, something they follow from has changed: make publish")
        for file in files_of(path):
            if to_text(normalise(read(file))) != file.read_text():
                wrong.append(f"{file.relative_to(root)} is not in normal form: make publish")
            if (size := file.stat().st_size) > MAX_BYTES:
                wrong.append(f"{file.relative_to(root)} has {size} bytes, more than {MAX_BYTES}")
    fail_if(found)
    print(f"{len(found)} notebooks hold fresh outputs")
