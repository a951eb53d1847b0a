"""Exercises of 01_vatp."""

import torch

from kvlib.lab.checks import expect
from kvlib.lab.lessons.evictions import damage
from kvlib.lab.lessons.scoring import forced


def check_product_score(function) -> None:
    """H2O's sum times the 1-norm of the value: `function(attention, values)` gives `(kv_heads, tokens)`."""
    generator = torch.Generator().manual_seed(0)
    kv_heads, group, queries, tokens, dim = 2, 3, 5, 7, 4
    attention = torch.rand(kv_heads, group, queries, tokens, generator=generator, dtype=torch.float64)
    values = torch.randn(kv_heads, tokens, dim, generator=generator, dtype=torch.float64)
    before = attention.clone(), values.clone()
    found = function(attention, values)
    expect(found is not None and found is not ..., f"product_score returned {found!r}: is there a `return`?")
    unchanged = torch.equal(attention, before[0]) and torch.equal(values, before[1])
    expect(unchanged, "product_score changes its arguments, work on copies")
    message = f"product_score: shape {tuple(found.shape)}, expected (kv_heads, tokens) = {(kv_heads, tokens)}"
    expect(tuple(found.shape) == (kv_heads, tokens), message)
    sums = attention.sum((1, 2))
    wrong = {
        "that is the attention alone": sums,
        "that is the norm alone": values.abs().sum(-1),
        "that is the 2-norm, asked for was the 1-norm": sums * values.norm(dim=-1),
        "without absolute values positive and negative numbers cancel": sums * values.sum(-1),
        "only the last query was counted": attention[:, :, -1].sum(1) * values.abs().sum(-1),
        "only one head of the group was counted": attention[:, 0].sum(1) * values.abs().sum(-1),
        "the largest of the group, asked for was the sum": attention.sum(2).amax(1) * values.abs().sum(-1),
    }
    expected = sums * values.abs().sum(-1)
    hints = [hint for hint, answer in wrong.items() if proportional(found, answer)]
    expect(proportional(found, expected), f"expected {expected}, found {found}{''.join(f'; {hint}' for hint in hints)}")
    print("product_score is right")


def check_limits(function) -> None:
    """`function(weight, value_norm, output_norm)`: between which multiples of a ‖v‖ the true change of o must lie."""
    generator = torch.Generator().manual_seed(0)
    for weight, size in ((0.01, 0.1), (0.01, 3.0), (0.5, 0.4), (0.9, 1.0), (0.9, 30.0)):
        value = torch.randn(8, generator=generator, dtype=torch.float64)
        directions = {"along v": value, "against v": -value, "anywhere": torch.randn(8, generator=generator).double()}
        found = function(weight, float(value.norm()), size * float(value.norm()))
        expect(found is not None and found is not ..., f"limits returned {found!r}: is there a `return`?")
        pair = isinstance(found, tuple | list) and len(found) == 2
        expect(pair, f"limits returned {found!r}, not a pair of numbers")
        low, high = map(float, found)
        case = f"a = {weight}, ‖o‖ = {size} ‖v‖"
        expect(low >= 0, f"{case}: the lower limit is {low:.3g}, but a norm is not negative")
        for name, direction in directions.items():
            output = direction * (size * value.norm() / direction.norm())
            true = float(weight / (1 - weight) * (output - value).norm() / (weight * value.norm()))
            hint = "; the other weights grow by 1 / (1 - a)" if high < true <= high / (1 - weight) * (1 + 1e-9) else ""
            message = f"{case}, o {name}: the change is {true:.4g} times a ‖v‖, outside [{low:.4g}, {high:.4g}]{hint}"
            expect(low * (1 - 1e-9) - 1e-12 <= true <= high * (1 + 1e-9), message)
        exact = [abs(1 - size) / (1 - weight), (1 + size) / (1 - weight)]
        for which, ours, limit in zip(("lower", "upper"), exact, (low, high)):
            message = f"{case}: the {which} limit {limit:.4g} is right but not sharp, {ours:.4g} is reached"
            expect(abs(limit - ours) <= 1e-9 * (1 + ours), message)
    print("limits is right")


def check_grouped_score(function) -> None:
    """The product after W_O for grouped heads: `function(attention, values, weight)` gives `(kv_heads, tokens)`."""
    generator = torch.Generator().manual_seed(0)
    kv_heads, group, tokens, dim, hidden = 2, 3, 7, 4, 10
    attention = torch.rand(kv_heads, group, tokens, generator=generator, dtype=torch.float64)
    stored = torch.randn(kv_heads, tokens, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(hidden, kv_heads * group * dim, generator=generator, dtype=torch.float64)
    weight[:, dim : 2 * dim] *= 5  # the query heads of a group differ
    projected = torch.einsum("ohgd,htd->hgto", weight.view(hidden, kv_heads, group, dim), stored)
    mixed = torch.einsum("oghd,htd->hgto", weight.view(hidden, group, kv_heads, dim), stored)
    found = function(attention, stored, weight)
    expect(found is not None and found is not ..., f"grouped_score returned {found!r}: is there a `return`?")
    message = f"grouped_score: shape {tuple(found.shape)}, expected (kv_heads, tokens) = {(kv_heads, tokens)}"
    expect(tuple(found.shape) == (kv_heads, tokens), message)
    norms = projected.abs().sum(-1)
    wrong = {
        "that is the norm before W_O": attention.sum(1) * stored.abs().sum(-1),
        "reduced before multiplying: each query head has a norm of its own": attention.sum(1) * norms.sum(1),
        "the 2-norm, asked for was the 1-norm": (attention * projected.norm(dim=-1)).sum(1),
        "query head h·group + g belongs to KV head h, the columns of W_O are in that order": (
            attention * mixed.abs().sum(-1)
        ).sum(1),
    }
    expected = (attention * norms).sum(1)
    hints = [hint for hint, answer in wrong.items() if proportional(found, answer)]
    expect(proportional(found, expected), f"expected {expected}, found {found}{''.join(f'; {hint}' for hint in hints)}")
    print("grouped_score is right")


def proportional(first, second) -> bool:
    """Equal up to one positive factor, which changes no ranking: a sum over a group, or its mean."""
    factor = second.sum() / first.sum()
    return bool(factor > 0) and torch.allclose(first * factor, second)


@torch.no_grad()
def check_own_score(function, model, texts, budget: float = 0.2, *, solved: bool = True) -> None:
    """`function(attention, norms)` loses less than attention on every text, and forcing 20 sinks does not help it.

    Args:
        texts: name -> `(snapshot of the whole text, attention, norms)`, the latter `(layers, kv_heads, n)`.
        solved: whether a score that does so is known for this model; if not, the changes are only printed.
    """
    for name, (snapshot, attention, norms) in texts.items():
        before = attention.clone()
        mine = function(attention, norms)
        expect(mine is not None and mine is not ..., f"my_score returned {mine!r}: is there a `return`?")
        expect(mine.shape == attention.shape, f"my_score: shape {tuple(mine.shape)}, expected {tuple(attention.shape)}")
        expect(bool(mine.isfinite().all()), "my_score: inf or NaN; no token may be forced")
        expect(torch.equal(attention, before), "my_score changes its argument, work on a copy")
        scores = {"attention": attention, "mine": mine, "forced": forced(mine, 20)}
        lost = damage(model, snapshot, scores, [budget]).groupby("score")["head"].mean() * 100
        plain, own, protected = (f"{lost[which]:.1f} %" for which in scores)
        message = f"{name}: the output changes by {own}, with 20 sinks forced by {protected}: your score needs them"
        if solved:
            expect(lost["mine"] <= lost["forced"], message)
            expect(lost["mine"] < lost["attention"], f"{name}: the output changes by {own}, with attention by {plain}")
        print(f"{name}: attention {plain}, your score {own}, your score with 20 sinks {protected}")
