"""What the result tables hold: for each study its configurations, tasks, models and numbers of samples."""

import json
from dataclasses import dataclass

import kvlib
from kvlib.lab import tasks
from kvlib.registry import whole

PROTOCOLS = ("prompt", "decoded")  # see kvlib.lab.evaluate
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Configuration:
    """A method, its budget and, as JSON, its other arguments: what identifies a cell of a table."""

    method: str
    budget: float
    arguments: str = "{}"

    def make(self):
        return kvlib.method(self.method, budget=self.budget, **json.loads(self.arguments))


@dataclass(frozen=True)
class Study:
    """What one result table holds: every configuration on the same samples of every task, for every model.

    length: tokens of prompt and answer. models: name -> samples per task; sample n has the seed n, for every model.
    """

    tasks: tuple[str, ...]
    length: int
    configurations: tuple[Configuration, ...]
    models: dict[str, int]
    protocol: str = "prompt"

    def __post_init__(self):
        for task in self.tasks:
            tasks.find(task)
        for configuration in self.configurations:
            configuration.make()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r}: {' or '.join(PROTOCOLS)}")
        if not (self.models and all(whole(samples, 1) for samples in self.models.values())):
            raise ValueError(f"models={self.models!r}: a whole number of samples >= 1 for at least one model")


STUDIES = {
    "00_kv_cache": Study(
        tasks=(*tasks.FAMILIES, *tasks.COMPLETIONS),
        length=2048,
        configurations=(
            Configuration("full", 1.0),
            *(Configuration(m, b) for m in ("random", "streaming_llm", "h2o", "snapkv", "knorm") for b in BUDGETS),
            *(Configuration("streaming_llm", b, '{"renumber": false}') for b in BUDGETS),
            Configuration("streaming_llm", 0.2, '{"sinks": 0}'),
            Configuration("knorm", 0.5),
            # a number is five one-digit tokens, more than half of the default kernel of 7 reaches
            *(Configuration("snapkv", b, '{"kernel": 15}') for b in BUDGETS),
        ),
        models={"minilm": 200, "minilm-gqa": 200},
    ),
}
