"""Prompts that many methods read at the cost of one prefill: what `evaluate` and `perplexity` share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

import kvlib
from kvlib.core.run import Run
from kvlib.core.snapshot import Snapshot


@dataclass
class Prompts:
    """A batch for one model, padded on the left. ids: `(batch, tokens)`. mask: the same, 1 = real; None if all are."""

    model: torch.nn.Module
    ids: torch.Tensor
    mask: torch.Tensor | None = None

    @cached_property
    def counts(self) -> list[int]:
        """Real tokens of each row."""
        return (torch.ones_like(self.ids) if self.mask is None else self.mask).sum(1).tolist()

    @cached_property
    def flops(self) -> list[int]:
        """Multiplications and additions of a dense prefill of each row."""
        return [prefill_flops(self.model, tokens) for tokens in self.counts]

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

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, tokens, vocabulary)` of a pass over the next ids `(batch, tokens)`."""
        return self.run.model(ids, past_key_values=self.run.cache).logits

    def follow(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` after more of the prompts, padded on the left: `Run.follow`."""
        return self.run.follow(ids, mask).logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows, the cache's others are dropped."""
        self.run.cache.batch_select_indices(rows)
        self.run.clamped_rows = self.run.clamped_rows[rows.cpu()]


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
        stored, full = stored_per_row(run.cache), full_per_row(run.cache)
        if sum(stored) != run.allocated_bytes():
            raise RuntimeError(f"segments add up to {sum(stored)} bytes, the storage has {run.allocated_bytes()}")
        yield Compressed(run, logits, stored, full, run.clamped_rows.tolist())


def padded(rows: Sequence[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(batch, tokens)` of rows that end together; 0 where a shorter one has not begun."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def stored_per_row(cache) -> list[int]:
    """Bytes of K and V of each row."""
    return sum(part.row_bytes() for part in cache.parts()).tolist()


def read_per_row(cache) -> list[int]:
    """Bytes of K and V read in the last pass: what is stored, unless the method reads sparsely."""
    stored = (sum(part.row_bytes() for part in layer.parts) for layer in cache.layers)
    return sum(s if layer.reads is None else layer.reads.cpu() for s, layer in zip(stored, cache.layers)).tolist()


def full_per_row(cache) -> list[int]:
    """Bytes of K and V of everything seen."""
    return (cache.tokens * sum(layer.lengths.shape[1] * layer.token_bytes for layer in cache.layers)).tolist()


def prefill_flops(model, tokens: int) -> int:
    """Multiplications and additions of a dense causal prefill: weights, q·k and a·v, and one row of logits."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - (1 if tied else 2) * embedding
    pairs = config.num_hidden_layers * config.num_attention_heads * tokens * (tokens + 1) // 2
    return 2 * weights * tokens + 4 * head_dim * pairs + 2 * embedding


@torch.no_grad()
def losses(feed: Callable, logits: torch.Tensor, targets: torch.Tensor, stepwise: bool) -> torch.Tensor:
    """Nats of each target `(batch, targets)`, in float32 or better; arguments as for `predictions`."""
    return torch.cat([nats(*pair) for pair in predictions(feed, logits, targets, stepwise)], dim=1)


def predictions(
    feed: Callable, logits: torch.Tensor, targets: torch.Tensor, stepwise: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits `(batch, tokens, vocabulary)` and the targets `(batch, tokens)` that they are about, inside an open block.

    Args:
        feed: ids `(batch, tokens)` -> logits of a pass over them. logits: `(batch, vocabulary)` before the targets.
        targets: ids `(batch, targets)`.
        stepwise: feed a token a pass instead of all but the last, which need not be fed, in one.
    """
    yield logits[:, None], targets[:, :1]
    size = 1 if stepwise else max(1, targets.shape[1] - 1)
    for begin in range(0, targets.shape[1] - 1, size):
        chunk = targets[:, begin : begin + size + 1]  # what is fed, and one more that is predicted
        yield feed(chunk[:, :-1]), chunk[:, 1:]


def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood `(batch, tokens)` of ids `(batch, tokens)` under logits `(batch, tokens, vocabulary)`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


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
