"""Completion of identifiers in real, held-out source code: nothing is planted, and no model here was trained on it.

The prompt stops inside an identifier that occurs in few files of the held-out packages. Training code may know it too,
so the scores have a floor: what is right with `source=False`, where another identifier stands wherever this one did.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from kvlib.lab.tasks.composing import FIRST, HELDOUT
from kvlib.lab.tasks.planted import long_words
from kvlib.lab.tasks.real_code import family

GROUP = "code"
IDENTIFIER = re.compile(r"\b[A-Za-z_]{8,}\b")  # long ones, so that something is left to complete
COMPOUND = re.compile(r"[A-Za-z]_[A-Za-z]|[a-z][A-Z]")  # what plain words of comments lack
TYPED = 3  # characters of the identifier in the prompt, at least
FILES = 3  # held-out files that have the identifier, at most
CHOICES = 4  # places for each seed, of which the first that fits is taken
APART = 16  # lines since the identifier was last seen


@dataclass(frozen=True)
class Place:
    """Where an identifier is completed: file number, offset of the identifier, and (file, offset) to read it from."""

    word: str
    file: int
    at: int
    source: int
    seen: int


@lru_cache
def heldout_files() -> list[dict]:
    with HELDOUT.open() as file:
        return [json.loads(line) for line in file]


@lru_cache
def places(same_file: bool) -> list[Place]:
    """All places of completion, in a fixed random order.

    same_file: the identifier was last seen in this file, `APART` lines or more before. Otherwise it occurs here for
    the first time, and in another file of the package.
    """
    texts = [row["text"] for row in heldout_files()]
    packages = [row["distribution"] for row in heldout_files()]
    found = [[(m[0], m.start()) for m in IDENTIFIER.finditer(text) if COMPOUND.search(m[0])] for text in texts]
    spread = Counter(word for words in found for word in {word for word, _ in words})
    first = {(file, word): at for file, words in enumerate(found) for word, at in reversed(words)}
    result = []
    for file, words in enumerate(found):
        last = {}
        for word, at in words:
            if spread[word] <= FILES:
                before = last.get(word)
                inside = texts[file].rfind(word, 0, at)  # in a longer identifier too
                if same_file and before is not None and texts[file].count("\n", inside, at) >= APART:
                    result.append(Place(word, file, at, file, before))
                if not same_file and inside < 0:
                    result += [
                        Place(word, file, at, other, first[other, word])
                        for other in range(len(texts))
                        if other != file and packages[other] == packages[file] and (other, word) in first
                    ][:1]
            last[word] = at
    random.Random(0).shuffle(result)
    return result


def cut(line: str, word: str, tokenizer) -> int | None:
    """How many characters of `word` go into the prompt after `line`, so that no token crosses the cut."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    whole = ids(line + word)
    for typed in range(TYPED, len(word) - 1):
        if ids(line + word[:typed]) + ids(word[typed:]) == whole:
            return typed
    return None


@lru_cache(maxsize=4)
def usable(same_file: bool, tokenizer) -> list[tuple[Place, str, int, int]]:
    """Places with the line up to the identifier, how much of it is typed, and the tokens since its use in this file."""
    result, ends = [], {}
    for place in places(same_file):
        text = heldout_files()[place.file]["text"]
        line = text[text.rfind("\n", 0, place.at) + 1 : place.at]
        if (typed := cut(line, place.word, tokenizer)) is None:
            continue
        since = 0
        if same_file:
            if place.file not in ends:  # tokens up to the end of each line
                ids = tokenizer([f"{line}\n" for line in text.split("\n")], add_special_tokens=False).input_ids
                ends[place.file] = list(accumulate(map(len, ids), initial=0))
            first, last = text.count("\n", 0, place.seen), text.count("\n", 0, place.at)
            since = ends[place.file][last + 1] - ends[place.file][first]
        result.append((place, line, typed, since))
    return result


def choices(same_file: bool, seed: int, tokens: int, tokenizer) -> list[tuple[Place, str, int]]:
    """Places for a seed, each with the line up to the identifier and how much of it is typed; no seeds share any.

    In the same file the identifier was last seen in the first three quarters of the prompt: the longer the prompt, the
    longer the memory that it takes.
    """
    nearest = tokens // 4 if same_file else -1
    fitting = [row[:3] for row in usable(same_file, tokenizer) if nearest < row[3] < tokens - tokens // 50 - 8]
    seeds = len(fitting) // CHOICES
    if not 0 <= seed < seeds:
        raise ValueError(f"seed={seed}: held-out code has {seeds} such places")
    return fitting[seed::seeds][:CHOICES]


def away_from_ends(text: str, word: str, answer: str, tokenizer) -> bool:
    """Whether neither the first tokens of a prompt nor the last line of its context tells how `word` goes on."""
    start = tokenizer.decode(tokenizer(text[: 40 * FIRST]).input_ids[:FIRST])
    ends = start + text[text.rstrip("\n").rfind("\n") :]
    return word not in ends and long_words(answer).isdisjoint(long_words(ends))


def tail(text: str, room: int, count) -> str:
    """The end of `text`, as much as fits into `room` tokens; it may start inside a line, but not inside a word."""
    lines = re.findall(r"[^\n]*\n|[^\n]+$", text[-8 * room - 400 :])
    start, left = len(lines), room
    for size in reversed(count(lines)):
        if size > left:
            break
        left -= size
        start -= 1
    words = re.findall(r"\w+|\W", lines[start - 1]) if start else []
    while words and count(["".join(words)])[0] > left:
        words.pop(0)
    return "".join(words + lines[start:])


def head(text: str, room: int, count) -> str:
    """The first lines of `text` that fit into `room` tokens; the last may be cut, but not inside a word."""
    lines = [line + "\n" for line in text[: 8 * room + 400].split("\n")[:-1]]
    end, left = 0, room
    for size in count(lines):
        if size > left:
            break
        left -= size
        end += 1
    words = re.findall(r"\w+|\W", lines[end][:-1]) if end < len(lines) else []
    while words and count(["".join(words) + "\n"])[0] > left:
        words.pop()
    return "".join(lines[:end]) + ("".join(words) + "\n" if words else "")


def two_files(source: int, start: int, file: int, text: str, room: int, seed: int, count) -> str:
    """Another file and the end of `text`, each below its path, in at most `room` tokens.

    Of the other file, number `source`, what is around the line that starts at `start`, which stands at a random depth;
    more files follow where it is short. `text`, of file number `file`, has at most half of the room.
    """
    rows = heldout_files()
    headers = [f"# {rows[number]['file']}\n" for number in (source, file)]
    room -= sum(count(headers))
    here = tail(text, room // 2, count)
    room -= sum(count([here]))
    rest = [row["text"] for number, row in enumerate(rows) if number not in (source, file)]
    other = "\n".join([rows[source]["text"], *rest])
    shown = sum(count([other[start : other.index("\n", start) + 1]]))
    above = tail(other[:start], room - max(shown, round(random.Random(seed).random() * room)), count)
    below = head(other[start:], room - sum(count([above])), count)
    return headers[0] + above + below + headers[1] + here


def without(text: str, word: str) -> str:
    """`text` with another rare identifier of the held-out code wherever `word` stands, inside longer ones too.

    The other one begins differently, or what is typed of `word` would ask for it.
    """
    if word not in text:
        return text
    others = sorted({place.word for place in places(True)})
    start = word[:TYPED].lower()
    others = [other for other in others if not other.lower().startswith(start) and word not in other]
    return text.replace(word, random.Random(word).choice(others))


@family(GROUP)
def completion(seed: int, tokens: int, *, room: int, tokenizer, count, source: bool = True) -> tuple[str, str]:
    """An identifier that this file used before, but not in the last quarter of the prompt."""
    rows = heldout_files()
    for place, line, typed in choices(True, seed, tokens, tokenizer):
        others = "".join(row["text"] + "\n" for row in rows[place.file + 1 :] + rows[: place.file])
        text = others + rows[place.file]["text"][: place.at - len(line)]
        end, answer = line + place.word[:typed], place.word[typed:]
        text = tail(text, room - len(tokenizer(end).input_ids) - sum(count([answer])), count)
        if away_from_ends(text, place.word, answer, tokenizer):
            return (text if source else without(text, place.word)) + end, answer
    raise ValueError(f"seed={seed}: held-out code has no place whose answer is far enough from both ends")


@family(GROUP)
def cross_file(seed: int, tokens: int, *, room: int, tokenizer, count, source: bool = True) -> tuple[str, str]:
    """An identifier that only another file of the package has used so far."""
    rows = heldout_files()
    for place, line, typed in choices(False, seed, tokens, tokenizer):
        end, answer = line + place.word[:typed], place.word[typed:]
        left = room - sum(count([answer])) - len(tokenizer(end).input_ids)
        start = rows[place.source]["text"].rfind("\n", 0, place.seen) + 1
        text = rows[place.file]["text"][: place.at - len(line)]
        text = two_files(place.source, start, place.file, text, left, seed, count)
        if away_from_ends(text, place.word, answer, tokenizer):
            return (text if source else without(text, place.word)) + end, answer
    raise ValueError(f"seed={seed}: held-out code has no place whose answer is far enough from both ends")
