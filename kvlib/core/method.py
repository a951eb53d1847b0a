"""The method contract and the registry.

A method is one small class, made a frozen dataclass by `@register("name")`. It says how much to keep (`budgets`) and
what to keep (`score`); the library stores, attends, evicts and counts. Registration is all it takes: the name works in
`kvlib.method`, and the generic tests run the class with its default arguments.

    @register("keep_first")
    class KeepFirst(Method):
        def score(self, view):
            return -view.positions.float()
"""

from dataclasses import dataclass

import torch

from kvlib.core import attention
from kvlib.core.run import Run
from kvlib.core.view import View
from kvlib.nearest import unknown

METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Method:
    """What every cache method answers. Instances hold no state: everything learned from a prompt lives in its cache.

    Args:
        budget: what is kept. A float in (0, 1] is a fraction of the row's real tokens at the end of its latest prompt,
            per KV head; an integer is tokens per KV head. 1.0 never evicts.

    Class attributes:
        evicts_in_decode: evict after every decoded token too, to the budgets fixed by the prompt.
        window: how many of the prompt's last queries `view.column_sums(last=...)` may ask for.
        own_prefill: the prompt's hidden states depend on the method, so it cannot start from a shared snapshot.

    Raises:
        ValueError: for a budget outside its range.
    """

    budget: float | int = 1.0

    evicts_in_decode = False
    window = 0
    own_prefill = False

    def __post_init__(self):
        budget = self.budget
        if not (whole(budget, 1) or (isinstance(budget, float) and 0 < budget <= 1)):
            raise ValueError(f"budget={budget!r}: a fraction in (0, 1] or a whole number of tokens >= 1")

    def __call__(self, model) -> Run:
        """`with method(model) as run:` applies the method to `model` for the length of the block."""
        return Run(self, model)

    @property
    def evicts(self) -> bool:
        """False if the budget is everything."""
        return self.budget != 1.0 or isinstance(self.budget, int)

    # Every evicting method

    def score(self, view: View) -> torch.Tensor:
        """Importance of every stored token, `(batch, kv_heads, slots)` in float32 or better, higher = keep.

        Ties go to the earlier token. Empty slots may hold anything.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def budgets(self, view: View) -> torch.Tensor:
        """Tokens to keep `(batch, kv_heads)` on the CPU; by default `self.tokens(view, self.budget)` for every head."""
        return self.tokens(view, self.budget)[:, None].expand_as(view.lengths)

    def tokens(self, view: View, share: float | int) -> torch.Tensor:
        """`share` in tokens per row, `(batch,)` on the CPU: the number itself, or int(share x prompt tokens), >= 1."""
        if isinstance(share, int):
            return torch.full_like(view.prompt_tokens, share)
        return view.clamp("budget", torch.tensor([int(share * n) for n in view.prompt_tokens.tolist()]), low=1)

    def hooks(self, name: str) -> bool:
        """Does this method define the optional hook `name`?"""
        return getattr(type(self), name) is not getattr(Method, name)

    # Optional hooks

    def observe(self, view: View) -> None:
        """Look at every forward pass of every layer after its attention: the place to accumulate `view.state`."""

    def attend(self, view: View) -> torch.Tensor:
        """The attention output `(batch, new, query_heads, head_dim)`; replace it to read less, or another layer too."""
        return attention.attend(view)

    def before_layer(self, run: Run, layer_idx: int) -> torch.Tensor | None:
        """Columns of the hidden states that go on into this layer, `(batch, kept)` ascending, or None for all.

        `run.step.view` is the previous layer's view, None before the first layer; its columns are those still in the
        residual stream. Padding has to be dropped before real tokens, and the last column has to stay. A method that
        defines this hook shortens queries, positions and rotary embeddings together for all later layers.
        """

    def on_generate(self, run: Run, arguments: dict) -> dict:
        """Change the keyword arguments of `generate`, for example to add a logits processor."""
        return arguments

    def on_token_ids(self, run: Run, token_ids: torch.Tensor | None) -> None:
        """Look at the new token ids `(batch, new)` before each forward pass (None when embeddings were passed)."""


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
