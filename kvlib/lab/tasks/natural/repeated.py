"""Lines of held-out code that stood earlier in their file: what a completion can copy."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache

from kvlib.lab.tasks.code import heldout_files
from kvlib.lab.tasks.lines import code_lines, line_starts
from kvlib.lab.tasks.natural.words import GOLDEN

FIRST, LAST = 32, 64  # tokens of a context in which no answer stands
LINES = 6  # between context and answer
SPARE = 8  # tokens by which a context may be shorter than was thought


@dataclass(frozen=True)
class Place:
    """Line number `line` of a file repeats one that stands at `depth` of the context."""

    file: int
    line: int
    depth: float


@lru_cache(maxsize=4)
def places(tokens: int, tokenizer) -> list[Place]:
    """All lines that stood in the context of `tokens` tokens before them, but not near its beginning or its end."""
    found = []
    for file, row in enumerate(heldout_files()):
        lines, seen = [line.strip() for line in row["text"].split("\n")], {}
        sizes = tokens_before(row["text"], line_starts(file), tokenizer)
        asked = {line_starts(file).index(at) for at in code_lines(file)}
        for number, line in enumerate(lines):
            begin, end = sizes[number + 1] - tokens, sizes[max(0, number - LINES)]  # of the context, at the earliest
            if number in asked and line in seen and lines[number - 1] and begin > tokens // 8:
                first = bisect_left(sizes, begin + FIRST + tokens // 50 + SPARE)
                last = bisect_right(sizes, end - LAST - SPARE) - 1
                ends = lines[bisect_right(sizes, begin - SPARE) - 1 : first] + lines[last:number]
                if first <= seen[line] < last and not any(line in other for other in ends):
                    found.append(Place(file, number, (sizes[seen[line]] - begin) / (end - begin)))
            seen[line] = number
    return found


def tokens_before(text: str, offsets: list[int], tokenizer) -> list[int]:
    """Tokens of a text before each of these characters."""
    pairs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    starts = [start for start, _ in pairs]
    return [bisect_left(starts, offset) for offset in offsets]


@lru_cache(maxsize=4)
def evenly(tokens: int, tokenizer) -> list[Place]:
    """The places in an order in which depths are as even over any run of them as they can be."""
    left, ordered = sorted(places(tokens, tokenizer), key=lambda place: (place.depth, place.file, place.line)), []
    while left:
        wanted = len(ordered) * GOLDEN % 1
        ordered.append(min(left, key=lambda place: abs(place.depth - wanted)))
        left.remove(ordered[-1])
    return ordered
