"""What a notebook follows from beside its cells: definitions and files of kvlib, result tables.

Definitions are what its cells reach by name (`kvlib.lab.definitions`), the methods and tasks whose name stands in one
of its strings, with what they reach, and all of the core, through which everything runs.
"""

import ast
import re
from pathlib import Path

from kvlib.lab import definitions
from kvlib.lab.notebooks.files import all_notebooks, code_cells, files_of, lesson, parse, root_of
from kvlib.lab.notebooks.parameters import build_folder, write_parameters


def code(path: Path) -> str:
    """All code of a lesson and its solutions, as Python."""
    return "\n".join(ast.unparse(parse(cell)) for cell in code_cells(lesson(path)))


def modules(root: Path, folder: str) -> dict[str, Path]:
    """The files of a folder of kvlib and its subfolders, by the names of their modules."""
    return {".".join(file.relative_to(root).with_suffix("").parts): file for file in (root / folder).rglob("*.py")}


def registered(root: Path) -> dict[str, str]:
    """What is looked up by a name: methods and families of tasks, name -> definition."""
    found = {}
    for module, file in (modules(root, "kvlib/methods") | modules(root, "kvlib/lab/tasks")).items():
        for node in ast.parse(file.read_text()).body:
            for decorator in getattr(node, "decorator_list", []):
                kind = definitions.dotted(getattr(decorator, "func", None))
                if kind in ("register", "family"):
                    found[decorator.args[0].value if kind == "register" else node.name] = f"{module}:{node.name}"
    return found


def reached(path: Path) -> dict[str, list]:
    """The definitions that a notebook follows from, and the modules of the core: `module:name` -> syntax trees."""
    root, text = root_of(path), code(path)
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    words = set(re.findall(r"\w+", " ".join(value for value in constants if isinstance(value, str))))
    by_name = {definition for name, definition in registered(root).items() if name in words}
    core = {f"{module}:": file.read_text() for module, file in modules(root, "kvlib/core").items()}
    found = definitions.closure(definitions.named(text, root) | by_name, root)
    return found | {module: definitions.skeleton(ast.parse(text)) for module, text in core.items()}


def files(path: Path) -> list[Path]:
    """The files of kvlib with what a notebook reaches, and those that its imports run."""
    root = root_of(path)
    holding = {definitions.file_of(name.partition(":")[0], root) for name in reached(path)}
    return sorted(holding | definitions.files(code(path), root))


def tables(path: Path) -> list[Path]:
    """The result tables, those of times among them, that a notebook names, or what it reaches in `kvlib.lab.lessons`.

    They are named as files, or by themselves in a text of their own.
    """
    helpers = [trees for name, trees in reached(path).items() if name.startswith("kvlib.lab.lessons.")]
    text = code(path) + str(helpers)
    results = root_of(path) / "data" / "results"
    there = (file for pattern in ("*.parquet", "*_speed.csv") for file in results.glob(pattern))
    return sorted(file for file in there if file.name in text or f"'{file.stem}'" in text)


def makefile(root: Path, profile: str) -> str:
    """One rule per notebook, and an empty rule per file so that a deleted file means a rerun and not an error."""
    rules, everything = [], set()
    for path in all_notebooks(root):
        needed = [write_parameters(path, profile), *files_of(path)[1:], *tables(path), *files(path)]
        names = [str(file.relative_to(root)) for file in needed]
        target = (build_folder(root, profile) / path.name).relative_to(root)
        rules.append(f"{target}: {' '.join(names)}")
        everything |= set(names)
    return "\n".join([*rules, *(f"{name}:" for name in sorted(everything))]) + "\n"
