"""What is measured without an answer that is right: the text that follows, and a summary.

Nothing says whether a summary is good; what is compared is what a model writes with the full cache and without.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate

from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.natural.composing import CHARACTERS, SHORTEST
from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.texts import Text, novel
from kvlib.lab.tasks.natural.words import Draw
from kvlib.lab.tasks.prompt import Prompt, begin, counter, cut, fitted

GROUP = "label-free"
LEAST, MOST = 64, 96  # tokens that are foretold


@family(GROUP, metric="reference", guess=float("nan"))
def summary(draw: Draw) -> Draft:
    """A stretch of the novel; asked for a summary in a few sentences."""
    instruction = "Read the following text. I will ask you to summarise it afterwards."
    return Draft([], "Summarise the text above in a few sentences.", "The text", (), instruction)


def prose_bits(rng: random.Random, characters: int, text: Text, count: Callable) -> tuple[list[str], str]:
    """The next sentences of the novel, 64 to 96 tokens, in bits per character that the model needs for them.

    They follow within a paragraph, since tokenizers may join its end to the blank line behind it. Returned with the
    pieces before them, at least so many characters.
    """
    starts = list(accumulate(map(len, text.pieces), initial=0))
    places = [at for at, piece in enumerate(text.pieces) if starts[at] >= characters and piece.startswith(text.gap)]
    for at in rng.sample(places, len(places)):
        sizes = list(accumulate(count(list(text.pieces[at : at + LEAST])), initial=0))
        pieces = bisect_left(sizes, LEAST)
        if pieces < len(sizes) and sizes[pieces] <= MOST:
            first = bisect_right(starts, starts[at] - characters) - 1
            return list(text.pieces[first:at]), "".join(text.pieces[at : at + pieces])
    raise ValueError(f"the text is too short: it has {starts[-1]} characters, before what is foretold {characters}")


def continued(family: Family, tokens: int, seed: int, *, tokenizer, text: Text | None = None) -> Prompt:
    """A stretch of the novel, or of `text`, that ends with a sentence."""
    head, count = begin(tokenizer), counter(tokenizer)
    rng = random.Random(f"{family.name} {tokens} {seed}")
    pieces, answer = family.make(rng, CHARACTERS * tokens, text or novel(), count)

    def build(room: int) -> Prompt:
        shown = head + ending(pieces, room, count)
        return cut(family.name, seed, shown, len(shown), answer, tokenizer)

    return fitted(tokens, tokens - sum(count([head, answer])), build)


enter(Family("prose_bits", GROUP, "bits", float("nan"), prose_bits, continued, SHORTEST))


def ending(pieces: list[str], room: int, count: Callable) -> str:
    """The last pieces that fit into `room` tokens, and as many words of the one before them."""
    sizes = list(accumulate(reversed(count(pieces)), initial=0))
    whole = bisect_right(sizes, room) - 1
    *_, divided = pieces[: len(pieces) - whole]
    words = accumulate(reversed(re.findall(r"\s*\S+", divided)), lambda behind, word: word + behind)
    ends = ["", *words]
    fitting = [end for end, size in zip(ends, count(ends)) if size <= room - sizes[whole]]
    return (fitting[-1] + "".join(pieces[len(pieces) - whole :])).lstrip()
