"""Which steps follow each other, and which split a composition belongs to.

The splits differ in pairs of neighbouring steps: a sixth of all pairs, by their checksum, never occurs in training, and
every test composition has one of them at least. Every single step occurs in training.
"""

import random
import zlib
from functools import lru_cache

from kvlib.lab.functions.steps import KINDS, STEPS, Step
from kvlib.lab.tasks.words import SPLITS

STARTS = dict(zip(KINDS, (2, 4, 2, 3, 2)))  # kinds of the first parameter, with their weights
SIZES = {1: 1, 2: 4, 3: 4}  # steps, with their weights; long compositions are turned down more often
HELPED = 5  # weight of a step that calls a helper, among others of weight 1


def held_out(first: str, second: str) -> bool:
    """Whether the second step behind the first one is for tests only."""
    return zlib.crc32(f"{first} {second}".encode()) % 6 == 0


def split_of(composition: tuple[str, ...]) -> str:
    return "test" if any(map(held_out, composition, composition[1:])) else "train"


@lru_cache
def candidates(kind: str, first: bool, last: bool) -> tuple[Step, ...]:
    """Steps that take a value of this kind; those that return it themselves only as the last one."""
    fitting = (step for step in STEPS.values() if step.takes == kind)
    return tuple(step for step in fitting if (first or not step.first) and (last or step.results))


def compose(rng: random.Random, split: str) -> tuple[Step, ...]:
    """One to three different steps, of which at most one calls a helper.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: {' or '.join(SPLITS)}")
    while True:
        size = rng.choices([*SIZES], SIZES.values())[0]
        kind, steps = rng.choices([*STARTS], STARTS.values())[0], []
        for i in range(size):
            fitting = candidates(kind, i == 0, i == size - 1)
            steps.append(rng.choices(fitting, [HELPED if step.helper else 1 for step in fitting])[0])
            kind = steps[-1].gives
        names = tuple(step.name for step in steps)
        fresh = len(set(names)) == size and sum(step.helper is not None for step in steps) <= 1
        if fresh and split_of(names) == split:
            return tuple(steps)
