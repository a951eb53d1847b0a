"""Methods on top of each other: what is stored of the tokens that an evictor keeps, or what is read of them."""

from dataclasses import replace
from functools import cached_property

import torch

from kvlib.core.method import METHODS, Budgeted, Evictor, Method, Reader, register, require
from kvlib.core.part import Part
from kvlib.nearest import unknown

PER_TOKEN = ("int8",)  # stores in which a token can go by itself
STORES = (*PER_TOKEN, "kivi", "think")
READERS = ("loki",)  # they choose in every layer and head for itself, and by keys alone


@register("combined")
class Combined(Budgeted):
    """An evictor, and over it either another storage of what it keeps, or a reader of it.

    With a `store` the evictor chooses first, and what stays is then encoded. Some stores encode several tokens together
    (a body beside the tail of raw ones): at the end of a later prompt these are decoded, chosen from, and encoded anew.
    With a `reader` a decoded token reads a part of what the evictor has left.

    Args:
        budget: the evictor's.
        evictor, store, reader: names of registered methods, with their defaults, or methods; budgets are not theirs.
        read: the reader's budget, a share of the prompt, or tokens.

    Raises:
        ValueError: for pairs that cannot be: a store and a reader; evicting while decoding, or remembering something
            of every token, over a store that encodes tokens together; an evictor that changes the prompt's hidden
            states; two methods that both prepare something of the model; readers that rely on equal tokens in all
            heads or layers. In a block: a reader over heads of different lengths.
    """

    evictor: str | Evictor = "snapkv"
    store: str | Method | None = None
    reader: str | Reader | None = None
    read: float | int = 1.0

    def __post_init__(self):
        super().__post_init__()
        require("reader", self.reader, self.store is None or self.reader is None, "a store or a reader, not both")
        first, second = self.chosen, self.second
        fits = not (first.own_prefill or first.hooks("before_layer"))
        require("evictor", self.evictor, fits, "one that leaves the prompt's hidden states alone")
        if second is None:
            return
        alone = not (first.hooks("prepare") and second.hooks("prepare"))
        require("evictor", self.evictor, alone, f"it prepares something of the model, and so does {second.name}")
        if self.store is not None and second.name not in PER_TOKEN:
            fits = not (first.evicts_in_decode or first.hooks("observe") or first.hooks("finish"))
            require(
                "evictor", self.evictor, fits, f"one that evicts once, by keys and queries alone, over {second.name}"
            )
        if self.reader is not None:
            fits = not (first.evicts_in_decode or first.hooks("attend"))
            require("evictor", self.evictor, fits, f"one that evicts at the end of the prompt, below {second.name}")

    @cached_property
    def chosen(self) -> Evictor:
        """The evictor itself."""
        evictors = (name for name, cls in METHODS.items() if issubclass(cls, Evictor))
        return replace(named("evictor", self.evictor, evictors), budget=self.budget)

    @cached_property
    def second(self) -> Method | None:
        """The store or the reader."""
        if self.store is not None:
            return named("store", self.store, STORES)
        return None if self.reader is None else replace(named("reader", self.reader, READERS), budget=self.read)

    @property
    def parts(self) -> list[Method]:
        return [self.chosen] if self.second is None else [self.chosen, self.second]

    @property
    def evicts(self):
        return self.chosen.evicts

    @property
    def evicts_in_decode(self):
        return any(part.evicts_in_decode for part in self.parts)

    @property
    def text_order(self):
        return any(part.text_order for part in self.parts)

    @property
    def weighs(self):
        return self.chosen.weighs

    @property
    def window(self):
        return max(part.window for part in self.parts)

    @property
    def renumber(self):
        return self.chosen.renumber

    @property
    def scaled(self):
        return self.second is not None and self.second.scaled

    def hooks(self, name):
        return any(part.hooks(name) for part in self.parts)

    def prepare(self, model):
        return next((made for part in self.parts if (made := part.prepare(model)) is not None), None)

    def importance(self, view, last=None):
        return self.chosen.importance(view, last)

    def encode(self, run, layer, key, value, positions):
        encoded = self.chosen.encode(run, layer, key, value, positions)  # which may note something
        return encoded if self.store is None else self.second.encode(run, layer, key, value, positions)

    def decode(self, view, part):
        return super().decode(view, part) if self.store is None else self.second.decode(view, part)

    def attend(self, view):
        if self.reader is not None:
            equal = bool((view.lengths == view.lengths[:, :1]).all())
            require("evictor", self.evictor, equal, f"heads of one length, below {self.second.name}")
            return self.second.attend(view)
        return self.chosen.attend(view) if self.chosen.hooks("attend") else self.parts[-1].attend(view)

    def observe(self, view):
        for part in self.parts:
            part.observe(view)

    def compress(self, view):
        step = view.step
        for part in self.parts:
            if not (step.ends_prompt or part.evicts_in_decode) or (
                part is self.second and step.ends_prompt and self.late
            ):
                continue
            if part is self.chosen and self.evicts and view.layer.body is not None:
                unpack(view)
                view = view.other(view.layer_idx)
            part.compress(view)

    @property
    def late(self) -> bool:
        """Does the evictor choose after the last layer, and the store has to wait for it?"""
        return self.store is not None and self.chosen.hooks("finish")

    def finish(self, run):
        self.chosen.finish(run)
        if self.late and run.step.ends_prompt:
            for layer in range(len(run.cache.layers)):
                self.second.compress(run.view(layer))


def named(kind: str, method: str | Method, known) -> Method:
    """A method with its defaults, or as it is given, if its name is among the known ones."""
    name, known = method.name if isinstance(method, Method) else method, [*known]
    if name not in known:
        raise unknown(kind, name, known)
    return method if isinstance(method, Method) else METHODS[name]()


def unpack(view) -> None:
    """Bring what a layer stores in a body back into the tail, in text order, as keys and values."""
    layer, at, counts = view.layer, view.positions, view.layer.lengths
    order = at.masked_fill(at < 0, torch.iinfo(at.dtype).max).argsort(dim=-1)[..., : int(counts.max())]
    index = order[..., None]
    chunk = {
        name: x.gather(2, index.expand(*order.shape, x.shape[-1]))
        for name, x in (("key", view.key), ("value", view.value))
    }
    tail = Part(*counts.shape, at.device, memo=layer.memo)
    tail.append(chunk, at.gather(2, order), counts, skip=torch.zeros_like(counts))
    layer.tail, layer.body = tail, None
