"""Prompts in which facts stand among lines of code, of words that the embedded models know from training."""

import random
import re
from collections.abc import Callable
from dataclasses import replace

from kvlib.lab.tasks.catalogue import Family, enter, find
from kvlib.lab.tasks.composing import Draft, Filler, compose, filler
from kvlib.lab.tasks.prompt import Prompt, begin, counter, cut, fitted
from kvlib.lab.tasks.words import Draw

SHORTEST = 128  # tokens; below it there is no room for filler
MOST = 512  # facts, however long the prompt


def family(group: str, trained: bool) -> Callable:
    """Enter a function in the catalogue under its name. `make(draw, tokens, **options)` gives a `Draft`."""

    def entered(make: Callable) -> Callable:
        enter(Family(make.__name__, group, "exact", float("nan"), make, prompt, SHORTEST, trained))
        return make

    return entered


def draft(task: str, tokens: int, draw: Draw, **options) -> Draft:
    """What `task` states and asks in a prompt of about `tokens` tokens, questions in random order."""
    drawn = find(task).make(draw, tokens, **options)
    draw.rng.shuffle(drawn.questions)
    return drawn


def prompt(
    family: Family, tokens: int, seed: int, *, tokenizer, split: str = "test", text: Filler | None = None, **options
) -> Prompt:
    """The first question of a draft behind its facts. `text` replaces the split's own filler.

    In tests facts stand neither in the first tokens nor in the line before the question, which some methods keep
    whatever they say, and no other line holds a word of the answer. In training they stand anywhere.
    """
    head, count = begin(tokenizer), counter(tokenizer)

    def build(room: int) -> Prompt:
        rng = random.Random(f"{family.name} {tokens} {seed} {split}")
        drawn = draft(family.name, tokens, Draw(rng, split), **options)
        question, answer = drawn.questions[0]
        unsaid = replace(drawn, names=drawn.names | long_words(answer.lower()))
        inside = room - sum(count([head, question, answer]))
        context = head + compose(unsaid, inside, rng, text or filler(split), count, ends=split == "train")
        return cut(family.name, seed, context + question, len(context), answer, tokenizer)

    return fitted(tokens, tokens, build)


def long_words(text: str) -> set[str]:
    """Its words of four characters or more."""
    return set(re.findall(r"\w{4,}", text))
