"""How small the values of attention sinks are: a number for every prompt, in the columns of `evaluate`."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch

from kvlib.core.attention import column_sums
from kvlib.core.snapshot import Snapshot
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, CELL, MEASURED, check_window, prepare
from kvlib.lab.evaluation.prompts import compressed, device_name, window_of

LAST = 128  # queries
SHARE = 0.3  # of their attention: a head in which the first token takes as much has a sink


@torch.no_grad()
def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = "asked",
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`; value: `sink_value`.

    Raises:
        ValueError: as there, and for a method other than full.
    """
    if {configuration.method for configuration in configurations} != {"full"}:
        raise ValueError("sinks are measured with the full cache")
    check_window(window_of(model), length)
    samples, rows = list(samples), []
    for numbers in progress([samples[i : i + block] for i in range(0, len(samples), block)]):
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        prompts, _ = prepare(model, tokenizer, drawn, protocol)
        values = sink_value(prompts.snapshot).tolist()
        for configuration in configurations:
            with compressed(prompts, configuration.make()) as read:
                columns = zip(numbers, values, read.stored, read.full, prompts.flops, read.clamped)
            rows += [
                asdict(configuration)
                | dict(zip(("sample", *MEASURED), (number, value, math.nan, math.nan, stored, stored, full, *rest)))
                for number, value, stored, full, *rest in columns
            ]
    table = pd.DataFrame(rows).assign(
        model=name, task=task, length=length, protocol=protocol, torch=torch.__version__, device=device_name(model)
    )
    return table[[*CELL, "sample", *MEASURED, "torch", "device"]]


def sink_value(snapshot: Snapshot) -> torch.Tensor:
    """The 1-norm of the first token's value over the median of the prompt's, `(batch,)` in float64.

    The median over all query heads of all layers with a sink, in which the first token takes `SHARE` of the attention
    of the last `LAST` queries; each is compared with the values of its own layer and head. NaN if there is none.
    """
    found = []
    for query, key, value, scaling in snapshot.layers:
        last = query[:, :, -LAST:]
        asked = snapshot.positions[:, -last.shape[2] :]
        real = snapshot.positions >= 0
        first = real.int().argmax(1)  # of each row
        places = snapshot.positions[:, None].expand(-1, key.shape[1], -1)
        sums = column_sums(last, key, asked, places, scaling)  # (batch, kv_heads, group, tokens)
        share = at(sums, first) / (asked >= 0).sum(1)[:, None, None]
        norms = value.abs().sum(-1, dtype=torch.float64)
        median = norms.masked_fill(~real[:, None], math.nan).nanquantile(0.5, dim=-1)
        ratio = (at(norms, first) / median)[..., None].expand_as(share)
        found.append(ratio.masked_fill(share < SHARE, math.nan).flatten(1))
    return torch.cat(found, dim=1).nanquantile(0.5, dim=1)


def at(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`x` `(batch, ..., tokens)` at one token of each row, `(batch, ...)`."""
    return x[torch.arange(len(x), device=x.device), ..., place]
