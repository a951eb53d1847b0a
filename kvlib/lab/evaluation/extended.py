"""Tables of measures that have columns of their own beside those of all measures."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL, MEASURED
from kvlib.lab.evaluation.prompts import device_name


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
    extra: Sequence[str],
) -> pd.DataFrame:
    """One row per sample and configuration, with the columns of `kvlib.lab.evaluation.evaluate` and those of `extra`.

    Args:
        begin: the prompts of a block -> a function of a method that gives `MEASURED` and `extra`, one entry per prompt.
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
    return made[[*CELL, "sample", *MEASURED, *extra, "torch", "device"]]
