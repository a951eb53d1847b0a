"""What the `paper` profile measures on real benchmarks, for any model."""

from dataclasses import dataclass

from kvlib.lab.evaluation.benchmarks import choices, ruler
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.study import FULL, with_arguments

PLAIN = ("h2o", "snapkv", "uncomp", "kvzip", "tidaldecode")
WINDOW = 10**9  # tokens: what fits into the model's window


@dataclass(frozen=True)
class PaperStudy:
    """Configurations on the same samples of every task. length: the most tokens of a prompt, cut in its middle."""

    tasks: tuple[str, ...]
    length: int
    configurations: tuple[Configuration, ...]


def field(*budgets: float) -> tuple[Configuration, ...]:
    """The full cache, the four papers' methods that need no training, and what they are compared with."""
    return (
        FULL,
        *(Configuration(name, budget) for name in PLAIN for budget in budgets),
        *with_arguments("vatp", budgets, host="h2o"),
    )


UNCOMP_SHARE = 0.0474  # 384 of 8 096 tokens
STUDIES = {
    "longbench": PaperStudy(  # cut for Llama 3 as in Zefan-Cai/KVCache-Factory before 485af3c, then 7 500
        tuple(f"longbench/{name}" for name in LONGBENCH), 7950, field(UNCOMP_SHARE, 0.5)
    ),
    "longbench_e": PaperStudy(  # VATP's authors take 13 of their 16 tasks from this edition, cut so for Llama 2
        tuple(f"longbench/{name}_e" for name, task in LONGBENCH.items() if task.samples_e), 3500, field(0.5)
    ),
    "longbench_v2": PaperStudy(("longbench-v2",), choices.LONGEST, field(0.2, 0.5)),
    **{
        f"ruler_{length // 1024}k": PaperStudy(tuple(f"ruler/{name}" for name in ruler.TASKS), length, field(0.2, 0.5))
        for length in (4096, 8192, 16384, 32768)
    },
    "code": PaperStudy(("humaneval", "humaneval+", "mbpp"), WINDOW, field(0.5)),
}
