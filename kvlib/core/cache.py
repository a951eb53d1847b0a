"""The packed cache: one flat key tensor and one flat value tensor per layer.

Every (row, KV head) pair owns one contiguous segment, segments follow each other row by row and head by head, and
each may have its own length. What a segment does not hold is not in memory: evicting means writing shorter tensors.

Two shapes occur throughout:

- *flat* `(stored, ...)`: what is kept, nothing else;
- *rectangle* `(batch, kv_heads, slots, ...)`: a temporary view for computing, `slots` = the longest segment, shorter
  ones filled with arbitrary entries whose position is -1. With equal segments it is a view of the flat tensor.

Lengths live on the CPU. They follow from budgets and masks, never from scores, so no step waits for a device. Where
things are follows from lengths alone, and is worked out once for all layers of a pass that have the same.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class KVLayer(DynamicLayer):
    """Keys, values and per-token state of one layer.

    Attributes:
        keys, values: flat `(stored, head_dim)`.
        positions: flat `(stored,)` int32, the token's index among the real tokens of its row.
        state: name -> flat `(stored, ...)`, whatever a method remembers per stored token.
        lengths: `(batch, kv_heads)` int64 on the CPU, tokens stored per segment.
        tokens: `(batch,)` int64 on the CPU, real tokens seen per row, evicted ones included.
        prompt_tokens: the same at the end of the latest prompt.
        reads: `(batch,)` bytes of K and V read in the last pass if a method reads less than what is stored, else None.
        intact: nothing has been evicted since the latest tokens were added.
        seen: columns seen, padding included (what transformers calls the sequence length).
        queries: the last queries of an unfinished prompt `(batch, query_heads, <= window, head_dim)` with their
            positions `(batch, <= window)`, or None.
        places: what `once` has worked out in this pass, one dict for all layers; None between passes.
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.positions = self.queries = None
        self.lengths = self.tokens = self.prompt_tokens = None
        self.state: dict[str, torch.Tensor] = {}
        self.seen = 0
        self.reads = self.places = None
        self.intact = True
        self.accepting = False
        self.is_initialized = False

    # What transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: `append` sizes the storage."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Return the new keys and values as they are; the attention function knows the mask and stores them."""
        if not self.accepting:
            raise RuntimeError(
                "this cache was filled by kvlib and can only be continued inside a `with method(model)` block"
            )
        self.accepting = False
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen, not tokens stored: transformers slices its inputs with it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes for a stock mask, which the kvlib mask function never builds."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: evicted tokens cannot come back."""
        raise ValueError("a compressed cache cannot be cropped (assisted decoding is not supported)")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows `beam_idx`, in that order."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.lengths is not None:
            self.select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (integers or a mask)."""
        if self.lengths is not None:
            self.select_rows(torch.arange(len(self.lengths))[indices.cpu()])

    # Packed storage

    @property
    def uniform(self) -> bool:
        """Do all segments have the same length?"""
        return bool((self.lengths == self.lengths[0, 0]).all())

    def once(self, function: Callable, *arguments: torch.Tensor | int):
        """`function(*arguments, device)` for CPU tensors and numbers, computed when first asked for in a pass."""
        device = self.keys.device  # of a large model's layers each may have another
        if self.places is None:
            return function(*arguments, device)
        key = (function, device, *((x.shape, x.numpy().tobytes()) if torch.is_tensor(x) else x for x in arguments))
        if key not in self.places:
            self.places[key] = function(*arguments, device)
        return self.places[key]

    def rectangles(self, *flats: torch.Tensor) -> list[torch.Tensor]:
        """Flat tensors `(stored, ...)` as rectangles `(batch, kv_heads, slots, ...)`; no copy if segments are equal."""
        if self.uniform:
            return [flat.view(*self.lengths.shape, -1, *flat.shape[1:]) for flat in flats]
        index, _ = self.once(slots, self.lengths)
        return [take(flat, index.flatten()).view(*index.shape, *flat.shape[1:]) for flat in flats]

    def position_rectangle(self) -> torch.Tensor:
        """Positions `(batch, kv_heads, slots)`, ascending, then -1 in empty slots."""
        (positions,) = self.rectangles(self.positions)
        if self.uniform:
            return positions
        return positions.where(self.once(slots, self.lengths)[1], -1)

    def flatten(self, rectangle: torch.Tensor) -> torch.Tensor:
        """The inverse of `rectangles`."""
        flat = rectangle.flatten(0, 2)
        if self.uniform:
            return flat
        segment, place = self.once(segments, self.lengths)
        return take(flat, segment * rectangle.shape[2] + place)

    def append(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
        """Add the real tokens of a chunk at the end of every segment.

        Args:
            key, value: `(batch, kv_heads, new, head_dim)`, keys rotated.
            positions: `(batch, new)`, index among the row's real tokens, -1 for padding, which must come first.
            counts: `(batch,)` on the CPU, real tokens of the chunk.
        """
        batch, heads, new, _ = key.shape
        if self.lengths is None:
            self.lengths = torch.zeros(batch, heads, dtype=torch.int64)
            self.keys, self.values = key.new_empty(0, key.shape[-1]), value.new_empty(0, value.shape[-1])
            self.positions = torch.empty(0, dtype=torch.int32, device=key.device)
            self.is_initialized = True
        positions = positions.to(key.device, torch.int32)[:, None].expand(batch, heads, new)
        merge = self._merge(batch, heads, new, counts)
        self.keys, self.values = merge(self.keys, key), merge(self.values, value)
        self.positions = merge(self.positions, positions)
        for name, flat in self.state.items():
            self.state[name] = merge(flat, flat.new_zeros(batch, heads, new, *flat.shape[1:]))
        self.lengths = self.lengths + counts[:, None]
        self.intact = True

    def _merge(self, batch, heads, new, counts):
        """A function (flat, chunk) -> flat that puts each segment's new entries behind its old ones."""
        if self.uniform and bool((counts == new).all()):
            shape = (batch, heads, int(self.lengths[0, 0]))
            return lambda flat, chunk: torch.cat([flat.view(*shape, *flat.shape[1:]), chunk], dim=2).flatten(0, 2)
        source = self.once(sources, self.lengths, counts, new)
        return lambda flat, chunk: take(torch.cat([flat, chunk.flatten(0, 2)]), source)

    def keep(self, mask: torch.Tensor, lengths: torch.Tensor) -> None:
        """Evict all but `mask` `(batch, kv_heads, slots)`, which holds `lengths` `(batch, kv_heads)` tokens."""
        self._take(torch.nonzero_static(self.flatten(mask), size=int(lengths.sum())).squeeze(1), lengths)
        self.intact = False

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed."""
        if self.lengths is None:
            return
        rows = rows.cpu()
        segment, place = self.once(segments, self.lengths[rows])
        self._take(starts(self.lengths)[rows].flatten().to(place.device)[segment] + place, self.lengths[rows])
        self.tokens, self.prompt_tokens = self.tokens[rows], self.prompt_tokens[rows]
        if self.queries is not None:
            self.queries = tuple(x[rows.to(x.device)] for x in self.queries)

    def _take(self, index: torch.Tensor, lengths: torch.Tensor) -> None:
        self.keys, self.values, self.positions = (take(x, index) for x in (self.keys, self.values, self.positions))
        self.state = {name: take(flat, index) for name, flat in self.state.items()}
        self.lengths = lengths


def starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each segment begins in a flat tensor, in the shape of `lengths`."""
    return (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)


def segments(lengths: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a flat tensor with these `lengths`: each entry's segment, and its place within it, both `(stored,)`."""
    total, counts = int(lengths.sum()), lengths.flatten().to(device)
    numbers = torch.arange(len(counts), device=device)
    segment = torch.repeat_interleave(numbers, counts, output_size=total)
    return segment, torch.arange(total, device=device) - starts(counts)[segment]


def slots(lengths: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a rectangle: each slot's entry in the flat tensor, and whether it holds one, `(batch, kv_heads, slots)`."""
    place, lengths = torch.arange(int(lengths.max()), device=device), lengths.to(device)
    filled = place < lengths[..., None]
    return (starts(lengths)[..., None] + place).where(filled, 0), filled


def sources(lengths: torch.Tensor, counts: torch.Tensor, new: int, device) -> torch.Tensor:
    """For longer segments: where their entries are in the flat tensor with a chunk of `new` columns behind it.

    Args:
        lengths: of the segments so far. counts: `(batch,)` real tokens of the chunk, which stand behind its padding.
    """
    segment, place = segments(lengths + counts[:, None], device)
    old = lengths.flatten().to(device)
    first_new = int(lengths.sum()) + new * torch.arange(1, len(old) + 1, device=device)
    first_new = first_new - counts.repeat_interleave(lengths.shape[1]).to(device)
    place_in_new = place - old[segment]
    return torch.where(place_in_new < 0, starts(old)[segment] + place, first_new[segment] + place_in_new)


def take(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries `index` of a flat tensor."""
    if flat.is_cuda and flat.ndim == 2 and not flat.requires_grad:
        from kvlib.kernels import rows  # Triton is there with CUDA builds of torch only

        return rows.take(flat, index)
    return flat[index]


class KVCache(Cache):
    """A transformers cache whose layers are `KVLayer`s, filled by one method.

    Attributes:
        method: the method that fills it.
        steps: decode passes since the latest prompt.
        interrupted: the latest forward pass did not end, so that layers may hold different tokens.
    """

    def __init__(self, layers: int, method):
        super().__init__(layers=[KVLayer() for _ in range(layers)])
        self.method = method
        self.steps = 0
        self.interrupted = False

    def share_places(self, places: dict | None) -> None:
        """Where things are goes into `places`, for all layers of a pass; None when it has ended."""
        for layer in self.layers:
            layer.places = places

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
            if cache.get_seq_length():
                if cache.method != method:
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
