"""One layer of the cache: what it stores, and what transformers may ask of it."""

import torch
from transformers.cache_utils import DynamicLayer

from kvlib.core.part import Memo, Part


class Layer(DynamicLayer):
    """Keys, values and per-token state of one layer.

    Attributes:
        index: which layer of the model this is.
        tail: tokens as they arrive; all there are, unless a method moves some of them on.
        body: what a method has made of earlier tokens: encoded in groups, merged over layers, ... None if it has not.
            Two layers may have the same body, which is then stored once. It stands before the tail.
        rows: name -> `(batch, ...)`, what a method remembers per row: follows when rows are reordered or selected.
        token_bytes: native bytes of K and V of one token and head, whatever is made of them.
        queries: the last queries of an unfinished prompt `(batch, query_heads, <= window, head_dim)` with their
            positions `(batch, <= window)`, or None.
        reads: `(batch,)` bytes read in the last pass if a method reads less than what is stored, else None.
        accepting: a pass has begun, in which new tokens may come once.
    """

    is_croppable = False

    def __init__(self, index: int, memo: Memo):
        super().__init__()
        self.index, self.memo = index, memo
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tail: Part | None = None
        self.body: Part | None = None
        self.rows: dict[str, torch.Tensor] = {}
        self.token_bytes = 0
        self.queries = self.reads = None
        self.accepting = self.is_initialized = False

    # What transformers asks of a layer; columns seen are counted by the cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: `append` sizes the storage."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Return the new keys and values as they are; the attention function knows the mask and stores them.

        Raises:
            RuntimeError: outside a block.
        """
        if not self.accepting:
            raise RuntimeError(
                "this cache was filled by kvlib and can only be continued inside a `with method(model)` block "
                "(a streamer, too, has to be read to its end inside)"
            )
        self.accepting = False
        return key_states, value_states

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: evicted tokens cannot come back."""
        raise ValueError("a compressed cache cannot be cropped (assisted decoding is not supported)")

    # Tokens

    @property
    def parts(self) -> list[Part]:
        """In the order in which they stand in a view."""
        return [part for part in (self.body, self.tail) if part is not None]

    @property
    def lengths(self) -> torch.Tensor:
        """`(batch, kv_heads)` on the CPU, tokens that are stored or stand for stored ones."""
        return self.tail.tokens if self.body is None else self.body.tokens + self.tail.tokens

    def append(
        self, chunk: dict[str, torch.Tensor], positions: torch.Tensor, counts: torch.Tensor | None, heads: int
    ) -> None:
        """Add the real tokens of a pass.

        Args:
            chunk: field -> `(batch, kv_heads, new, ...)`; nothing, if another layer is read instead.
            positions: `(batch, new)`, index among the row's real tokens, -1 for padding, which must come first.
            counts: `(batch,)` on the CPU, real tokens of the pass; None if every row has one.
        """
        if self.tail is None:
            self.tail = Part(len(positions), heads, positions.device, memo=self.memo)
            self.is_initialized = True
        if counts is None:
            self.tail.append_one(chunk, positions)
        else:
            self.tail.append(chunk, positions[:, None], counts[:, None].expand(-1, heads))

    def keep(self, mask: torch.Tensor, lengths: torch.Tensor) -> None:
        """Evict from the tail all but `mask` `(batch, kv_heads, slots)`, `lengths` `(batch, kv_heads)` tokens."""
        self.tail.keep(mask, lengths)

    def row_reads(self) -> torch.Tensor:
        """`(batch,)` on the CPU, bytes of keys and values read in the last pass: what is stored, or less."""
        return sum(part.row_bytes() for part in self.parts) if self.reads is None else self.reads.cpu()

    def position_rectangle(self) -> torch.Tensor:
        """Positions of all parts, `(batch, kv_heads, slots)`, -1 in empty slots."""
        if self.body is None:
            return self.tail.position_rectangle()
        return torch.cat([part.position_rectangle().flatten(2) for part in self.parts], dim=-1)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep what there is of the batch rows `rows`, a CPU tensor, beside the parts."""
        on_device = {}

        def choose(x):
            return x[on_device.setdefault(x.device, rows.to(x.device))]

        self.rows = {name: choose(x) for name, x in self.rows.items()}
        self.queries = None if self.queries is None else tuple(map(choose, self.queries))
        self.reads = None if self.reads is None else choose(self.reads)

    def tensors(self) -> list[torch.Tensor]:
        """Everything held beside keys and values."""
        inside = [x for part in self.parts for x in (*part.state.values(), part.positions, part.capacity)]
        more = (x for part in self.parts for x in (part._lengths, part.hole, part._starts, part._ends, part._last))
        inside += [x for x in more if x is not None]
        inside += [x for part in self.parts if part.recorded for x in (*part.recorded.inputs, part.recorded.output)]
        return [*inside, *self.rows.values(), *(self.queries or ()), *([] if self.reads is None else [self.reads])]
