"""The packed cache: a transformers cache of `Layer`s, filled by one method."""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache

from kvlib.core.layer import Layer
from kvlib.core.part import Memo, Part, most_room


class KVCache(Cache):
    """What a method has read so far.

    Attributes:
        method: the method that fills it.
        seen: columns seen, padding included (what transformers calls the sequence length).
        tokens: `(batch,)` int64 on the CPU, real tokens seen per row, evicted ones included; None before the first.
        prompt_tokens: the same at the end of the latest prompt.
        ends: `(batch, 1)` int64 on the device: `tokens` once more, the position of the next token.
        ids: `(batch, >= tokens)` int32 on the device, which token stands at each position, -1 where embeddings were
            passed and in room that is not yet used. They are never evicted.
        even: all rows have as many tokens.
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
        self.tokens = self.prompt_tokens = self.ends = self.ids = None
        self.interrupted, self.even = False, True
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
        on_device = rows.to(self.ends.device)
        self.ends, self.ids, self.notes = self.ends[on_device], self.ids[on_device], {}
        for part in self.parts():
            part.select(rows)
        for layer in self.layers:
            layer.select_rows(rows)

    def forget(self, count: torch.Tensor) -> None:
        """Forget the newest tokens of every row, as if they had never come.

        Rows that forget different numbers can be decoded further, but no mask says where their padding would be. What
        a method remembers per row stays as it is.

        Args:
            count: `(batch,)` on the CPU.

        Raises:
            ValueError: if fewer have come since the latest prompt, if a layer has evicted or encoded some of its
                tokens, and while steps are captured.
        """
        since = self.tokens - self.prompt_tokens
        if bool(((count < 0) | (count > since)).any()):
            raise ValueError(f"count={count.tolist()}: since the prompt {since.tolist()} tokens have come")
        for layer in self.layers:
            if layer.body is not None or layer.tail.static or bool((layer.lengths != self.tokens[:, None]).any()):
                raise ValueError(
                    f"layer {layer.index} does not hold all tokens as they came, so none can be taken back"
                )
        for layer in self.layers:
            layer.tail.truncate(layer.lengths - count[:, None])
        self.seen, self.tokens = self.seen - int(count.min()), self.tokens - count
        self.ends = self.ends - count.to(self.ends.device)[:, None]
        self.even = bool((self.tokens == self.tokens[0]).all())

    def copy(self) -> "KVCache":
        """A cache of its own memory that holds the same; layers that share a body share the copy of it."""
        return copy.deepcopy(self, {id(self.method): self.method})

    # Which tokens these are

    def note_ids(self, ids: torch.Tensor | None, step) -> None:
        """Note the ids `(batch, new)` of a pass, None for embeddings. For decoded tokens nothing waits for a device."""
        if self.ids is None:
            self.ids = step.stored.new_empty(len(step.stored), 0)
        if not step.decoding:
            self.even = bool((step.tokens == step.longest).all())
        if step.longest > self.ids.shape[1]:
            self.reserve_ids(step.longest + (most_room(step.longest) if step.decoding else 0))
        if ids is None:
            return
        if step.decoding and self.even and not self.memo.lasting:  # captured, a place has to be counted by the device
            self.ids.narrow(1, step.longest - 1, 1).copy_(ids)
        elif step.complete:
            self.ids.scatter_(1, step.positions, ids.to(torch.int32))
        else:
            row, column = (step.positions >= 0).nonzero(as_tuple=True)
            self.ids[row, step.positions[row, column]] = ids[row, column].to(torch.int32)

    def reserve_ids(self, tokens: int) -> None:
        """Make room for the ids of so many tokens in all."""
        if tokens > self.ids.shape[1]:
            self.ids = F.pad(self.ids, (0, tokens - self.ids.shape[1]), value=-1)

    def check_ids(self, ids: torch.Tensor, mask: torch.Tensor | None, pad: int | None = None) -> None:
        """Compare the text that `generate` is given with the one that was read.

        Args:
            ids: `(batch, columns)`, the end of the text if `mask` `(batch, all columns)` is longer. Rows may be fewer
                than those of the cache, which then holds several of each, as beams do. pad: the id that stands for
                padding if there is no mask.

        Raises:
            ValueError: naming the first token that is another one. Nothing is compared if the mask does not have the
                tokens that were read, which is another error.
        """
        if mask is None:
            padded = pad is not None and not bool((self.tokens == self.seen).all())
            mask = ids != pad if padded else torch.ones_like(ids)
        mask = mask.to(ids.device)
        if len(self.tokens) % len(ids):
            return
        repeats = len(self.tokens) // len(ids)
        before = mask.shape[1] - ids.shape[1]
        real = mask[:, : self.seen].bool().repeat_interleave(repeats, dim=0)
        if before >= self.seen or not torch.equal(real.sum(1).cpu(), self.tokens):
            return
        ids = ids[:, : self.seen - before].repeat_interleave(repeats, dim=0)
        read = self.ids.to(ids.device).gather(1, (real.cumsum(1) - 1).clamp(min=0))[:, before:]
        differs = ((read != ids) & (read >= 0) & real[:, before:]).cpu()
        if not bool(differs.any()):
            return
        row, column = (int(i) for i in differs.nonzero()[0])
        place = int(real[row, : before + column].sum())
        raise ValueError(
            f"the text is not the one that the cache holds: token {place} of row {row} was {int(read[row, column])} "
            f"when it was read and is {int(ids[row, column])} now; start without past_key_values"
        )

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
