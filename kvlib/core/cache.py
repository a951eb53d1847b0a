"""The packed cache: a transformers cache of `Layer`s, filled by one method."""

from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache, DynamicCache

from kvlib.core.layer import Layer
from kvlib.core.part import Memo, Part


class KVCache(Cache):
    """What a method has read so far.

    Attributes:
        method: the method that fills it.
        seen: columns seen, padding included (what transformers calls the sequence length).
        tokens: `(batch,)` int64 on the CPU, real tokens seen per row, evicted ones included; None before the first.
        prompt_tokens: the same at the end of the latest prompt.
        ends: `(batch, 1)` int64 on the device: `tokens` once more, the position of the next token.
        steps: decode passes since the latest prompt.
        memo: what follows from lengths alone, for all layers of a pass.
        interrupted: the latest forward pass did not end, so that layers may hold different tokens.
        notes: what is worked out once for a prompt and all tokens decoded after it.
    """

    def __init__(self, layers: int, method):
        self.memo = Memo()
        super().__init__(layers=[Layer(index, self.memo) for index in range(layers)])
        self.method = method
        self._forget()

    def _forget(self) -> None:
        self.seen = self.steps = 0
        self.tokens = self.prompt_tokens = self.ends = None
        self.interrupted = False
        self.notes: dict = {}

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, not tokens stored: transformers slices its inputs with it."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes for a stock mask, which the kvlib mask function never builds."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows `beam_idx`, in that order."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.tokens is not None:
            self.select_rows(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (integers or a mask)."""
        if self.tokens is not None:
            self.select_rows(torch.arange(len(self.tokens))[indices.cpu()])

    # Rows and parts

    def parts(self) -> Iterator[Part]:
        """Every part once, also if two layers have the same."""
        yield from {id(part): part for layer in self.layers for part in layer.parts}.values()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed."""
        if self.tokens is None:
            return
        rows = rows.cpu()
        self.tokens, self.prompt_tokens = self.tokens[rows], self.prompt_tokens[rows]
        self.ends, self.notes = self.ends[rows.to(self.ends.device)], {}
        for part in self.parts():
            part.select(rows)
        for layer in self.layers:
            layer.select_rows(rows)

    @classmethod
    def adopt(cls, cache: Cache | None, layers: int, method) -> "KVCache":
        """The cache to use in place of `cache`, which must be None, an empty dynamic cache or this method's own.

        An empty dynamic cache becomes a `KVCache` in place, because `generate` holds on to the object it has made.

        Raises:
            ValueError: for a filled cache of another method, of another model or of transformers, and for static or
                quantised caches.
        """
        if cache is None:
            return cls(layers, method)
        if isinstance(cache, KVCache):
            if cache.seen or cache.interrupted:
                if not same(cache.method, method):
                    raise ValueError(
                        f"the cache was filled by {cache.method!r}, not by {method!r}; start without past_key_values"
                    )
                if len(cache.layers) != layers:
                    raise ValueError(f"the cache has {len(cache.layers)} layers, the model {layers}")
                return cache
        elif type(cache) is not DynamicCache:
            raise ValueError(f"kvlib replaces a DynamicCache, got {type(cache).__name__}; drop `cache_implementation`")
        elif cache.offloading:
            raise ValueError("kvlib replaces a DynamicCache, got an offloaded cache; drop `cache_implementation`")
        elif cache.get_seq_length():
            raise ValueError("a cache filled outside kvlib cannot be continued; start without past_key_values")
        cache.__class__ = cls
        cache.__init__(layers, method)
        return cache


def same(one, other) -> bool:
    """Do two methods do the same? They are the same object, or of one class with equal arguments.

    Arguments that are tensors have to be the same tensor: comparing them by value would give a tensor.
    """
    if one is other:
        return True
    pairs = [(vars(one).get(name), vars(other).get(name)) for name in getattr(type(one), "__dataclass_fields__", ())]
    return type(one) is type(other) and all(
        x is y or (not torch.is_tensor(x) and not torch.is_tensor(y) and x == y) for x, y in pairs
    )
