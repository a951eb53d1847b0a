"""Whole lines of held-out code that a model can be asked for: the next of a file, the first that uses another file.

They are found by Python's own parser, so that imports lead where they lead and strings are no code.
"""

import ast
import keyword
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import PurePosixPath

from kvlib.lab.evaluation.metrics import PASSED_OVER
from kvlib.lab.tasks.code import heldout_files

SHORTEST_LINE = 10  # characters, indentation not counted
QUOTED = re.compile(r"""(?:\b[bfru]{1,2})?(?:'[^']*'|"[^"]*")""", re.IGNORECASE)
IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*")


@dataclass(frozen=True)
class Line:
    """A line to be predicted.

    file: number of its file. at: offset of its first character there. source, defined: the same for the line that
    defines the name which it uses, if that is imported.
    """

    file: int
    at: int
    source: int = -1
    defined: int = -1


@lru_cache
def parsed(file: int) -> ast.Module:
    return ast.parse(heldout_files()[file]["text"])


@lru_cache
def line_starts(file: int) -> list[int]:
    """Offset of every line of a file."""
    return list(accumulate((len(line) + 1 for line in heldout_files()[file]["text"].split("\n")), initial=0))


@lru_cache
def code_lines(file: int) -> dict[int, str]:
    """Offset -> line, for all lines but the first that are worth predicting.

    They have an identifier and at least ten characters; imports, comments, lines that LongBench's metric passes over,
    docstrings and all lines of strings that span several are left out.
    """
    prose = {number for node in strings(parsed(file)) for number in range(node.lineno, node.end_lineno + 1)}
    lines, begins = heldout_files()[file]["text"].split("\n"), line_starts(file)
    return {begins[i]: line for i, line in enumerate(lines) if i and i + 1 not in prose and worth_asking(line)}


def strings(node: ast.AST) -> Iterator[ast.AST]:
    """Docstrings and strings that span lines; what f-strings contain has no reliable place before Python 3.12."""
    if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
        yield node
    elif isinstance(node, ast.Constant | ast.JoinedStr):
        if node.end_lineno > node.lineno:
            yield node
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def worth_asking(line: str) -> bool:
    line = line.strip()
    if len(line) < SHORTEST_LINE or line.startswith(("import ", "from ")) or any(mark in line for mark in PASSED_OVER):
        return False
    return any(not keyword.iskeyword(word) for word in IDENTIFIER.findall(QUOTED.sub("", line)))


@lru_cache
def next_lines() -> list[Line]:
    """All lines worth asking for, in a fixed random order."""
    result = [Line(file, at) for file in range(len(heldout_files())) for at in code_lines(file)]
    random.Random(0).shuffle(result)
    return result


@lru_cache
def cross_file_lines() -> list[Line]:
    """The first line that uses a name imported from another held-out file, for every such name, in random order."""
    found = {}
    for file in range(len(heldout_files())):
        for name, source, defined, end in imports(file):
            uses = re.compile(rf"\b{re.escape(name)}\b")
            begin = line_starts(file)[end]  # of the line behind the import
            at = next((at for at, line in code_lines(file).items() if at >= begin and uses.search(line)), None)
            if at is not None:
                found.setdefault((file, at), Line(file, at, source, defined))  # a line may use two of them
    result = list(found.values())
    random.Random(0).shuffle(result)
    return result


def imports(file: int) -> Iterator[tuple[str, int, int, int]]:
    """Names that a file imports from another: the name as used here, file and offset of its definition, last line."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and (source := module(file, node)) is not None:
            for alias in node.names:
                if alias.name in definitions(source):
                    yield alias.asname or alias.name, source, definitions(source)[alias.name], node.end_lineno


def module(file: int, node: ast.ImportFrom) -> int | None:
    """The held-out file that `from ... import` reads, None if it is not there."""
    here = PurePosixPath(heldout_files()[file]["file"])
    folder = here.parents[node.level - 1] if node.level else PurePosixPath()
    path = folder.joinpath(*(node.module or "").split("."))
    numbers = file_numbers()
    return numbers.get(f"{path}.py", numbers.get(f"{path}/__init__.py"))


@lru_cache
def file_numbers() -> dict[str, int]:
    return {row["file"]: number for number, row in enumerate(heldout_files())}


@lru_cache
def definitions(file: int) -> dict[str, int]:
    """Top-level functions, classes and variables: name -> offset of the line that defines it first."""
    result = {}
    for node in parsed(file).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            result.setdefault(name, line_starts(file)[node.lineno - 1])
    return result
