"""What methods store of a prompt if the model runs in bfloat16, as models are used.

Tables of answers are made in float32, so that they can be recomputed elsewhere, and of a cache in 8 bits four times as
much fits into one of float32. What is compared with codes is measured here.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch

from kvlib.lab.evaluation.blockwise import check_protocol, costs, divided, table
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, check_window
from kvlib.lab.evaluation.prompts import Prompts, compressed, window_of
from kvlib.lab.tasks import Prompt

PROTOCOLS = ("bfloat16",)


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = PROTOCOLS[0],
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    value: stored_bytes as a share of full_bytes, both of a copy of the model in bfloat16 that has read the prompt but
        for its last token. read_bytes: of that token. divergence, agreement: NaN.

    Raises:
        ValueError: as there.
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    half = copy.deepcopy(model).bfloat16()

    def begin(drawn: list[Prompt]) -> Callable:
        prompts, last = divided(half, tokenizer, drawn, 1)
        return lambda method: score(method, prompts, last)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def score(method, prompts: Prompts, last: torch.Tensor) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    with compressed(prompts, method) as read:
        read.feed(last)
        found, none = costs(method, prompts, read), [math.nan] * len(last)
    shares = [stored / full for stored, full in zip(found["stored_bytes"], found["full_bytes"])]
    return {"value": shares, "divergence": none, "agreement": none, **found}
