"""Run the notebooks, store their outputs, and tell whether stored outputs are still true.

    python -m kvlib.lab.notebooks dependencies PROFILE    what executed notebooks depend on, as makefile rules
    python -m kvlib.lab.notebooks run PROFILE NOTEBOOK    execute into build/PROFILE, figures included
    python -m kvlib.lab.notebooks publish                 store the outputs of build/default in notebooks/
    python -m kvlib.lab.notebooks check                   fail if stored outputs are stale, missing or wrong
    python -m kvlib.lab.notebooks compare MANIFEST        fail if figures drawn from tables differ from these

A notebook is a path <root>/notebooks/NN_name.ipynb; its parameters are in <root>/notebooks/params/PROFILE.yaml under
NN_name, its result tables those of <root>/data/results that its code names. Its metadata list the modules it is about,
as in {"kvlib": {"modules": ["kvlib.core.attention", "kvlib.core.cache"]}}; its outputs are stale once these modules do something
else.
"""

import argparse
import ast
import base64
import copy
import hashlib
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import yaml

# Not kvlib.paths, and json instead of nbformat: torch and jsonschema take seconds to import, and make starts this file,
# as a script, once per notebook.
ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_METADATA = ("tags", "mystnb")  # mystnb holds captions and alternative texts of figures
MAX_FOLDER_BYTES = 6 * 2**20
MAX_IMAGE_WIDTH = 1000  # pixels: ten inches at 100 dpi
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|var|mnt|opt|srv|usr)/\w|" + re.escape(str(ROOT)))
MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
TERMINAL_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def all_notebooks(root: Path = ROOT) -> list[Path]:
    """The notebooks in reading order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


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


def to_text(notebook: dict) -> str:
    """The file that nbformat would write."""
    lines = each_text(notebook, lambda text: text.splitlines(keepends=True))
    return json.dumps(lines, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def parse(cell: dict) -> ast.Module:
    """The syntax tree of a code cell, without lines of IPython magic."""
    return ast.parse(re.sub(r"(?m)^\s*[%!?].*$", "", cell["source"]))


# Parameters


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


def write_parameters(path: Path, profile: str) -> Path:
    """The notebook's own parameter file, rewritten only when its content changes: make looks at its date."""
    file = root_of(path) / "build" / profile / f"{path.stem}.parameters.yaml"
    text = yaml.safe_dump(parameters(path, profile))
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


# Dependencies


def module_file(root: Path, module: str) -> Path | None:
    """The file of a kvlib module, or None if `module` is anything else."""
    base = root.joinpath(*module.split("."))
    files = [base.with_suffix(".py"), base / "__init__.py"] if module.split(".")[0] == "kvlib" else []
    return next((file for file in files if file.is_file()), None)


def dotted(node: ast.expr) -> str:
    """`a.b.c` for the expression a.b.c, otherwise an empty string."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def mentioned(tree: ast.Module, package: str = "") -> set[str]:
    """Dotted names that the code of a module in `package` imports, wherever it does so, or spells out."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(dotted(node))
    return names


def dependencies(path: Path) -> list[Path]:
    """The files of the kvlib modules that the notebook imports, directly or through other kvlib modules."""
    root, found = root_of(path), set()
    pending = set().union(*(mentioned(parse(cell)) for cell in code_cells(read(path))))
    while pending:
        parts = pending.pop().split(".")
        for length in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b too
            module = ".".join(parts[:length])
            file = module_file(root, module)
            if file and file not in found:
                found.add(file)
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                pending |= mentioned(ast.parse(file.read_text()), package)
    return sorted(found)


def tables(path: Path) -> list[Path]:
    """The result tables that the code of a notebook names."""
    code = "\n".join(cell["source"] for cell in code_cells(read(path)))
    return sorted(file for file in (root_of(path) / "data" / "results").glob("*.parquet") if file.name in code)


def makefile(root: Path, profile: str) -> str:
    """One rule per notebook, and an empty rule per file so that a deleted file means a rerun and not an error."""
    rules, files = [], set()
    for path in all_notebooks(root):
        needed = [write_parameters(path, profile), *tables(path), *dependencies(path)]
        names = [str(file.relative_to(root)) for file in needed]
        rules.append(f"build/{profile}/{path.name}: {' '.join(names)}")
        files |= set(names)
    return "\n".join([*rules, *(f"{name}:" for name in sorted(files))]) + "\n"


# Running


def run(path: Path, profile: str) -> None:
    """Execute one notebook into build/<profile>; the result takes its final name only if no cell failed."""
    root, stem = root_of(path), path.stem
    build = root / "build" / profile
    values = write_parameters(path, profile)
    part, broken, log = (build / f"{stem}.{kind}" for kind in ("part.ipynb", "failed.ipynb", "log"))
    environment = os.environ | {
        "KVLIB_FIGURES": str(root / "figures" if profile == "default" else build / "figures"),
        "PYTHONPATH": str(root),  # this checkout's kvlib, even if .venv was copied from another one
        "IPYTHONDIR": str(root / "build" / "ipython"),  # no personal start-up files
        "PYTHONWARNINGS": "ignore:IProgress not found",  # from tqdm, on the import of transformers in a notebook
        "OMP_NUM_THREADS": "1",  # sums, and so figures, depend on the number of threads; two would fight with tests
        "TQDM_DISABLE": "1",
    }
    environment.pop("MPLBACKEND", None)  # agg would remove every inline figure
    if profile != "paper":
        environment.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "papermill", path, part, "-f", values, "--cwd", path.parent]
    command += ["--kernel", "python3", "--log-output", "--no-progress-bar", "--no-request-save-on-cell-execute"]

    print(f"{stem}: running ({profile} profile)", flush=True)
    broken.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as stream:
        failed = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    seconds = f"{time.monotonic() - start:.0f} s"
    if failed:
        if part.exists():
            part.replace(broken)
        tail = TERMINAL_COLOR.sub("", log.read_text()).splitlines()[-25:]
        files = [str(file.relative_to(root)) for file in (broken, log) if file.exists()]
        raise ValueError("\n".join([*tail, f"{stem}: failed after {seconds}; read on in {' and '.join(files)}"]))
    part.replace(build / path.name)
    print(f"{stem}: done in {seconds}", flush=True)


# What stored outputs follow from


def skeleton(node):
    """A syntax tree as nested lists: no docstrings, no positions, nothing that differs between Python versions."""
    if isinstance(node, list):
        return [skeleton(item) for item in node]
    if not isinstance(node, ast.AST):
        return ascii(node)  # tells 1, 1.0, True and "1" apart
    fields = {name: getattr(node, name) for name in node._fields if name not in ("ctx", "kind", "type_comment")}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    # Empty fields say nothing, and newer versions add some, such as type_params.
    return [
        type(node).__name__,
        *([name, skeleton(value)] for name, value in fields.items() if value not in (None, [])),
    ]


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
    file = module_file(root, module)
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


def fingerprint(path: Path, notebook: dict) -> str:
    """sha256 over everything that the outputs of `notebook` follow from."""
    root, modules = root_of(path), {}
    for module in notebook["metadata"].get("kvlib", {}).get("modules", []):
        file = module_file(root, module)
        if file is None:
            raise ValueError(f"{path.name}: its metadata list {module!r}, which is not a module of kvlib")
        modules[module] = skeleton(ast.parse(file.read_text()))
    parts = {
        "cells": [cell["source"] for cell in code_cells(notebook)],
        "parameters": parameters(path, "default"),
        "tables": {table.name: hashlib.sha256(table.read_bytes()).hexdigest() for table in tables(path)},
        "modules": modules,
        "sources": {name: current_source(root, name) for name in shown(notebook)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Stored outputs


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
        notebook, ran = read(path), {cell["id"]: cell for cell in read(executed)["cells"]}
        for cell in code_cells(notebook):  # taking outputs only leaves out the cell of injected parameters
            if cell["source"] != ran.get(cell["id"], {}).get("source"):
                raise ValueError(f"{path.name}: cell {cell['id']} has changed since it was run: make figures")
            cell |= {name: ran[cell["id"]][name] for name in ("outputs", "execution_count")}
        notebook["metadata"].setdefault("kvlib", {})["hash"] = fingerprint(path, notebook)
        published[path], found[path.name] = to_text(normalise(notebook)), problems(notebook)
    fail_if(found)
    for path, text in published.items():
        changed = text != path.read_text()
        if changed:
            path.write_text(text)
            os.utime(root / "build" / "default" / path.name)  # new outputs are no reason to run it again
        print(f"{path.name}: {'stored' if changed else 'as before'}")


def check(root: Path = ROOT) -> None:
    """Raise unless every notebook holds complete outputs that still follow from code, parameters and tables."""
    found = {}
    for path in all_notebooks(root):
        notebook = read(path)
        wrong = found[path.name] = problems(notebook)
        if notebook["metadata"].get("kvlib", {}).get("hash") != fingerprint(path, notebook):
            wrong.append("its outputs are stale, something they follow from has changed: make publish")
        if to_text(normalise(notebook)) != path.read_text():
            wrong.append("it is not in normal form: make publish")
    count = len(found)
    files = [file for file in (root / "notebooks").rglob("*") if ".ipynb_checkpoints" not in file.parts]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > MAX_FOLDER_BYTES:
        found["notebooks"] = [f"{size} bytes, more than {MAX_FOLDER_BYTES}"]
    fail_if(found)
    print(f"{count} notebooks hold fresh outputs")


def compare(before: Path, after: Path = ROOT / "figures" / "manifest.json") -> None:
    """Raise if a figure drawn from tables is another one, or missing, in one of two manifests."""
    old, new = (
        {name: entry["sha256"] for name, entry in json.loads(path.read_text()).items() if not entry["live"]}
        for path in (before, after)
    )
    if changed := sorted(name for name in old | new if old.get(name) != new.get(name)):
        raise ValueError(
            f"Figures drawn from tables have changed: {', '.join(changed)}. Look at them, then commit them. If no "
            "number in them has moved, the cause is another version of matplotlib or another type of machine."
        )
    print(f"{len(new)} figures drawn from tables are unchanged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("dependencies", "run"):
        commands.add_parser(command).add_argument("profile", choices=("smoke", "default", "paper"))
    commands.choices["run"].add_argument("notebook", type=Path)
    commands.add_parser("publish")
    commands.add_parser("check")
    commands.add_parser("compare").add_argument("manifest", type=Path)
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "dependencies":
                print(makefile(ROOT, arguments.profile), end="")
            case "run":
                run(arguments.notebook, arguments.profile)
            case "publish":
                publish()
            case "check":
                check()
            case "compare":
                compare(arguments.manifest)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
