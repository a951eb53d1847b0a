"""What measures share that feed prompts' last tokens one by one: cutting them off, costs of a step, rows of a table."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL, MEASURED
from kvlib.lab.evaluation.prompts import Compressed, Prompts, device_name, padded, read_per_row
from kvlib.lab.tasks import Prompt


def divided(model, tokenizer, drawn: list[Prompt], steps: int) -> tuple[Prompts, torch.Tensor]:
    """Prompts without their last tokens, padded on the left, and these tokens `(batch, steps)`.

    Raises:
        ValueError: for a prompt of no more tokens than these.
    """
    rows = [[token for part in prompt.ids(tokenizer) for token in part] for prompt in drawn]
    if (shortest := min(map(len, rows))) <= steps:
        raise ValueError(f"a prompt of {shortest} tokens: the last {steps} are fed one by one, and one has to be read")
    ids, mask = padded(rows, model.device)
    return Prompts(model, ids[:, :-steps], mask[:, :-steps]), ids[:, -steps:]


def costs(method, prompts: Prompts, read: Compressed) -> dict[str, list]:
    """Columns of `kvlib.lab.evaluation.evaluate` that say what a method costs, one entry per prompt.

    To be called behind the first decode step: readers work out then what a prompt allows, and it is their bytes that
    read_bytes tells.
    """
    return {
        "stored_bytes": read.stored,
        "read_bytes": read_per_row(read.run.cache) if method.hooks("attend") else read.stored,
        "full_bytes": read.full,
        "prefill_flops": [math.nan] * len(read.stored) if method.own_prefill else prompts.flops,
        "clamped": read.run.clamped_rows.tolist(),
    }


def table(
    begin: Callable,
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str,
    block: int,
    progress: Callable,
) -> pd.DataFrame:
    """One row per sample and configuration, with the columns of `kvlib.lab.evaluation.evaluate`.

    Args:
        begin: the prompts of a block -> a function of a method that gives the columns `MEASURED`, one entry per prompt.
        The others as there.
    """
    samples, rows = list(samples), []
    for numbers in progress([samples[i : i + block] for i in range(0, len(samples), block)]):
        score = begin([tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers])
        for configuration in configurations:
            columns = score(configuration.make())
            rows += [
                {**asdict(configuration), "sample": number, **dict(zip(columns, cells))}
                for number, *cells in zip(numbers, *columns.values())
            ]
    made = pd.DataFrame(rows).assign(
        model=name, task=task, length=length, protocol=protocol, torch=torch.__version__, device=device_name(model)
    )
    return made[[*CELL, "sample", *MEASURED, "torch", "device"]]


def check_protocol(protocol: str, known: Iterable[str]) -> None:
    if protocol not in known:
        raise ValueError(f"protocol={protocol!r}: {' or '.join(known)}")
