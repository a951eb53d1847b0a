"""What every task is made of: facts stated in a prompt, and questions about them."""

from collections.abc import Callable
from dataclasses import dataclass

from kvlib import nearest

GROUPS = (  # of LongBench, with as many families in each as it has tasks
    "single-document QA",
    "multi-document QA",
    "aggregation",
    "few-shot",
    "synthetic",
    "code",
)
REAL_CODE = ("code", "completion")  # groups whose prompts are held-out code and nothing else
SHORTEST = 128  # tokens; below it there is no room for filler
MOST = 512  # facts, however long the prompt


@dataclass(frozen=True)
class Sample:
    """A prompt that ends where its answer begins.

    question: the end of the prompt, what is not context. length: that of the prompt in tokens, BOS included.
    """

    task: str
    prompt: str
    answer: str
    question: str
    seed: int
    length: int


@dataclass(frozen=True)
class Draft:
    """What a task states and asks, before filler is added.

    facts: (place, text ending in a newline). A place is a depth in [0, 1] or, as an int, a number of filler lines
    between the fact and the question. questions: (text up to the answer, answer). names: identifiers that filler must
    not contain.
    """

    facts: list[tuple[float, str]]
    questions: list[tuple[str, str]]
    names: set[str]


@dataclass(frozen=True)
class Family:
    """A kind of task. `make(draw, tokens, **options)` gives a `Draft`, or a prompt and its answer (`REAL_CODE`).

    group: one of `GROUPS`, or "probe" or "completion" for what is measured beside the sixteen families.
    trained: whether the embedded models were trained on it.
    metric: "exact", the answer or not; "similarity" of the line that is generated and the answer; "bits" per character
        that the answer costs the model, where less is better.
    """

    name: str
    group: str
    trained: bool
    make: Callable
    metric: str = "exact"


CATALOGUE: dict[str, Family] = {}


def family(group: str, trained: bool, metric: str = "exact") -> Callable:
    """Enter a function in the catalogue under its name."""

    def enter(make: Callable) -> Callable:
        CATALOGUE[make.__name__] = Family(make.__name__, group, trained, make, metric)
        return make

    return enter


def find(task: str) -> Family:
    """The family of that name. Raises ValueError with the nearest name."""
    if task not in CATALOGUE:
        raise nearest.unknown("task", task, CATALOGUE)
    return CATALOGUE[task]
