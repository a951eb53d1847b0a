"""Prompts that are held-out code and nothing else."""

from collections.abc import Callable

from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.prompt import Prompt, begin, counter, cut, fitted

SHORTEST_CODE = 512  # tokens


def family(group: str, metric: str = "exact") -> Callable:
    """Enter a function in the catalogue under its name.

    `make(seed, tokens, *, room, tokenizer, count, **options)` gives a text of at most `room` tokens, and what follows.
    """

    def entered(make: Callable) -> Callable:
        enter(Family(make.__name__, group, metric, float("nan"), make, prompt, SHORTEST_CODE))
        return make

    return entered


def prompt(family: Family, tokens: int, seed: int, *, tokenizer, **options) -> Prompt:
    """The line that the text ends in is the question; where nothing is asked there is none."""
    head, count = begin(tokenizer), counter(tokenizer)

    def build(room: int) -> Prompt:
        text, answer = family.make(seed, tokens, room=room, tokenizer=tokenizer, count=count, **options)
        text = head + text
        question = len(text) if family.metric == "bits" else text.rstrip().rindex("\n") + 1
        return cut(family.name, seed, text, question, answer, tokenizer)

    return fitted(tokens, tokens, build)
