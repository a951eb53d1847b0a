"""One forward pass: which tokens it brings, and whether they are read or decoded."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

from kvlib.core.cache import KVCache

RIGHT_PADDING = (
    "padding after a real token: pad on the left (tokenizer.padding_side = 'left'); "
    "in a later turn of a batch all rows need new tokens of the same number"
)


class Shared(MutableMapping):
    """What a method carries from layer to layer, by name, on the device of the layer that asks.

    Tensors, also in tuples, that lay on the device of the layer which left them come along; others stay, such as
    lengths on the CPU.
    """

    def __init__(self, device: torch.device, left: dict | None = None):
        self.device, self._left = device, {} if left is None else left

    def on(self, device: torch.device) -> "Shared":
        """The same for layers on another device."""
        return Shared(device, self._left)

    def __getitem__(self, name):
        value, device, copies = self._left[name]
        if device == self.device:
            return value
        if self.device not in copies:
            copies[self.device] = brought(value, device, self.device)
        return copies[self.device]

    def __setitem__(self, name, value) -> None:
        self._left[name] = value, self.device, {}

    def __delitem__(self, name) -> None:
        del self._left[name]

    def __iter__(self) -> Iterator:
        return iter(self._left)

    def __len__(self) -> int:
        return len(self._left)


def brought(value, there: torch.device, here: torch.device):
    """`value` with the tensors in it that are there on the device `here`."""
    if torch.is_tensor(value):
        return value.to(here) if value.device == there else value
    if isinstance(value, tuple):
        parts = [brought(part, there, here) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@dataclass
class Step:
    """One forward pass, shared by all layers.

    Attributes:
        index: 0 while the prompt is read, then 1, 2, ... for the tokens decoded after it.
        ends_prompt: this pass brings the last tokens of the prompt.
        question: it brings tokens of a question about a document (`Run.ask`): read like a prompt, but what follows from
            the prompt, budgets above all, is the document's. ends_question: the last of them.
        seen: columns seen after this pass, padding included.
        positions: `(batch, new)` index of each new token among its row's real tokens, -1 for padding. While decoding
            the next pass overwrites them.
        counts: `(batch,)` on the CPU, real tokens of this pass. complete: none of its columns is padding.
        tokens, prompt_tokens: `(batch,)` on the CPU, real tokens per row after this pass, and at the end of the prompt
            (while a prompt is read: so far).
        probing: the tokens of this pass will be forgotten (`Run.probe`). rereading: they have been here before
            (`Run.reread`).
        columns: `(batch, kept)` columns still in the residual stream if `before_layer` has shortened it, else None.
        shared: free space for what a method carries from layer to layer (`Shared`). Slots of one layer mean nothing in
            another unless both store the same tokens in the same order; positions do.
        sums: what was already summed over queries, by (function, layers of queries and keys, last queries).
        starts: where the last tokens of each row begin, by their number.
        listed: bytes that a list of slots names, `(batch,)`, by (list, bytes of an entry): layers share lists.
        view: the latest layer's view.
        copies: what layers on other devices see, by device.
    """

    index: int
    ends_prompt: bool
    seen: int
    positions: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    prompt_tokens: torch.Tensor
    complete: bool
    question: bool = False
    ends_question: bool = False
    probing: bool = False
    rereading: bool = False
    columns: torch.Tensor | None = None
    shared: Shared | None = None
    sums: dict = field(default_factory=dict)
    starts: dict = field(default_factory=dict)
    listed: dict = field(default_factory=dict)
    view: "object | None" = None
    copies: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.shared is None:
            self.shared = Shared(self.positions.device)

    def on(self, device: torch.device) -> "Step":
        """This pass as layers on a device see it: the same, but for where positions lie."""
        if device == self.positions.device:
            return self
        if device not in self.copies:
            self.copies[device] = replace(self, positions=self.positions.to(device), shared=self.shared.on(device))
        return self.copies[device]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row after this pass."""
        return max(self.tokens.tolist())  # sooner than by an operation

    @cached_property
    def stored(self) -> torch.Tensor:
        """`positions` as they are stored, int32."""
        return self.positions.to(torch.int32)

    @cached_property
    def ends(self) -> torch.Tensor:
        """`(batch,)` on the device: `tokens` once more."""
        return self.tokens.to(self.positions.device) if self.index == 0 else self.positions[:, 0] + 1

    @property
    def decoding(self) -> bool:
        return self.index > 0

    @property
    def aside(self) -> bool:
        """Is this a pass beside the text's own, at which nothing begins or ends?"""
        return self.probing or self.rereading

    @property
    def after_prompt(self) -> bool:
        """Do these tokens come after the prompt that decides about budgets: decoded ones, or a question's?"""
        return self.decoding or self.question


@lru_cache
def one_each(batch: int) -> torch.Tensor:
    """`(batch,)` on the CPU; the same for every step."""
    return torch.ones(batch, dtype=torch.int64)


def decode_step(cache: KVCache, batch: int, mask: torch.Tensor | None) -> Step:
    """The pass of one token after a prompt.

    Nothing here waits for a device: positions are counted there, and a mask that lies there is not looked at.
    """
    if mask is not None and mask.device.type == "cpu":
        if not bool(mask[:, -1].all()):
            raise ValueError(RIGHT_PADDING)
        check_earlier(cache, mask, 1)
    positions = cache.ends
    return Step(
        index=cache.steps + 1,
        ends_prompt=False,
        seen=cache.seen + 1,
        positions=positions,
        counts=one_each(batch),
        tokens=cache.tokens + 1,
        prompt_tokens=cache.prompt_tokens,
        complete=True,
    )


def reading_step(cache: KVCache, inputs: torch.Tensor, mask: torch.Tensor | None, columns: float | None) -> Step:
    """The pass over a prompt, or over a chunk of one.

    Args:
        inputs: ids or embeddings, `(batch, new, ...)`. mask: `(batch, columns seen so far)`, 1 = real.
        columns: where the prompt ends, None if this pass is all of it.

    Raises:
        ValueError: for a mask of another shape or one that contradicts earlier passes, for padding on the right, and
            rows without a real token.
    """
    batch, new = inputs.shape[:2]
    real = torch.ones(batch, new, dtype=torch.bool) if mask is None else mask[:, -new:].bool().cpu()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(RIGHT_PADDING)
    before, seen = cache.tokens if cache.seen else torch.zeros(batch, dtype=torch.int64), cache.seen + new
    if mask is not None and cache.seen:
        check_earlier(cache, mask, new)
    tokens = before + real.sum(1)
    ends = seen == (columns or seen)
    if ends and bool((tokens == 0).any()):
        raise ValueError(f"row {int((tokens == 0).nonzero()[0])} has no real token")
    if ends and not bool(real[:, -1].all()):
        raise ValueError(RIGHT_PADDING)
    return Step(
        index=0,
        ends_prompt=ends,
        seen=seen,
        positions=(before[:, None] + real.cumsum(1) - 1).where(real, -1).to(inputs.device),
        counts=real.sum(1),
        tokens=tokens,
        prompt_tokens=tokens,
        complete=bool(real.all()),
    )


def check_mask(mask: torch.Tensor | None, batch: int, new: int) -> None:
    """Raise ValueError unless `mask` may be `(batch, tokens seen so far)`."""
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < new):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: (batch, tokens seen so far) is needed, 1 = real"
        )


def check_earlier(cache: KVCache, mask: torch.Tensor, new: int) -> None:
    """Raise ValueError if a mask over all columns has other tokens than those that were read."""
    if mask.shape[1] == cache.seen + new and not torch.equal(mask[:, : cache.seen].sum(1).cpu(), cache.tokens):
        raise ValueError("attention_mask differs from earlier passes over tokens that are already stored")
