"""What one result table holds: configurations, tasks, models and numbers of samples."""

import json
from dataclasses import dataclass
from itertools import product

from kvlib.core.method import whole
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.measures import MEASURES, PROTOCOLS
from kvlib.lab.results import origins

BUDGETS = (0.1, 0.2, 0.5)  # 5 and 80 % only where a claim needs them
FEWER = 4  # which part of the samples is for configurations that decide nothing
FULL = Configuration("full", 1.0)


@dataclass(frozen=True)
class Study:
    """What one result table holds: configurations on the same samples of every task, for every model.

    length: tokens of prompt and answer. models: name -> samples per task, or all of a task that has fewer; sample n has
    the seed n, for every model.
    configurations: those that decide a claim; fewer: others, on the first quarter of the samples. measure: what is
    measured, one of `kvlib.lab.evaluation.measures.MEASURES`; protocol: one of those that the measure knows.
    """

    tasks: tuple[str, ...]
    length: int
    configurations: tuple[Configuration, ...]
    models: dict[str, int]
    protocol: str = "asked"
    fewer: tuple[Configuration, ...] = ()
    measure: str = "answers"

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r}: {' or '.join(MEASURES)}")
        for task in self.tasks:
            self.find(task)
        for configuration in self.everything:
            configuration.make()
        if len(set(self.everything)) < len(self.everything):
            raise ValueError("a configuration twice")
        if self.protocol not in (known := PROTOCOLS[self.measure]):
            raise ValueError(f"protocol={self.protocol!r}: {' or '.join(known)}")
        if not (self.models and all(whole(samples, 1) for samples in self.models.values())):
            raise ValueError(f"models={self.models!r}: a whole number of samples >= 1 for at least one model")

    @property
    def everything(self) -> tuple[Configuration, ...]:
        return self.configurations + self.fewer

    def find(self, task: str):
        """A task and where its samples come from. Raises ValueError with the nearest name."""
        return origins.find(self.measure, task)

    def samples(self, model: str, task: str, configuration: Configuration) -> int:
        """On how many samples of a task a configuration is measured."""
        return self.size(model, task) // (FEWER if configuration in self.fewer else 1)

    def size(self, model: str, task: str) -> int:
        """How many samples of a task there are for a model."""
        return min(self.models[model], self.find(task).samples)

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return sum(self.samples(*cell) for cell in product(self.models, self.tasks, self.everything))


def samples_of(study: Study) -> int:
    """All of them: of every task, for every model."""
    return sum(study.size(*each) for each in product(study.models, study.tasks))


def with_arguments(method: str, budgets, **arguments) -> tuple[Configuration, ...]:
    """A method with the same arguments at every budget."""
    return tuple(Configuration(method, budget, json.dumps(arguments)) for budget in budgets)


def others(*methods, beside: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
    """Every method, a name or `(name, arguments)`, at `BUDGETS`, but for configurations that are there already."""
    named = ((method, {}) if isinstance(method, str) else method for method in methods)
    cells = (c for method, arguments in named for c in with_arguments(method, BUDGETS, **arguments))
    return tuple(c for c in cells if c not in beside)
