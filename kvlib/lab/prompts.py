"""Prompts that many methods read at the cost of one prefill: what `evaluate` and `perplexity` share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

import kvlib
from kvlib.run import Run
from kvlib.snapshot import Snapshot


@dataclass
class Prompts:
    """A batch for one model, padded on the left. ids: `(batch, tokens)`. mask: the same, 1 = real; None if all are."""

    model: torch.nn.Module
    ids: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Real tokens of each row."""
        return (torch.ones_like(self.ids) if self.mask is None else self.mask).sum(1).tolist()

    @cached_property
    def snapshot(self) -> Snapshot:
        """The prefill that methods share, made when one asks for it."""
        return kvlib.snapshot(self.model, self.ids, self.mask)


@dataclass
class Compressed:
    """Prompts that a method has read, inside its open block.

    logits: `(batch, vocabulary)` after them. stored, full: bytes of K and V of each row, with the method and without.
    clamped: the rows in which the prompt forced a parameter of the method into range.
    """

    run: Run
    logits: torch.Tensor
    stored: list[int]
    full: list[int]
    clamped: list[bool]


@contextmanager
def compressed(prompts: Prompts, method) -> Iterator[Compressed]:
    """The method's block on the model, once the prompts have been read: from the snapshot if the method can."""
    snapshot = None if method.own_prefill else prompts.snapshot
    with method(prompts.model) as run:
        if snapshot is None:
            with torch.no_grad():
                logits = prompts.model(prompts.ids, attention_mask=prompts.mask, logits_to_keep=1).logits[:, -1]
        else:
            logits = snapshot.logits
            run.fork(snapshot)
        stored, full = bytes_per_row(run.cache, "lengths"), bytes_per_row(run.cache, "tokens")
        if sum(stored) != run.stored_bytes():
            raise RuntimeError(f"segments add up to {sum(stored)} bytes, the storage has {run.stored_bytes()}")
        yield Compressed(run, logits, stored, full, run.clamped_rows.tolist())


def bytes_per_row(cache, counts: str) -> list[int]:
    """K and V bytes of each row: `counts` is "lengths" for what is stored, "tokens" for everything seen."""
    total = 0
    for layer in cache.layers:
        per_token = sum(x.shape[1] * x.element_size() for x in (layer.keys, layer.values))
        tokens = layer.lengths.sum(1) if counts == "lengths" else layer.tokens * layer.lengths.shape[1]
        total = total + tokens * per_token
    return total.tolist()


def one_by_one(method) -> bool:
    """Whether what a method computes depends on tokens after the prompt coming one at a time."""
    if method.evicts and method.evicts_in_decode:
        return True
    return any(method.hooks(name) for name in ("attend", "before_layer", "on_token_ids"))


def window_of(model) -> int | None:
    """The longest text that the model was made for, if its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def device_name(model) -> str:
    """For the column `device`."""
    return torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
