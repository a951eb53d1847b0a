"""What the `paper` profile measures on published data, for any model; no table of it is committed.

Their model is the real one unless another is named, as `kvlib.lab.sweeps` does.
"""

from kvlib.lab.evaluation.benchmarks import choices, programs, ruler
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.study import FULL, Study, with_arguments

PLAIN = ("h2o", "snapkv", "uncomp", "kvzip", "tidaldecode")
WINDOW = 10**9  # tokens: what fits into the model's window
UNCOMP_SHARE = 0.0474  # 384 of 8 096 tokens


def field(*budgets: float) -> tuple[Configuration, ...]:
    """The full cache, the four papers' methods that need no training, and what they are compared with."""
    return (
        FULL,
        *(Configuration(name, budget) for name in PLAIN for budget in budgets),
        *with_arguments("vatp", budgets, host="h2o"),
    )


def published(tasks, length: int, configurations: tuple[Configuration, ...], samples: int = 503) -> Study:
    """All samples of the tasks, of which none has more than 503. length: of a prompt, which loses its middle."""
    return Study(tuple(tasks), length, configurations, {"smollm2": samples}, measure="benchmarks")


STUDIES = {
    "longbench": published(  # cut for Llama 3 as in Zefan-Cai/KVCache-Factory before 485af3c, then 7 500
        (f"longbench/{name}" for name in LONGBENCH), 7950, field(UNCOMP_SHARE, 0.5)
    ),
    "longbench_e": published(  # VATP's authors take 13 of their 16 tasks from this edition, cut so for Llama 2
        (f"longbench/{name}_e" for name, task in LONGBENCH.items() if task.samples_e), 3500, field(0.5)
    ),
    "longbench_v2": published(["longbench-v2"], choices.LONGEST, field(0.2, 0.5)),
    **{
        f"ruler_{length // 1024}k": published(  # published are 500 samples: `scripts/config_tasks.sh` of NVIDIA/RULER
            (f"ruler/{name}" for name in ruler.TASKS), length, field(0.2, 0.5), samples=100
        )
        for length in (4096, 8192, 16384, 32768)
    },
    "code": published(programs.TASKS, WINDOW, field(0.5)),
    **{
        f"pg19_{length // 1024}k": Study(("pg19",), length, field(0.2, 0.5), {"smollm2": 100})  # each book once
        for length in (2048, 8192, 32768)
    },
}
