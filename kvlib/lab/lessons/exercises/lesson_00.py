"""Exercises of 00_kv_cache."""

import torch

import kvlib
from kvlib.lab.checks import expect, number, tiny_model
from kvlib.lab.statistics import paired_difference


def check_longest_prompt(function) -> None:
    """Tokens that fit in memory: `function(memory, weights, layers, kv_heads, head_dim, width, budget)`."""
    memory, weights, fits = 80 * 2**30, 15 * 2**30, 65 * 2**30 // (2 * 32 * 8 * 128 * 2)
    cases = [
        ((memory, weights, 32, 8, 128, 2, 1.0), fits, "Llama-3.1-8B geometry, 80 GiB, budget 1.0"),
        ((memory, weights, 32, 8, 128, 2, 0.25), 4 * fits, "the same with a budget of 0.25"),
        ((memory, weights, 32, 32, 128, 2, 1.0), fits // 4, "the same without grouped heads"),
        ((1000, 0, 1, 1, 4, 4, 1.0), 31, "1000 bytes, 32 bytes a token"),
        ((10, 0, 1, 1, 4, 4, 1.0), 0, "10 bytes, not even one token"),
        ((5, 10, 1, 1, 4, 4, 1.0), 0, "weights larger than the memory"),
    ]
    for arguments, expected, what in cases:
        found = number(function(*arguments), "longest_prompt")
        hint = ""
        if expected and abs(found / expected - 2) < 0.01:
            hint = "; twice too many: keys and values both need memory"
        elif found < 0:
            hint = "; no prompt has a negative length"
        elif found != int(found):
            hint = "; a fraction of a token cannot be stored"
        elif 0 < found == expected + 1:
            hint = "; rounded up, so the last token does not fit"
        expect(found == expected, f"{what}: {expected} tokens fit, longest_prompt says {found:g}{hint}")
    print("longest_prompt is right")


def check_change_of_output(function) -> None:
    """`function(weights, values, evicted)`: o' − o for a set of evicted tokens."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, generator=generator, dtype=torch.float64).softmax(0)
    values = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    output = weights @ values
    for evicted in ([3], [0, 7], [1, 2, 5, 8, 11]):
        kept = [k for k in range(12) if k not in evicted]
        expected = weights[kept] / weights[kept].sum() @ values[kept] - output
        found = function(weights, values, evicted)
        expect(found is not None and found is not ..., f"change_of_output returned {found!r}: is there a `return`?")
        expect(tuple(found.shape) == (4,), f"change_of_output: shape {tuple(found.shape)}, expected (head_dim,) = (4,)")
        hint = ""
        if torch.allclose(found, -expected):
            hint = "; that is o − o', the sign is reversed"
        elif torch.allclose(found, weights[kept] @ values[kept] - output):
            hint = "; the remaining weights have to sum to 1 again"
        elif torch.allclose(found, sum(weights[j] / (1 - weights[j]) * (output - values[j]) for j in evicted)):
            hint = (
                "; that is the sum of the single errors, each of which renormalises as if the others were still there"
            )
        expect(torch.allclose(found, expected), f"evicting {evicted}: expected {expected}, found {found}{hint}")
    print("change_of_output is right")


def check_smallest_budget(function, table) -> None:
    """The smallest budget that surely loses at most `loss`, or None: `function(table, task, configuration, loss)`."""
    for task in table["task"].unique():
        for configuration in table.loc[table["method"].isin(("random", "snapkv", "knorm")), "configuration"].unique():
            expected = smallest_budget(table, task, configuration, loss=0.1)
            found = function(table, task, configuration, 0.1)
            expect(found is not ..., "smallest_budget returned Ellipsis: replace the `...`")
            hint = ""
            if found is not None and (expected is None or found < expected):
                hint = "; too optimistic: not the mean but the lower end of its interval has to be above -loss"
            expect(found == expected, f"{task}, {configuration}: expected {expected}, found {found}{hint}")
    print("smallest_budget is right")


def smallest_budget(table, task: str, configuration: str, loss: float) -> float | None:
    """Smallest budget whose paired difference to the full cache has a 95 % interval entirely above -loss."""
    rows = table[table["task"] == task].sort_values("sample")
    full = rows.loc[rows["method"] == "full", "value"]
    for budget, cell in rows[rows["configuration"] == configuration].groupby("budget"):
        if paired_difference([cell["value"]], [full]).low > -loss:
            return budget
    return None


@torch.no_grad()
def check_long_keys(long: str, spared: str) -> None:
    """`long` keeps the tokens with the largest key norms, `spared` those with the smallest from layer 2 on."""
    # no token twice: equal tokens have equal norms in layer 0
    model, ids = tiny_model(layers=4), torch.randperm(64, generator=torch.Generator().manual_seed(2))[None, :40]
    with kvlib.method("full")(model) as run:
        model(ids)
    keys = [layer.tail.rectangle(layer.tail.fields["key"])[0] for layer in run.cache.layers]
    norms = [key.norm(dim=-1) for key in keys]  # (kv_heads, tokens) each
    for name, sign in ((long, 1), (spared, -1)):
        with kvlib.method(name, budget=0.5)(model) as run:
            model(ids)
        for layer, norm in enumerate(norms):
            whole = name == spared and layer < 2
            size = len(run.kept(layer)[0, 0])
            expect(size == (40 if whole else 20), f"{name}: layer {layer} keeps {size} of 40 tokens at budget 0.5")
            wanted = norm.shape[1] if whole else 20
            best = (sign * norm).topk(wanted).indices.sort().values
            which = "largest" if sign > 0 else "smallest"
            message = f"{name}: layer {layer} does not keep the tokens with the {which} ‖k‖₂"
            expect(torch.equal(run.kept(layer)[0], best), message)
    print(f"{long} and {spared} keep what they should")
