"""The text that hides the facts: a novel, any text of the folder `KVLIB_DATA`, or lines of held-out code."""

import lzma
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from kvlib.lab.evaluation.benchmarks.files import File, local
from kvlib.lab.tasks.code import heldout_files
from kvlib.paths import DATA

NOVEL = DATA / "prose" / "moby-dick.txt.xz"
PARAGRAPH = "\n\n"
# Behind the mark that ends a sentence, with quotes and brackets that close there, but not behind a title.
SENTENCE_ENDS = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]["')]*(\s)(?=["'(]*[A-Z])""")


@dataclass(frozen=True)
class Text:
    """Pieces between which facts may stand, each with the white space before it. gap: the one before a fact."""

    pieces: tuple[str, ...]
    gap: str

    def start(self, rng: random.Random, characters: int) -> list[str]:
        """Consecutive pieces from a random one on, at least so many characters; past the end the text starts again."""
        first = at = rng.randrange(len(self.pieces))
        found = []
        while characters > 0:
            found.append(self.pieces[at])
            characters -= len(found[-1])
            at = (at + 1) % len(self.pieces)
            if at == first and characters > 0:
                raise ValueError(f"the text is too short: {characters} characters are missing")
        return found


def sentences(text: str) -> Text:
    """Prose, sentence by sentence; paragraphs are what blank lines divide, and lines within them are joined."""
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        if words := paragraph.split():
            begin, line = 0, " ".join(words)
            for match in SENTENCE_ENDS.finditer(line):
                pieces.append((" " if begin else PARAGRAPH) + line[begin : match.start(1)])
                begin = match.end(1)
            pieces.append((" " if begin else PARAGRAPH) + line[begin:])
    return Text(tuple(pieces), " ")


@lru_cache
def novel() -> Text:
    """*Moby-Dick* from its first chapter on."""
    text = lzma.decompress(NOVEL.read_bytes()).decode("ascii")
    return sentences(text[text.index("CHAPTER 1. ") :])


@lru_cache
def code() -> Text:
    """The held-out code, line by line."""
    lines = "\n".join(row["text"] for row in heldout_files()).split("\n")
    return Text(tuple("\n" + line for line in lines), "\n")


def prose(file: str) -> Text:
    """A text file (UTF-8) of the folder that `KVLIB_DATA` names. Raises FileNotFoundError with what to do."""
    return sentences(local(File(file), "any text in prose").decode("utf-8"))
