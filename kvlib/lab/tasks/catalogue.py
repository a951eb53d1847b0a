"""The families of tasks by name, whatever kind of text they are made of."""

from collections.abc import Callable
from dataclasses import dataclass

from kvlib import nearest

GROUPS = (  # of LongBench
    "single-document QA",
    "multi-document QA",
    "aggregation",
    "few-shot",
    "synthetic",
    "code",
)


@dataclass(frozen=True)
class Family:
    """A kind of task. `draw(family, tokens, seed, *, tokenizer, **options)` gives a `Prompt`, of what `make` makes up.

    group: one of `GROUPS`; "probe", "distance", "completion" and "function" for what is measured beside them;
        "label-free" where no answer is right or wrong; "unbroken" for lines and their bits behind prompts that end
        before the newline, on which models are compared that tokenise newlines differently; "spelling" for a needle
        whose number is written in fewer tokens; "book" for books that are not shipped.
    metric: "exact", the answer or not, of several lines the share before the first mistake; "share" of several answers;
        "similarity" of the line that is written and the answer; "bits" per character that the answer costs the model,
        where less is better; "run" for what is run against assertions; "reference" if there is no answer and what the
        full cache writes stands for it.
    guess: what somebody scores who knows all that a prompt states but not what belongs to which question; NaN where
        that depends on the length.
    shortest: tokens of the shortest prompt. trained: whether the embedded models were trained on it.
    """

    name: str
    group: str
    metric: str
    guess: float
    make: Callable
    draw: Callable
    shortest: int
    trained: bool = False


CATALOGUE: dict[str, Family] = {}


def enter(family: Family) -> None:
    """Raises ValueError for a name that is taken."""
    if family.name in CATALOGUE:
        raise ValueError(f"there are two families {family.name!r}")
    CATALOGUE[family.name] = family


def find(task: str) -> Family:
    """The family of that name. Raises ValueError with the nearest name."""
    if task not in CATALOGUE:
        raise nearest.unknown("task", task, CATALOGUE)
    return CATALOGUE[task]
