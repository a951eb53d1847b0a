"""Completion of whole lines of held-out code: the next line of a file, and the first one that uses another file.

Beside the sixteen families, in the way of LongBench's code tasks LCC and RepoBench-P, but on packages that no model
here was trained on. `sample` draws what `kvlib.lab.tasks.sampling` does; a generated text is judged by `score`.

A prompt ends with a newline; the answer is the line behind it, with its indentation and without its newline. Tokenizers
whose tokens may span a newline split prompt + answer differently from the two apart, as with the published sets.
"""

import ast
import bisect
import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import PurePosixPath

from kvlib.lab.metrics import code_similarity
from kvlib.lab.tasks import Sample
from kvlib.lab.tasks.code import SHORTEST_CODE, head, heldout_files, tail

SHORTEST_LINE = 10  # characters, indentation not counted
MARKS = ("#", "`", "//")  # LongBench's metric passes over generated lines with one of them
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


# Which lines can be asked for


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

    They have an identifier and at least ten characters; imports, comments, lines with one of `MARKS`, docstrings and
    all lines of strings that span several are left out.
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
    if len(line) < SHORTEST_LINE or line.startswith(("import ", "from ")) or any(mark in line for mark in MARKS):
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


# Drawing


def sample(task: str, tokens: int, seed: int, *, tokenizer) -> Sample:
    """Draw one `Sample` whose prompt and answer have together at most `tokens` tokens, and at most 2 % (and 8) fewer.

    Args:
        task: "next_line" or "cross_file_line". seed: each gives another line, from 0 to their number.

    Raises:
        ValueError: for an unknown task, a prompt of fewer than 512 tokens, a seed that is too large.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return TASKS[task](seed, tokens, tokenizer=tokenizer)


def next_line(seed: int, tokens: int, *, tokenizer) -> Sample:
    """The next line of a file; the prompt is nothing but the text before it, as in LCC."""
    check(tokens)
    line = choose(fitting(tokens, tokenizer), seed)
    text, answer = split(line)
    return fit("next_line", lambda room, count: tail(text, room, count), answer, seed, tokens, tokenizer)


def cross_file_line(seed: int, tokens: int, *, tokenizer) -> Sample:
    """The first line that uses a name of another file, which comes first, as in RepoBench-P.

    Of the own file as much as fits into half of the prompt; of the other file what is around the definition of the
    name, which stands at a random depth. Other files follow where it is short. Paths stand above the files.
    """
    check(tokens)
    line = choose(cross_file_lines(), seed)
    text, answer = split(line)
    rows = heldout_files()
    headers = [f"# {rows[file]['file']}\n" for file in (line.source, line.file)]
    rest = [row["text"] for file, row in enumerate(rows) if file not in (line.source, line.file)]
    other = "\n".join([rows[line.source]["text"], *rest])
    definition = other[line.defined : other.index("\n", line.defined) + 1]
    depth = random.Random(seed).random()

    def compose(room: int, count) -> str:
        room -= sum(count(headers))
        here = tail(text, room // 2, count)
        room -= sum(count([here]))
        above = tail(other[: line.defined], room - max(sum(count([definition])), round(depth * room)), count)
        below = head(other[line.defined :], room - sum(count([above])), count)
        return headers[0] + above + below + headers[1] + here

    return fit("cross_file_line", compose, answer, seed, tokens, tokenizer)


TASKS = {"next_line": next_line, "cross_file_line": cross_file_line}


def check(tokens: int) -> None:
    if tokens < SHORTEST_CODE:
        raise ValueError(f"tokens={tokens}: at least {SHORTEST_CODE} for the completion of real code")


def choose(lines: list[Line], seed: int) -> Line:
    if not 0 <= seed < len(lines):
        raise ValueError(f"seed={seed}: held-out code has {len(lines)} such lines")
    return lines[seed]


@lru_cache(maxsize=8)
def fitting(tokens: int, tokenizer) -> list[Line]:
    """The lines with enough text before them, with a margin for tokenizers that merge across lines."""
    return [line for line in next_lines() if before(line, tokenizer) >= tokens + tokens // 8]


def split(line: Line) -> tuple[str, str]:
    """The file's text before a line, and the line."""
    text = heldout_files()[line.file]["text"]
    return text[: line.at], code_lines(line.file)[line.at]


def before(line: Line, tokenizer) -> int:
    """Tokens of the file before a line."""
    return tokens_before(line.file, tokenizer)[bisect.bisect_left(line_starts(line.file), line.at)]


@lru_cache(maxsize=400)
def tokens_before(file: int, tokenizer) -> list[int]:
    """Tokens of the file before each of its lines."""
    lines = [f"{line}\n" for line in heldout_files()[file]["text"].split("\n")]
    return list(accumulate(map(len, tokenizer(lines, add_special_tokens=False).input_ids), initial=0))


def fit(task: str, compose: Callable, answer: str, seed: int, tokens: int, tokenizer) -> Sample:
    """The sample whose prompt is `compose(room, count)`, for the room that gives the right length.

    Tokenizers that merge across lines need a second try, ours does not.
    """

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    wanted = tokens - sum(count([answer]))
    room = wanted - len(tokenizer("").input_ids)
    for _ in range(8):
        prompt = compose(room, count)
        length = len(tokenizer(prompt).input_ids)
        if 0 <= wanted - length <= 8 + tokens // 50:
            last = prompt[prompt.rstrip("\n").rfind("\n") + 1 :]
            return Sample(task=task, prompt=prompt, answer=answer, question=last, seed=seed, length=length)
        room += wanted - length
    raise ValueError(f"no prompt of {tokens} tokens could be made for {task!r} with this tokenizer")


# Scoring


def score(
    sample: Sample, generated: str, similarity: Callable[[str, str], float] = code_similarity
) -> dict[str, float]:
    """exact: 1 if the first line generated that is not blank equals the answer, indentation aside.

    similarity: of the whole text generated and the answer, by default LongBench's, in [0, 1].
    """
    first = generated.lstrip().split("\n")[0].rstrip()
    return {"exact": float(first == sample.answer.strip()), "similarity": similarity(generated, sample.answer)}


def judge(answer: list[int], chosen: list[int], tokenizer) -> float:
    """`exact` of greedy decoding, from the first choices at each token of the answer and after it (ids).

    `chosen` has one token more than `answer`: the line has to end there. Other than in `score`, the indentation counts.
    """
    behind = chosen[len(answer)]
    ends = behind == tokenizer.eos_token_id or re.match(r"[ \t]*\n", tokenizer.decode([behind]))
    return float(chosen[: len(answer)] == answer and bool(ends))
