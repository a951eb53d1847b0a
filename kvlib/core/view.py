"""What a method sees of one layer in one forward pass."""

import copy
from dataclasses import dataclass, field

import torch

from kvlib.core import attention
from kvlib.core.cache import KVLayer


@dataclass
class Step:
    """One forward pass, shared by all layers.

    Attributes:
        index: 0 while the prompt is read, then 1, 2, ... for the tokens decoded after it.
        ends_prompt: this pass brings the last tokens of the prompt.
        seen: columns seen after this pass, padding included.
        positions: `(batch, new)` index of each new token among its row's real tokens, -1 for padding.
        counts: `(batch,)` on the CPU, real tokens of this pass.
        tokens, prompt_tokens: `(batch,)` on the CPU, real tokens per row after this pass, and at the end of the prompt
            (while a prompt is read: so far).
        columns: `(batch, kept)` columns still in the residual stream if `before_layer` has shortened it, else None.
        shared: free space for what a method carries from layer to layer.
        sums: what was already summed over queries, by (function, layers of queries and keys, last queries).
        view: the latest layer's view.
    """

    index: int
    ends_prompt: bool
    seen: int
    positions: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    prompt_tokens: torch.Tensor
    columns: torch.Tensor | None = None
    shared: dict = field(default_factory=dict)
    sums: dict = field(default_factory=dict)
    view: "View | None" = None

    @property
    def decoding(self) -> bool:
        return self.index > 0


class View:
    """One layer after the new tokens were stored and before anything is evicted.

    Attributes:
        query: `(batch, query_heads, new, head_dim)`, rotated; query_positions: `(batch, new)`, -1 = padding.
        key, value: rectangles `(batch, kv_heads, slots, head_dim)` of everything stored, in text order, keys rotated.
        positions: `(batch, kv_heads, slots)` index among the row's real tokens, -1 = empty slot.
        new_key, new_value: `(batch, kv_heads, new, head_dim)`, the tokens of this pass, padding included.
        lengths: `(batch, kv_heads)` on the CPU, stored tokens.
        tokens, prompt_tokens: `(batch,)` on the CPU, real tokens seen so far, and at the end of the latest prompt.
        state: name -> rectangle `(batch, kv_heads, slots, ...)`. Whatever a method puts here stays with its tokens:
            it is evicted with them and starts at 0 for new ones.
        reads: `(batch,)` on the CPU, bytes of K and V that `attend` read; set by methods that read less than is stored.
        layer_idx, groups (query heads per KV head), scaling, step, run, module (the attention module).
    """

    def __init__(self, run, layer: KVLayer, module, query, key, value, scaling, dropout):
        step = run.step
        self.run, self.module, self.step = run, module, step
        self.new_key, self.new_value = key, value
        self.query, self.scaling, self.dropout = query, scaling, dropout
        self.query_positions = step.positions.to(query.device)
        self.tokens, self.prompt_tokens = step.tokens, step.prompt_tokens
        self.reads = None
        self._open(layer, module.layer_idx)

    def _open(self, layer: KVLayer, layer_idx: int) -> None:
        self.layer, self.layer_idx, self.lengths = layer, layer_idx, layer.lengths
        self.groups = self.query.shape[1] // self.lengths.shape[1]
        self.intact = layer.intact  # False in `other` once that layer has evicted: the new tokens may be gone
        self.uniform = self.intact and layer.uniform and bool((self.step.counts == self.query.shape[2]).all())
        self.key, self.value = layer.rectangles(layer.keys, layer.values)
        self._original = self.query, self.key, self.value
        self.positions = layer.position_rectangle()
        self.state = dict(zip(layer.state, layer.rectangles(*layer.state.values()), strict=True))

    def column_sums(self, last=None) -> torch.Tensor:
        """Attention received by every stored token, `(batch, kv_heads, group, slots)`, float32 or better.

        Args:
            last: None sums over the queries of this forward pass. A number, or `(batch,)` numbers, sums over so many of
                the prompt's last queries, wherever chunks were cut.

        Raises:
            ValueError: if `last` exceeds the `window` that the method declares; if the layer has already evicted.
        """
        return self._over_queries("column_sums", (self.key,), last)

    def eviction_errors(self, last=None) -> torch.Tensor:
        """How far a query's output moves if one stored token alone is evicted, summed as `column_sums` sums."""
        return self._over_queries("eviction_errors", (self.key, self.value), last)

    def _over_queries(self, name: str, stored: tuple, last) -> torch.Tensor:
        """The function `name` of `kvlib.core.attention` over the queries that `last` means, with what is stored."""
        if not self.intact:
            raise ValueError(f"layer {self.layer_idx} has already evicted; its column sums are known before that only")

        last = None if last is None else torch.as_tensor(last).expand(len(self.tokens))
        longest = 0 if last is None else int(last.max())
        if longest > self.run.method.window:
            raise ValueError(f"last={longest}: the method declares window={self.run.method.window} queries")
        # kept: sums over all queries cost as much as the attention itself, and a snapshot serves many methods
        changed = any(x is not y for x, y in zip((self.query, self.key, self.value), self._original))
        place = (name, self.module.layer_idx, self.layer_idx, None if last is None else tuple(last.tolist()))
        if not changed and place in self.step.sums:
            return self.step.sums[place].clone()
        query, positions, uniform = self.query, self.query_positions, self.uniform
        if last is not None:
            query, positions = self.recent_queries(longest)
            start = (self.tokens - last).to(positions.device)[:, None]
            positions = positions.where(positions >= start, -1)
            # what earlier chunks have left may be padding
            uniform = uniform and bool((last == longest).all()) and query.shape[2] <= self.query.shape[2]
        where = (None, None) if uniform else (positions, self.positions)
        sums = getattr(attention, name)(query, *stored, *where, self.scaling)
        if not changed:
            self.step.sums[place] = sums.clone()
        return sums

    def recent_queries(self, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's last queries `(batch, query_heads, <= last, head_dim)` and their positions, across chunks."""
        query, positions = self.query, self.query_positions
        if self.layer.queries is not None:
            query = torch.cat([self.layer.queries[0], query], dim=2)
            positions = torch.cat([self.layer.queries[1], positions], dim=1)
        return query[:, :, -last:], positions[:, -last:]

    def protect(self, score: torch.Tensor, first=0, last=0) -> torch.Tensor:
        """`score` with the first and the last real tokens of every row raised to infinity.

        Args:
            score: `(batch, kv_heads, slots)`; first, last: tokens, numbers or `(batch,)`.
        """
        first, last = (torch.as_tensor(x).expand(len(self.tokens)) for x in (first, last))
        start = (self.tokens - last).to(score.device)[:, None, None]
        inside = (self.positions < first.to(score.device)[:, None, None]) | (self.positions >= start)
        return score.masked_fill(inside, torch.inf)

    def clamp(self, name: str, value, low=None, high=None) -> torch.Tensor:
        """`value`, a number or `(batch,)`, brought into what this prompt allows; a change is noted in `run.clamped`.

        Where the bounds contradict each other the lower one holds.
        """
        value = torch.as_tensor(value).expand(len(self.tokens))
        inside = value if high is None else torch.minimum(value, torch.as_tensor(high))
        inside = inside if low is None else torch.maximum(inside, torch.as_tensor(low))
        if not torch.equal(inside, value):
            self.run.clamped[name] = inside
            self.run.clamped_rows = self.run.clamped_rows | (inside != value)
        return inside

    def other(self, layer_idx: int) -> "View":
        """This view with the keys, values, positions and state of another layer, which has already run in this pass."""
        view = copy.copy(self)
        view._open(self.run.cache.layers[layer_idx], layer_idx)
        return view
