"""Completion of whole lines of held-out code, in the way of LongBench's LCC and RepoBench-P, and what lines cost.

They stand beside the families, whose group "code" completes identifiers. A prompt ends with a newline; the answer is
the line behind it, with its indentation and without its newline. Tokenizers whose tokens may span a newline split
prompt + answer differently from the two apart, as with the published sets; of `code_bits`, whose answer is fed, the
indentation then belongs to the prompt, or the first word.
"""

import bisect
import re
from functools import lru_cache
from itertools import accumulate

from kvlib.lab.tasks.code import heldout_files, tail, two_files
from kvlib.lab.tasks.lines import Line, code_lines, cross_file_lines, line_starts, next_lines
from kvlib.lab.tasks.prompt import boundary
from kvlib.lab.tasks.real_code import family

GROUP = "completion"
FORETOLD = 64  # tokens, at least


@family(GROUP, metric="similarity")
def next_line(seed: int, tokens: int, *, room: int, tokenizer, count) -> tuple[str, str]:
    """The next line of a file, of which nothing but the text before it is shown, as in LCC."""
    text, answer = cut(choose(fitting(tokens, tokenizer), seed))
    return tail(text, room - others(answer, tokenizer, count), count), answer


@family(GROUP, metric="similarity")
def cross_file_line(seed: int, tokens: int, *, room: int, tokenizer, count) -> tuple[str, str]:
    """The first line that uses a name of another file, whose definition is shown first, as in RepoBench-P."""
    line = choose(cross_file_lines(), seed)
    text, answer = cut(line)
    room -= others(answer, tokenizer, count)
    return two_files(line.source, line.defined, line.file, text, room, seed, count), answer


@family("label-free", metric="bits")
def code_bits(seed: int, tokens: int, *, room: int, tokenizer, count) -> tuple[str, str]:
    """The next lines of a file, 64 tokens or a line more, in bits per character that the model needs for them."""
    line = choose(continued(tokens, tokenizer), seed)
    text, _ = cut(line)
    answer = heldout_files()[line.file]["text"][line.at : end_of_answer(line, tokenizer)]
    text = tail(text, room - others(answer, tokenizer, count), count)
    indent = len(answer) - len(answer.lstrip(" "))
    word = re.match(r" *(\w+|.)", answer).end()  # behind a blank line newlines may be joined unless a word follows
    return boundary(text, answer, (0, max(0, indent - 1), indent, word), tokenizer)


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


@lru_cache(maxsize=8)
def continued(tokens: int, tokenizer) -> list[Line]:
    """The lines of `fitting` behind which the file goes on for `FORETOLD` tokens."""
    return [
        line
        for line in fitting(tokens, tokenizer)
        if tokens_before(line.file, tokenizer)[-1] - before(line, tokenizer) >= FORETOLD
    ]


def before(line: Line, tokenizer) -> int:
    """Tokens of the file before a line."""
    return tokens_before(line.file, tokenizer)[line_number(line)]


def line_number(line: Line) -> int:
    """Its place in its file, from 0."""
    return bisect.bisect_left(line_starts(line.file), line.at)


def end_of_answer(line: Line, tokenizer) -> int:
    """Offset where the line ends with which `FORETOLD` tokens have been written from `line` on."""
    wanted = before(line, tokenizer) + FORETOLD
    return line_starts(line.file)[bisect.bisect_left(tokens_before(line.file, tokenizer), wanted)]


@lru_cache(maxsize=400)
def tokens_before(file: int, tokenizer) -> list[int]:
    """Tokens of the file before each of its lines, and of all of it."""
    *lines, rest = heldout_files()[file]["text"].split("\n")
    lines = [*(f"{line}\n" for line in lines), rest]
    return list(accumulate(map(len, tokenizer(lines, add_special_tokens=False).input_ids), initial=0))
