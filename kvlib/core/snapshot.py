"""One prefill, many methods: what the prompt leaves behind, before any method has touched it."""

from dataclasses import dataclass, field

import torch

from kvlib.core.method import Method
from kvlib.core.step import Step


@dataclass
class Snapshot:
    """Queries, keys and values of a prompt in every layer, and the logits after it.

    Attributes:
        layers: per layer `(query, key, value, scaling)`, `(batch, heads, tokens, head_dim)` each, rotated.
        ids, positions: `(batch, tokens)`, position -1 for padding. counts: `(batch,)` real tokens, on the CPU.
        logits: `(batch, vocabulary)` after the last token.
        sums: column sums that a method asked for; the next method need not compute them again.
    """

    layers: list
    ids: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    logits: torch.Tensor
    sums: dict = field(default_factory=dict)

    def step(self) -> Step:
        """The forward pass that read the prompt, to be replayed."""
        seen, counts = self.positions.shape[1], self.counts
        complete = bool((counts == seen).all())
        return Step(0, True, seen, self.positions, counts, counts, counts, complete, sums=self.sums)


@dataclass(frozen=True)
class Recorder(Method):
    """Full attention that notes queries, keys and values as they pass."""

    layers: list = field(default_factory=list)

    def attend(self, view):
        self.layers.append((view.query, view.new_key, view.new_value, view.scaling))
        return super().attend(view)


@torch.no_grad()
def snapshot(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Snapshot:
    """Read a prompt `(batch, tokens)`; `with method(model) as run: run.fork(snapshot)` starts any method from it."""
    recorder = Recorder()
    with recorder(model) as run:
        logits = model(input_ids, attention_mask=attention_mask, logits_to_keep=1).logits[:, -1]
    batch, tokens = input_ids.shape
    real = torch.ones(batch, tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    positions = (real.cumsum(1) - 1).where(real, -1).to(input_ids.device)
    return Snapshot(recorder.layers, input_ids, positions, run.cache.tokens, logits)
