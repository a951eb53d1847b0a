"""Which of the tokens with the highest attention a method reads, with the hidden states of full attention.

The last `STEPS` tokens of a prompt come one by one. In every layer the method selects as it does when it decodes, but
the layer then attends to everything: hidden states, keys and values are those of the full cache, so that no layer's
choice suffers from earlier layers' mistakes.

A layer that reads sparsely has for each query head a set S of slots; T is the set of as many slots with the highest
attention of that head. Recall is the share of T that is in S, mass the attention that S holds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import pandas as pd
import torch

from kvlib.core import attention
from kvlib.core.method import Reader, strongest
from kvlib.core.view import View
from kvlib.lab.evaluation.blockwise import check_protocol, costs, divided, table
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, check_window
from kvlib.lab.evaluation.prompts import Prompts, compressed, window_of
from kvlib.lab.tasks import Prompt
from kvlib.methods.baselines import Full

PROTOCOLS = ("dense steps",)
STEPS = 4  # tokens


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

    value: recall; agreement: mass; means over steps, query heads and the layers that read sparsely, 1 for a method that
        reads everything in all layers. divergence: NaN. read_bytes: what the method would read in the first of the
        steps, what choosing reads included.

    Raises:
        ValueError: as there; for methods that are neither full nor readers.
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    for configuration in configurations:
        if not isinstance(configuration.make(), Reader | Full):
            raise ValueError(f"{configuration.method}: recall is of methods that select what they read, or of full")

    def begin(drawn: list[Prompt]) -> Callable:
        prompts, last = divided(model, tokenizer, drawn, STEPS)
        return lambda method: score(method, prompts, last)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


def score(method, prompts: Prompts, last: torch.Tensor) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    found = by_layer(method, prompts, last)
    value, mass = (x.nanmean(1).nan_to_num(1.0).tolist() for x in (found.recall, found.mass))
    return {"value": value, "divergence": [math.nan] * len(value), "agreement": mass, **found.costs}


@dataclass(frozen=True)
class Found:
    """recall, mass: `(batch, layers)` in float64, NaN for layers that read everything; costs: columns of a table."""

    recall: torch.Tensor
    mass: torch.Tensor
    costs: dict[str, list]


@torch.no_grad()
def by_layer(method, prompts: Prompts, last: torch.Tensor) -> Found:
    """Recall and mass of every layer, means over steps and query heads.

    Args:
        prompts, last: as `kvlib.lab.evaluation.blockwise.divided` cuts them; last: ids `(batch, steps)`.
    """
    seen: list[tuple[int, torch.Tensor]] = []
    with compressed(prompts, watched(method, seen) if isinstance(method, Reader) else method) as read:
        for step, tokens in enumerate(last.split(1, dim=1)):
            read.feed(tokens)
            if step == 0:
                found = costs(method, prompts, read)
    made = torch.full((2, len(last), len(read.run.cache.layers)), math.nan, dtype=torch.float64)
    for layer in {layer for layer, _ in seen}:
        made[:, :, layer] = torch.stack([pair for index, pair in seen if index == layer]).mean(0)
    return Found(*made, found)


def watched(method: Reader, seen: list) -> Reader:
    """The method, but every layer attends to everything; notes in `seen` what each selects, by `caught`."""

    class Watched(type(method)):
        def attend(self, view):
            slots = self.select(view) if view.step.decoding and not self.everything else None
            if slots is not None:
                view.gathered(slots)  # so that its bytes count
                seen.append((view.layer_idx, caught(view, slots)))
            return attention.attend(view)

    return Watched(**{field.name: getattr(method, field.name) for field in fields(method)})


def caught(view: View, slots: torch.Tensor) -> torch.Tensor:
    """Recall and mass of slots `(batch, kv_heads or query_heads, k)`, means over heads, `(2, batch)` on the CPU."""
    weights = view.weights.flatten(1, 2)  # (batch, query_heads, slots)
    positions = view.positions.repeat_interleave(view.groups, dim=1)
    slots = slots.repeat_interleave(weights.shape[1] // slots.shape[1], dim=1)
    *shape, width = weights.shape
    chosen = torch.zeros(*shape, width + 1, dtype=torch.bool, device=view.device)
    chosen = chosen.scatter(-1, slots.where(slots >= 0, width), True)[..., :width]
    count = chosen.sum(-1)
    best = strongest(weights, positions, count)
    recall = (chosen & best).sum(-1).double() / count
    mass = (weights * chosen).sum(-1).double()
    return torch.stack([recall.mean(1), mass.mean(1)]).cpu()
