"""Where a study's samples come from: families of made-up prompts, or tasks of published benchmarks."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from kvlib.lab import tasks
from kvlib.lab.evaluation.benchmarks import questions
from kvlib.lab.evaluation.benchmarks.loading import digest
from kvlib.lab.tasks.composing import HELDOUT
from kvlib.lab.tasks.natural.books import read_books
from kvlib.lab.tasks.natural.texts import NOVEL


@dataclass(frozen=True)
class Drawn:
    """A family with what a study asks of any task, as `kvlib.lab.evaluation.benchmarks.questions.Task` has it."""

    family: tasks.Family
    samples = math.inf  # one for each seed

    @property
    def metric(self) -> str:
        return self.family.metric

    @property
    def functions(self) -> tuple[Callable, ...]:
        return tasks.sample, self.family.draw, self.family.make

    def source(self) -> str:
        """The sha256 of the texts that prompts are made of; of books the errors of `benchmarks.load`."""
        return digest(read_books) if self.family.name in tasks.BOOKS else heldout()


@cache
def heldout() -> str:
    """sha256 of the texts that are shipped."""
    return hashlib.sha256(HELDOUT.read_bytes() + NOVEL.read_bytes()).hexdigest()


def find(measure: str, task: str) -> Drawn | questions.Task:
    """A task by its name among those of a measure. Raises ValueError with the nearest name."""
    return questions.find(task) if measure == "benchmarks" else Drawn(tasks.find(task))
