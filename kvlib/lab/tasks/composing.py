"""The text that hides the facts: runs of consecutive lines of source code."""

import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from kvlib.paths import DATA, ROOT

HELDOUT = DATA / "heldout" / "code.jsonl"
CORPUS = ROOT / "build/minilm/corpus/train-code.jsonl"
FIRST = 20  # tokens in which no fact of a test stands, as many as VATP forces to stay


@dataclass(frozen=True)
class Draft:
    """What a task states and asks, before filler is added.

    facts: (place, text ending in a newline). A place is a depth in [0, 1] or, as an int, a number of filler lines
    between the fact and the question. questions: (text up to the answer, answer). names: words that filler must not
    contain.
    """

    facts: list[tuple[float, str]]
    questions: list[tuple[str, str]]
    names: set[str]


class Filler:
    """Runs of consecutive lines of a text."""

    def __init__(self, text: str):
        self.text = text

    def lines(self, rng: random.Random, tokens: int) -> list[str]:
        """Lines, without their newlines, that certainly hold `tokens` tokens; past the end the text starts again."""
        size = 6 * tokens + 4000  # code has two to four characters a token; there must be short lines to end with
        start = rng.randrange(len(self.text))
        chunk = self.text[start : start + size]
        while len(chunk) < size:
            chunk += "\n" + self.text[: size - len(chunk)]
        return chunk.split("\n")[1:-1]  # the first and the last line are cut


@lru_cache
def filler(split: str) -> Filler:
    """The shipped held-out code for tests; for training the corpus, which must have been built."""
    path = HELDOUT if split == "test" else CORPUS
    if not path.is_file():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing; make it with: python -m kvlib.minilm corpus")
    with path.open() as file:
        return Filler("\n".join(json.loads(line)["text"] for line in file))


def compose(
    drawn: Draft, room: int, rng: random.Random, text, count: Callable[[list[str]], list[int]], *, ends: bool
) -> str:
    """The facts among lines of `text` (a `Filler`), at most `room` tokens by `count` (text by text).

    ends: whether depths reach from the first line to the last. Otherwise they do from token `FIRST` to the last line
    that has another one behind it, blank ones not counted.

    Raises ValueError when the facts do not fit, or not as many lines of filler as one of them wants around it.
    """
    left = room - sum(count([fact for _, fact in drawn.facts]))
    if left < 0:
        raise ValueError(f"too few tokens: the facts alone need {-left} more")
    candidates = [line + "\n" for line in text.lines(rng, left)]
    lines, sizes = [], []
    for line, size in zip(candidates, count(candidates)):
        if size <= left and drawn.names.isdisjoint(re.findall(r"\w+", line.lower())):
            lines.append(line)
            sizes.append(size)
            left -= size
    starts = list(accumulate(sizes, initial=0))
    first, last = (0, len(lines)) if ends else inner(lines, starts)

    def index(place: float) -> int:
        if isinstance(place, int):
            return len(lines) - place
        return first + bisect_left(starts[first : last + 1], starts[first] + place * (starts[last] - starts[first]))

    # by depth within a place; where that is the same too, in the order of the draft, which may matter
    facts = sorted(((index(place), place, fact) for place, fact in drawn.facts), key=lambda fact: fact[:2])
    if facts[0][0] < 0:
        raise ValueError(f"too few tokens: there is room for {len(lines)} lines of filler behind the fact")
    for at, _, fact in reversed(facts):  # from the end, so that earlier places stay valid
        lines.insert(at, fact)
    return "".join(lines)


def inner(lines: list[str], starts: list[int]) -> tuple[int, int]:
    """The first and the last line before which facts stand that are not at an end."""
    first = bisect_left(starts, FIRST)
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    if first > last:
        raise ValueError(f"too few tokens: there is room for {starts[-1]} of filler")
    return first, last
