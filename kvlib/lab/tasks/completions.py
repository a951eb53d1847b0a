"""Completion of whole lines of held-out code, in the way of LongBench's LCC and RepoBench-P.

They stand beside the sixteen families, whose group "code" completes identifiers. A prompt ends with a newline; the
answer is the line behind it, with its indentation and without its newline. Tokenizers whose tokens may span a newline
split prompt + answer differently from the two apart, as with the published sets.
"""

import bisect
from functools import lru_cache
from itertools import accumulate

from kvlib.lab.tasks.catalogue import family
from kvlib.lab.tasks.code import check, heldout_files, tail, two_files
from kvlib.lab.tasks.lines import Line, code_lines, cross_file_lines, line_starts, next_lines

GROUP = "completion"


@family(GROUP, trained=False, metric="similarity")
def next_line(seed: int, tokens: int, *, room: int, tokenizer, split: str, count) -> tuple[str, str]:
    """The next line of a file, of which nothing but the text before it is shown, as in LCC."""
    check(split, tokens)
    text, answer = cut(choose(fitting(tokens, tokenizer), seed))
    return tail(text, room - others(answer, tokenizer, count), count), answer


@family(GROUP, trained=False, metric="similarity")
def cross_file_line(seed: int, tokens: int, *, room: int, tokenizer, split: str, count) -> tuple[str, str]:
    """The first line that uses a name of another file, whose definition is shown first, as in RepoBench-P."""
    check(split, tokens)
    line = choose(cross_file_lines(), seed)
    text, answer = cut(line)
    room -= others(answer, tokenizer, count)
    return two_files(line.source, line.defined, line.file, text, room, seed, count), answer


def others(answer: str, tokenizer, count) -> int:
    """Tokens of a sample that are not its text: the answer's, and those that begin every prompt."""
    return sum(count([answer])) + len(tokenizer("").input_ids)


def choose(lines: list[Line], seed: int) -> Line:
    if not 0 <= seed < len(lines):
        raise ValueError(f"seed={seed}: held-out code has {len(lines)} such lines")
    return lines[seed]


def cut(line: Line) -> tuple[str, str]:
    """The file's text before a line, and the line."""
    text = heldout_files()[line.file]["text"]
    return text[: line.at], code_lines(line.file)[line.at]


@lru_cache(maxsize=8)
def fitting(tokens: int, tokenizer) -> list[Line]:
    """The lines with enough text before them, with a margin for tokenizers that merge across lines."""
    return [line for line in next_lines() if before(line, tokenizer) >= tokens + tokens // 8]


def before(line: Line, tokenizer) -> int:
    """Tokens of the file before a line."""
    return tokens_before(line.file, tokenizer)[bisect.bisect_left(line_starts(line.file), line.at)]


@lru_cache(maxsize=400)
def tokens_before(file: int, tokenizer) -> list[int]:
    """Tokens of the file before each of its lines."""
    lines = [f"{line}\n" for line in heldout_files()[file]["text"].split("\n")]
    return list(accumulate(map(len, tokenizer(lines, add_special_tokens=False).input_ids), initial=0))
