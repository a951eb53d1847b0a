"""What a task in natural language is made of, and the catalogue of families."""

from collections.abc import Callable
from dataclasses import dataclass

from kvlib import nearest

INSTRUCTION = "Read the following text. I will ask a question about it afterwards."


@dataclass(frozen=True)
class Draft:
    """What a task states and asks, before it stands in a text and in a model's chat format.

    facts: (depth in [0, 1], text); one that holds a newline stands in a paragraph of its own.
    lead: how the answer begins, at least one token. answers: what follows it, each as it would continue the lead.
    text: what is read instead of facts in another text, as much of its end as there is room for.
    """

    facts: list[tuple[float, str]]
    question: str
    lead: str
    answers: tuple[str, ...]
    instruction: str = INSTRUCTION
    text: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of task; `make(draw)` gives a `Draft`.

    group: one of the six of LongBench. metric: "exact", the answer or not, or "share" of the answers that were written.
    guess: what somebody scores who knows all that a prompt states but not what belongs to which question.
    code: whether the facts stand among lines of code and are asked for without the model's chat format.
    """

    name: str
    group: str
    make: Callable
    metric: str
    guess: float
    code: bool


FAMILIES: dict[str, Family] = {}


def family(group: str, *, metric: str = "exact", guess: float = 0.0, code: bool = False) -> Callable:
    """Enter a function in the catalogue under its name."""

    def enter(make: Callable) -> Callable:
        FAMILIES[make.__name__] = Family(make.__name__, group, make, metric, guess, code)
        return make

    return enter


def find(task: str) -> Family:
    """The family of that name. Raises ValueError with the nearest name."""
    if task not in FAMILIES:
        raise nearest.unknown("task", task, FAMILIES)
    return FAMILIES[task]
