"""What the result tables hold: for each study its configurations, tasks, models and numbers of samples."""

import json
from dataclasses import dataclass

from kvlib.core.method import whole
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import PROTOCOLS
from kvlib.lab.evaluation.measures import MEASURES

BUDGETS = (0.1, 0.2, 0.5)  # 5 and 80 % only where a claim needs them
HOSTS = ("h2o", "scissorhands", "snapkv")
FEWER = 4  # which part of the samples is for configurations that decide nothing
FULL = Configuration("full", 1.0)


@dataclass(frozen=True)
class Study:
    """What one result table holds: configurations on the same samples of every task, for every model.

    length: tokens of prompt and answer. models: name -> samples per task; sample n has the seed n, for every model.
    configurations: those that decide a claim; fewer: others, on the first quarter of the samples. measure: what is
    measured, one of `kvlib.lab.evaluation.measures.MEASURES`.
    """

    tasks: tuple[str, ...]
    length: int
    configurations: tuple[Configuration, ...]
    models: dict[str, int]
    protocol: str = "asked"
    fewer: tuple[Configuration, ...] = ()
    measure: str = "answers"

    def __post_init__(self):
        for task in self.tasks:
            tasks.find(task)
        for configuration in self.everything:
            configuration.make()
        if len(set(self.everything)) < len(self.everything):
            raise ValueError("a configuration twice")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r}: {' or '.join(PROTOCOLS)}")
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r}: {' or '.join(MEASURES)}")
        if not (self.models and all(whole(samples, 1) for samples in self.models.values())):
            raise ValueError(f"models={self.models!r}: a whole number of samples >= 1 for at least one model")

    @property
    def everything(self) -> tuple[Configuration, ...]:
        return self.configurations + self.fewer

    def samples(self, model: str, configuration: Configuration) -> int:
        """On how many samples of a task a configuration is measured."""
        return self.models[model] // (FEWER if configuration in self.fewer else 1)

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return len(self.tasks) * sum(self.samples(m, c) for m in self.models for c in self.everything)


def samples_of(study: Study) -> int:
    """All of them: of every task, for every model."""
    return len(study.tasks) * sum(study.models.values())


def with_arguments(method: str, budgets, **arguments) -> tuple[Configuration, ...]:
    """A method with the same arguments at every budget."""
    return tuple(Configuration(method, budget, json.dumps(arguments)) for budget in budgets)


def others(*methods, beside: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
    """Every method, a name or `(name, arguments)`, at `BUDGETS`, but for configurations that are there already."""
    named = ((method, {}) if isinstance(method, str) else method for method in methods)
    cells = (c for method, arguments in named for c in with_arguments(method, BUDGETS, **arguments))
    return tuple(c for c in cells if c not in beside)


SCORES = ("forced_sinks", "vatp", "exact_error", "output_norm")
METHODS = (
    "random", "streaming_llm", "h2o", "scissorhands",
    "snapkv", ("snapkv", {"window": 64, "kernel": 5, "pooling": "avg"}),
    ("snapkv", {"window": 8, "kernel": 15}),  # tuned: chosen on eight prompts of `number`, of 1 024 tokens
    "pyramidkv", "tova", "knorm", ("knorm", {"recent": 32}),
)  # fmt: skip
BASELINES = (  # which decide claims
    FULL,
    *(Configuration(m, b) for m in ("random", "streaming_llm", "h2o", "snapkv") for b in (0.05, 0.2, 0.8)),
    *(Configuration("knorm", b) for b in (0.1, 0.5, 0.8)),
    Configuration("snapkv", 0.05, '{"kernel": 15}'),
    Configuration("streaming_llm", 0.2, '{"renumber": false}'),
    Configuration("streaming_llm", 0.2, '{"sinks": 0}'),
)
VALUES = (  # likewise
    *with_arguments("h2o", (0.05, 0.1, 0.2, 0.5, 0.8)),
    *with_arguments("vatp", (0.05, 0.1, 0.2, 0.5, 0.8), host="h2o"),
    *(c for norm in ("l2", "linf") for c in with_arguments("vatp", (0.5,), host="h2o", norm=norm)),
    *with_arguments("vatp", (0.5,), host="h2o", sinks=0),
    *with_arguments("exact_error", (0.2,), host="h2o"),
    *with_arguments("exact_error", (0.2,), host="h2o", sinks=20),
    *with_arguments("output_norm", (0.5,), host="h2o", sinks=20),
    Configuration("scissorhands", 0.5),
    *with_arguments("vatp", (0.05, 0.2, 0.5), host="scissorhands"),
    *with_arguments("snapkv", (0.05, 0.2, 0.5)),
    *with_arguments("vatp", (0.05, 0.2, 0.5), host="snapkv"),
    *with_arguments("vatp", (0.05, 0.2), host="snapkv", sinks=0),
    *(c for host in HOSTS for c in with_arguments("forced_sinks", (0.05, 0.2, 0.5), host=host)),
)
ON_HOSTS = (*HOSTS, *((score, {"host": host}) for host in HOSTS for score in SCORES))
LATER = (FULL, Configuration("h2o", 0.2), Configuration("snapkv", 0.2))
ANSWERED, READ = tuple(tasks.NATURAL), tuple(tasks.LABEL_FREE)
ABLATED = tuple(
    c
    for host in HOSTS
    for arguments in ({"norm": "l2"}, {"norm": "linf"}, {"sinks": 0}, {"sinks": 1}, {"sinks": 4})
    for c in with_arguments("vatp", (0.2, 0.5), host=host, **arguments)
    if c not in VALUES
)
STUDIES = {
    "00_real": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=BASELINES,
        fewer=others(*METHODS, beside=BASELINES),
        models={"smollm2": 100},
    ),
    "00_real_texts": Study(
        tasks=READ,
        length=2048,
        configurations=(*BASELINES, *others(*METHODS, beside=BASELINES)),
        models={"smollm2": 50},
    ),
    "00_real_later": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=LATER,
        fewer=tuple(c for c in others(*METHODS, beside=LATER) if c.budget > 0.1),
        models={"smollm2": 100},
        protocol="later",
    ),
    "00_real_4096": Study(
        tasks=ANSWERED,
        length=4096,
        configurations=(
            FULL,
            *(
                Configuration(m, b)
                for m in ("random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "tova", "knorm")
                for b in (0.2, 0.5)
            ),
        ),
        models={"smollm2": 50},
    ),
    "01_real": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=VALUES,
        fewer=others(*ON_HOSTS, beside=VALUES),
        models={"smollm2": 100},
    ),
    "01_real_sinks": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=(FULL,),
        models={"smollm2": 10},
        measure="sinks",
    ),
    "01_real_texts": Study(
        tasks=READ,
        length=2048,
        configurations=(*VALUES, *others(*ON_HOSTS, beside=VALUES)),
        models={"smollm2": 40},
    ),
    "00_kv_cache": Study(
        tasks=(*tasks.FAMILIES, "code_bits"),
        length=2048,
        configurations=BASELINES,
        fewer=others(*METHODS, beside=BASELINES),
        models={"minilm": 200},
    ),
    "01_vatp": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=(FULL, *VALUES),
        fewer=(*others(*ON_HOSTS, beside=VALUES), *ABLATED),
        models={"minilm": 200},
    ),
    "01_vatp_bits": Study(
        tasks=("code_bits",),
        length=2048,
        configurations=(FULL, *VALUES),
        models={"minilm": 100},
    ),
}
