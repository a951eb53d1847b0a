"""What code reaches by name in kvlib, read from the files: nothing is imported, so that it takes no time.

A definition is a function, class or constant of a module, written `module:name`. `names` are followed through imports,
also those of a package's `__init__`, to the definitions behind them, and so on (`closure`). Classes come with their
bases and methods. Left out are

- what is reached through objects alone (`view.protect`) or through the package itself (`kvlib.snapshot`), and the
  classes of `kvlib.core` (`Method`): they are the library under everything;
- annotations and decorators, which compute nothing.

What counts of a definition is its own name and its syntax tree, neither comments, docstrings and layout nor the module
that it stands in: `digest` stays the same when a definition moves to another file.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvlib.paths import ROOT

CORE = "kvlib.core"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def skeleton(node):
    """A syntax tree as nested lists: no docstrings, no positions, nothing that differs between Python versions."""
    if isinstance(node, list):
        return [skeleton(item) for item in node]
    if not isinstance(node, ast.AST):
        return ascii(node)  # tells 1, 1.0, True and "1" apart
    fields = {name: getattr(node, name) for name in node._fields if name not in ("ctx", "kind", "type_comment")}
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    # Empty fields say nothing, and newer versions add some, such as type_params.
    return [
        type(node).__name__,
        *([name, skeleton(value)] for name, value in fields.items() if value not in (None, [])),
    ]


@dataclass(frozen=True)
class Module:
    """What its names stand for: name -> the statements that define it, or the dotted name that was imported."""

    defined: dict[str, list[ast.stmt]]
    imported: dict[str, str]


@cache
def read(text: str, package: str = "") -> Module:
    """The module with this text in `package`; of cells of a notebook too."""
    defined, imported, tree = {}, {}, ast.parse(text)
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]:
            for one in getattr(target, "elts", [target]):
                if name := getattr(one, "name", None) or getattr(one, "id", None):
                    defined.setdefault(name, []).append(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            imported |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
    return Module(defined, imported)


def file_of(module: str, root: Path = ROOT) -> Path | None:
    """The file of a kvlib module, or None if `module` is anything else."""
    base = root.joinpath(*module.split("."))
    files = [base.with_suffix(".py"), base / "__init__.py"] if module.split(".")[0] == "kvlib" else []
    return next((file for file in files if file.is_file()), None)


def load(module: str, root: Path = ROOT) -> Module | None:
    """A module of kvlib, or None if `module` is anything else."""
    file = file_of(module, root)
    return file and read(file.read_text(), module if file.name == "__init__.py" else module.rpartition(".")[0])


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c, otherwise an empty string."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def names(node: ast.AST) -> Iterator[str]:
    """The names in a syntax tree, `a.b.c` as a whole, but for those in annotations and decorators."""
    if name := dotted(node):
        yield name
    else:
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from names(child)


@cache
def content(statement: ast.stmt) -> tuple[list, frozenset[str]]:
    """The skeleton and the names of a statement; kept, since thousands of keys reach the same ones."""
    return skeleton(statement), frozenset(names(statement))


def behind(name: str, module: Module, place: str, root: Path) -> str | None:
    """The definition behind a dotted name in a module, whose own name is `place`; None for what is not kvlib's."""
    first, _, rest = name.partition(".")
    if first in module.defined:
        return f"{place}:{first}"
    parts = f"{module.imported.get(first, first)}.{rest}".rstrip(".").split(".")
    for length in range(len(parts), 1, -1):  # the first alone would be the package, as in `kvlib.snapshot`
        inside = ".".join(parts[:length])
        if found := load(inside, root):
            return behind(".".join(parts[length:]), found, inside, root) if parts[length:] else None
    return None


def named(text: str, root: Path = ROOT) -> set[str]:
    """The definitions of kvlib that code names, outside of any module: cells of a notebook."""
    module = read(text)
    return {behind(name, module, "", root) for name in names(ast.parse(text))} - {None}


def closure(start: Iterable[str], root: Path = ROOT) -> dict[str, list]:
    """The definitions reached from `start`, themselves included: `module:name` -> skeletons of its statements."""
    found, pending = {}, set(start)
    while pending:
        definition = pending.pop()
        place, _, name = definition.partition(":")
        module = load(place, root)
        statements = module.defined.get(name.split(".")[0], []) if module else []
        core = place.startswith(CORE) and any(isinstance(node, ast.ClassDef) for node in statements)
        if definition in found or not statements or core:
            continue
        found[definition] = [content(node)[0] for node in statements]
        used = frozenset().union(*(content(node)[1] for node in statements))
        pending |= {behind(name, module, place, root) for name in used} - {None}
    return found


def files(text: str, root: Path = ROOT) -> set[Path]:
    """The files of kvlib that run when code does: those of its imports, and of theirs."""
    found, pending = set(), set(read(text).imported.values())
    while pending:
        parts = pending.pop().split(".")
        for length in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b too
            module = ".".join(parts[:length])
            file = file_of(module, root)
            if file and file not in found:
                found.add(file)
                pending |= set(load(module, root).imported.values())
    return found


def name_of(thing) -> str:
    """The name of a function or class as a definition."""
    return f"{thing.__module__}:{thing.__qualname__}"


def as_text(found: dict[str, list]) -> str:
    """What `closure` has found, without the modules it was found in."""
    return "\n".join(sorted(json.dumps([name.partition(":")[2], trees]) for name, trees in found.items()))


@cache
def digest(*start: str, root: Path = ROOT) -> str:
    """Sixteen hexadecimal digits for definitions together with all that they reach."""
    return hashlib.sha256(as_text(closure(start, root)).encode()).hexdigest()[:16]
