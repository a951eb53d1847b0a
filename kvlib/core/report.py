"""What a run says about its latest cache."""

import torch

from kvlib.core.cache import KVCache
from kvlib.core.part import storage_bytes


class Report:
    """Reports on a cache.

    Attributes:
        cache: the live transformers cache (None before the first forward pass).
        clamped: name -> `(batch,)` values that the prompt forced into range; empty if nothing had to give.
        clamped_rows: `(batch,)` bool, the rows in which something had to.
        streamed: the prompt did not fit the model's window and was compressed between its chunks, so that what is kept
            depends on where they were cut.
    """

    def __init__(self):
        self.cache: KVCache | None = None
        self._unclamp(0)

    def _unclamp(self, batch: int) -> None:
        self.clamped: dict[str, torch.Tensor] = {}
        self.clamped_rows = torch.zeros(batch, dtype=torch.bool)
        self.streamed = False

    def kept(self, layer: int) -> torch.Tensor:
        """Which real tokens of each row a layer stores: `(batch, kv_heads, slots)`, ascending, then -1."""
        layer = self._filled().layers[layer]
        positions, width = layer.position_rectangle().long(), int(layer.lengths.max())
        last = torch.iinfo(positions.dtype).max
        positions = positions.masked_fill(positions < 0, last).sort(dim=-1).values[..., :width]
        return positions.masked_fill(positions == last, -1)

    def stored_bytes(self) -> int:
        """Bytes of K and V of the tokens held, in whatever form; a part that two layers share is counted once."""
        return sum(int(part.row_bytes().sum()) for part in self._filled().parts())

    def allocated_bytes(self) -> int:
        """Bytes of the storages that hold K and V: what is stored, and room for the next tokens.

        After a prompt there is no room. It grows with the tokens decoded, to at most `kvlib.core.part.most_room` tokens
        a segment; methods that evict while decoding need one.
        """
        return storage_bytes(x for part in self._filled().parts() for x in part.fields.values())

    def state_bytes(self) -> int:
        """Bytes of everything else the cache holds: token ids, positions, scores, norms, waiting queries, counts."""
        cache = self._filled()
        own = [cache.tokens, cache.prompt_tokens, cache.ends, cache.ids, *filter(torch.is_tensor, cache.notes.values())]
        return storage_bytes([*own, *(x for layer in cache.layers for x in layer.tensors())])

    def full_bytes(self) -> int:
        """Bytes that a native cache needs for the real tokens seen so far: no padding, nothing evicted."""
        cache = self._filled()
        per_token = sum(layer.lengths.shape[1] * layer.token_bytes for layer in cache.layers)
        return per_token * int(cache.tokens.sum())

    def read_bytes(self) -> int:
        """Bytes of K and V read in the last decode step: what is stored, unless the method reads sparsely."""
        return sum(int(layer.row_reads().sum()) for layer in self._filled().layers)

    def _filled(self) -> KVCache:
        if self.cache is None or self.cache.tokens is None:
            raise RuntimeError("the run has no cache yet: call the model inside the block first")
        return self.cache
