"""What the result tables hold: for each study its configurations, tasks, models and numbers of samples."""

import json
from dataclasses import dataclass

from kvlib.core.method import whole
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration

PROTOCOLS = ("prompt", "decoded")  # see kvlib.lab.evaluation.evaluate
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
HOSTS = ("h2o", "scissorhands", "snapkv")


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


def samples_of(study: Study) -> int:
    """All of them: of every task, for every model."""
    return len(study.tasks) * sum(study.models.values())


def with_arguments(method: str, budgets, **arguments) -> tuple[Configuration, ...]:
    """A method with the same arguments at every budget."""
    return tuple(Configuration(method, budget, json.dumps(arguments)) for budget in budgets)


def on_host(host: str) -> tuple[Configuration, ...]:
    """A host, alone and with each importance of `kvlib.methods.vatp`; then other norms and other numbers of sinks."""
    budgets, ablated = (*BUDGETS, 0.5), (0.05, 0.2, 0.5)
    scores = ("forced_sinks", "vatp", "exact_error", "output_norm")
    return (
        *with_arguments(host, budgets),
        *(c for score in scores for c in with_arguments(score, budgets, host=host)),
        *(c for norm in ("l2", "linf") for c in with_arguments("vatp", ablated, host=host, norm=norm)),
        *(c for sinks in (0, 1, 4) for c in with_arguments("vatp", ablated, host=host, sinks=sinks)),
        *(c for score in scores[2:] for c in with_arguments(score, ablated, host=host, sinks=20)),
    )


VALUES = (
    Configuration("full", 1.0),
    *(configuration for host in HOSTS for configuration in on_host(host)),
    *with_arguments("tova", (*BUDGETS, 0.5)),
)
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
        models={"minilm": 200},
    ),
    "01_vatp": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=VALUES,
        models={"minilm": 200},
    ),
    "01_vatp_lines": Study(
        tasks=("next_line",),
        length=2048,
        configurations=VALUES,
        models={"minilm": 100},
    ),
    # token by token, which takes ten times as long as an answer; for the claims about H2O
    "01_vatp_bits": Study(
        tasks=("code_bits",),
        length=2048,
        configurations=(Configuration("full", 1.0), *on_host("h2o")),
        models={"minilm": 100},
    ),
}
