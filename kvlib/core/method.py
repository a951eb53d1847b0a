"""The contract of a method, and the registry.

A method is one small class, made a frozen dataclass by `@register("name")`. There are three bases:

- `Evictor`: says how much to keep (`budgets`) and what to keep (`score`);
- `Reader`: keeps everything and says what to read of it (`select`);
- `Method`: anything else - other forms of storage (`encode`, `decode`), merging (`compress`), attention over several
  layers (`attend`), shorter hidden states (`before_layer`).

The library stores, attends, evicts, reads and counts. Registration is all it takes: the name works in `kvlib.method`,
and the generic tests run the class with its default arguments.

    @register("keep_first")
    class KeepFirst(Evictor):
        def score(self, view):
            return -view.positions.float()
"""

from dataclasses import dataclass

import numpy as np
import torch

from kvlib.core import packed
from kvlib.core.layer import Layer
from kvlib.core.part import Part
from kvlib.core.run import Run
from kvlib.core.view import View
from kvlib.nearest import unknown

METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Method:
    """What every cache method answers. Instances hold no state: everything learned from a prompt lives in its cache.

    Class attributes:
        evicts_in_decode: `compress` is called after every decoded token too.
        text_order: slots are kept in text order while decoding too, for scores that look at neighbours or ranks in
            them; it costs moving what is stored after each token.
        window: how many of the prompt's last queries `view.column_sums(last=...)` may ask for.
        weighs: what decoded tokens attend to is asked for at every step, by `view.column_sums`; where tokens are
            evicted, attention is then computed from these weights (on a GPU by a kernel that gives both), instead of by
            SDPA, which does not tell them.
        scaled: where there are fields `key_scale` and `value_scale`, one number for each token and head, those named
            `key` and `value` hold 8-bit codes, which `decode` multiplies by them and does nothing else.
        renumber: tokens are read by their place among those that are kept, so that the model's window limits what is
            stored and not how long the text is. Must be able to choose what to keep without queries.
        own_prefill: the prompt's hidden states depend on the method, so it cannot start from a shared snapshot.
    """

    evicts_in_decode = False
    text_order = False
    window = 0
    weighs = False
    scaled = False
    renumber = False
    own_prefill = False

    def __call__(self, model) -> Run:
        """`with method(model) as run:` applies the method to `model` for the length of the block."""
        return Run(self, model)

    @property
    def evicts(self) -> bool:
        """May tokens be evicted?"""
        return False

    def hooks(self, name: str) -> bool:
        """Does this method define `name`, which `Method` leaves open?"""
        return getattr(type(self), name) is not getattr(Method, name)

    # Once per block

    def prepare(self, model):
        """Work out something from the model's weights, or read it from a file; it becomes `run.prepared`."""

    # What is stored

    def encode(
        self, run: Run, layer: Layer, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What is stored of new tokens: field -> `(batch, kv_heads, new, ...)`.

        Args:
            key, value: `(batch, kv_heads, new, head_dim)`, keys rotated. positions: `(batch, new)`, -1 = padding.
        """
        return {"key": key, "value": value}

    def decode(self, view: View, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, kv_heads, slots, head_dim)` of one part, from `view.fields(part)`."""
        stored = view.fields(part)
        return stored["key"], stored["value"]

    # Every pass

    def on_token_ids(self, run: Run, token_ids: torch.Tensor | None) -> None:
        """Look at the new token ids `(batch, new)` before each forward pass (None when embeddings were passed)."""

    def before_layer(self, run: Run, layer_idx: int) -> torch.Tensor | None:
        """Columns of the hidden states that go on into this layer, `(batch, kept)` ascending, or None for all.

        `run.step.view` is the previous layer's view, None before the first layer; its columns are those still in the
        residual stream. Padding has to be dropped before real tokens, and the last column has to stay. A method that
        defines this hook shortens queries, positions and rotary embeddings together for all later layers.
        """

    def attend(self, view: View) -> torch.Tensor:
        """The attention output `(batch, new, query_heads, head_dim)`; replace it to read less, or another layer too."""
        return packed.attend(view)

    def observe(self, view: View) -> None:
        """Look at every forward pass of every layer after its attention: the place to accumulate `view.state`."""

    def compress(self, view: View) -> None:
        """At the end of a prompt, and if `evicts_in_decode` after every decoded token and at the end of every question
        (`Run.ask`): make the layer smaller.

        `view.layer` offers `keep`, the parts' `append`, `put` and `retire`, and a `body` beside the `tail`.
        """

    def finish(self, run: Run) -> None:
        """After the last layer of every pass: for budgets over layers and merging over depth (`run.view(layer)`).

        May call `run.probe(ids)`, a pass over the cache whose tokens are forgotten.
        """

    def on_generate(self, run: Run, arguments: dict) -> dict:
        """Change the keyword arguments of `generate`, for example to add a logits processor."""
        return arguments


@dataclass(frozen=True)
class Budgeted(Method):
    """A method with a budget. A number of numpy's becomes the one of Python's.

    Raises:
        ValueError: for a budget that is neither a fraction in (0, 1] nor a whole number of tokens.
    """

    budget: float | int = 1.0

    def __post_init__(self):
        if isinstance(self.budget, np.number):
            object.__setattr__(self, "budget", self.budget.item())
        fits = whole(self.budget, 1) or (isinstance(self.budget, float) and 0 < self.budget <= 1)
        require("budget", self.budget, fits, "a fraction in (0, 1] or a whole number of tokens >= 1")

    @property
    def everything(self) -> bool:
        """Is the budget a share of 1.0, all tokens whenever they come?"""
        return isinstance(self.budget, float) and self.budget == 1.0

    def tokens(self, view: View, share: float | int) -> torch.Tensor:
        """`share` in tokens per row, `(batch,)` on the CPU: the number itself, or int(share x prompt tokens), >= 1."""
        if isinstance(share, int):
            return torch.full_like(view.prompt_tokens, share)
        return view.clamp("budget", torch.tensor([int(share * n) for n in view.prompt_tokens.tolist()]), low=1)


@dataclass(frozen=True)
class Evictor(Budgeted):
    """A method that keeps the tokens with the highest scores.

    Args:
        budget: what is kept. A float in (0, 1] is a fraction of the row's real tokens at the end of its latest prompt
            or document, per KV head; an integer is tokens per KV head. 1.0 never evicts.

    With `evicts_in_decode` it returns after every decoded token, and once after a question about a document
    (`Run.ask`), to the budgets that were fixed by the prompt.
    """

    @property
    def evicts(self) -> bool:
        """False if the budget is everything."""
        return not self.everything

    def score(self, view: View) -> torch.Tensor:
        """Importance of every stored token, `(batch, kv_heads, slots)` in float32 or better, higher = keep.

        Ties go to the earlier token. Empty slots may hold anything.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def importance(self, view: View, last=None) -> torch.Tensor:
        """What a score is made of, `(batch, kv_heads, group, slots)`: attention, unless a method puts something in its
        place (`kvlib.methods.vatp`). Scores read it as `view.importance(last)`; arguments of `view.column_sums`.
        """
        return view.column_sums(last)

    def budgets(self, view: View) -> torch.Tensor:
        """Tokens to keep `(batch, kv_heads)` on the CPU; by default `tokens(view, budget)` for every head.

        Asked once for a prompt: they stay the same for the tokens decoded after it.
        """
        return self.tokens(view, self.budget)[:, None].expand_as(view.lengths)

    def choose(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Which slots to keep, `(batch, kv_heads, slots)` bool, and how many these are, `(batch, kv_heads)` on the CPU.

        Replace it for lengths that follow from scores; knowing them costs one wait for the device.
        """
        lengths = torch.minimum(view.per_prompt("budgets", self.budgets), view.lengths)
        return strongest(self.score(view), view.positions, lengths), lengths

    def compress(self, view: View) -> None:
        """Evict. After a decoded token one goes from each segment, and the next one will take its place."""
        if not self.evicts:
            return
        if type(self).choose is Evictor.choose:  # lengths follow from budgets alone
            excess = view.excess(view.per_prompt("budgets", self.budgets))
            if excess == 0:
                return
            if excess == 1 and view.step.decoding:
                view.layer.tail.retire_weakest(self.score(view))
                return
        view.layer.keep(*self.choose(view))


@dataclass(frozen=True)
class Reader(Budgeted):
    """A method that keeps everything and reads a part of it when it decodes.

    Args:
        budget: what is read per KV head (or query head), a share of the row's real tokens at the end of its latest
            prompt, or tokens; 1.0 reads everything.
    """

    def select(self, view: View) -> torch.Tensor | None:
        """Slots to read, `(batch, kv_heads or query_heads, k)`, -1 = none; None reads all.

        What choosing itself reads is added by `view.note_read`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(view)")

    def attend(self, view: View) -> torch.Tensor:
        """Attention over what `select` says, for decoded tokens; prompts are read densely."""
        slots = self.select(view) if view.step.decoding and not self.everything else None
        return packed.attend(view if slots is None else view.gathered(slots))


def strongest(score: torch.Tensor, positions: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mask of the `count` `(batch, heads or 1)` highest scores of real tokens in each segment; ties to the earlier one.

    Args:
        score, positions: `(batch, heads, slots)`, position -1 = empty slot; slots may be in any order.
    """
    in_text = positions.argsort(dim=-1)
    score = score.masked_fill(positions < 0, -torch.inf).gather(-1, in_text)
    order = in_text.gather(-1, score.sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return rank < count[..., None].to(rank.device)


def highest(score: torch.Tensor, positions: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Slots of the `count` `(batch,)` highest scores of real tokens, `(batch, heads, most)`; -1 behind the last one.

    Ties go to the earlier slot.
    """
    order = score.masked_fill(positions < 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : int(count.max())]
    found = positions.expand_as(score).gather(-1, order) >= 0
    if bool((count < count.max()).any()):  # else nothing is brought to the device, as captured steps want it
        found &= torch.arange(order.shape[-1], device=order.device) < count[:, None, None].to(order.device)
    return order.where(found, -1)


def register(name: str):
    """Class decorator: make the class a frozen dataclass and reachable as `kvlib.method(name, ...)`.

    Raises:
        ValueError: if another class has the name. Defining the same class again, as notebooks do, replaces it.
    """

    def decorate(cls: type[Method]) -> type[Method]:
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        METHODS[name] = dataclass(frozen=True)(cls)
        cls.name = name
        return METHODS[name]

    return decorate


def method(name: str, **arguments) -> Method:
    """Make a method by name: `kvlib.method("snapkv", budget=0.3)`.

    Raises:
        ValueError: for an unknown name (naming the nearest one) and for arguments that can never work.
    """
    if name not in METHODS:
        raise unknown("method", name, sorted(METHODS))
    return METHODS[name](**arguments)


def budgeted() -> list[str]:
    """Names of the methods that take a budget."""
    return sorted(name for name, cls in METHODS.items() if issubclass(cls, Budgeted))


def whole(value, low: int) -> bool:
    """Is `value` an integer, not a bool, of at least `low`?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def require(name: str, value, holds: bool, allowed: str) -> None:
    """Raise the one kind of error that constructors raise.

    Raises:
        ValueError: "name=value: allowed" if `holds` is false.
    """
    if not holds:
        raise ValueError(f"{name}={value!r}: {allowed}")
