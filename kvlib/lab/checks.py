"""Checks of the exercises: each says what is wrong, and prints one line when nothing is.

A check never compares with a hidden answer alone; it says which property is violated and on which input.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.core.run import attention_modules
from kvlib.lab import analysis, values
from kvlib.lab.statistics import paired_difference


def expect(holds: bool, message: str) -> None:
    """Raise an AssertionError with `message` alone; `assert` would add the values that it has compared."""
    if not holds:
        raise AssertionError(message)


def number(value, what: str) -> float:
    """`value` as a float; a stub's None or ... is named as such."""
    expect(value is not None and value is not ..., f"{what} returned {value!r}: is there a `return`?")
    return float(value)


# 00_kv_cache


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


# 01_vatp


def check_limits(function) -> None:
    """`function(weight, value_norm, output_norm)`: between which multiples of a ‖v‖ the true change of o must lie."""
    generator = torch.Generator().manual_seed(0)
    for weight, size in ((0.01, 0.1), (0.01, 3.0), (0.5, 0.4), (0.9, 1.0), (0.9, 30.0)):
        value = torch.randn(8, generator=generator, dtype=torch.float64)
        directions = {"along v": value, "against v": -value, "anywhere": torch.randn(8, generator=generator).double()}
        found = function(weight, float(value.norm()), size * float(value.norm()))
        expect(found is not None and found is not ..., f"limits returned {found!r}: is there a `return`?")
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
def check_own_score(function, model, texts, budget: float = 0.2) -> None:
    """`function(attention, norms)` loses less than attention on every text, and forcing 20 sinks does not help it.

    Args:
        texts: name -> `(snapshot of the whole text, attention, norms)`, the latter `(layers, kv_heads, n)`.
    """
    for name, (snapshot, attention, norms) in texts.items():
        before = attention.clone()
        mine = function(attention, norms)
        expect(mine is not None and mine is not ..., f"my_score returned {mine!r}: is there a `return`?")
        expect(mine.shape == attention.shape, f"my_score: shape {tuple(mine.shape)}, expected {tuple(attention.shape)}")
        expect(bool(mine.isfinite().all()), "my_score: inf or NaN; no token may be forced")
        expect(torch.equal(attention, before), "my_score changes its argument, work on a copy")
        scores = {"attention": attention, "mine": mine, "forced": values.forced(mine, 20)}
        lost = values.damage(model, snapshot, scores, [budget]).groupby("score")["head"].mean() * 100
        plain, own, protected = (f"{lost[which]:.1f} %" for which in scores)
        message = f"{name}: the output changes by {own}, with 20 sinks forced by {protected}: your score needs them"
        expect(lost["mine"] <= lost["forced"], message)
        expect(lost["mine"] < lost["attention"], f"{name}: the output changes by {own}, with attention by {plain}")
        print(f"{name}: attention {plain}, your score {own}, your score with 20 sinks {protected}")


# 11_vatp_more


@torch.no_grad()
def check_halves(projected: str, lifted: str) -> None:
    """Two methods on `kvlib.methods.vatp`: A ‖W_O v‖₁ with nothing added, and (A + 1e-4) ‖v‖₁ without the projection."""
    model, ids = tiny_model(), torch.randint(5, 60, (1, 90), generator=torch.Generator().manual_seed(1))
    snapshot = kvlib.snapshot(model, ids)
    sums = torch.stack([analysis.attention_map(snapshot, layer).sum(1) for layer in range(len(snapshot.layers))])
    kv_heads = snapshot.layers[0][1].shape[1]
    sums = sums.unflatten(1, (kv_heads, -1))  # (layers, KV heads, group, tokens)
    plain = values.value_norms(snapshot)[:, :, None]
    projections = [m.o_proj.weight.unflatten(1, (*sums.shape[1:3], -1)) for m in attention_modules(model)]
    stored = [value[0] for _, _, value, _ in snapshot.layers]
    after = torch.stack([torch.einsum("ohgd,htd->hgto", *pair).abs().sum(-1) for pair in zip(projections, stored)])
    added = sums + 1e-4 * ids.shape[1]
    cases = {
        "A ‖v‖₁": sums * plain,
        "A ‖W_O v‖₁": sums * after,
        "(A + 1e-4) ‖v‖₁": added * plain,
        "(A + 1e-4) ‖W_O v‖₁, both steps at once": added * after,
    }
    for name, wanted in ((projected, "A ‖W_O v‖₁"), (lifted, "(A + 1e-4) ‖v‖₁")):
        expect(name in kvlib.METHODS, f'no method {name!r}: is the class decorated with @kvlib.register("{name}")?')
        found = values.importance(model, snapshot, name).double()
        names = [case for case, score in cases.items() if torch.allclose(found, score.sum(2), rtol=1e-5)]
        expect(names == [wanted], f"{name} ranks by {' or '.join(names) or 'something else'}, not by {wanted}")
    print(f"{projected} and {lifted} are one step each")


def check_chance(function) -> None:
    """`function(n, k, r)`: the overlap of two sets of k of n tokens, r of them the same and the others random."""
    for n, k, r in ((512, 102, 51), (512, 410, 205), (100, 40, 0), (100, 40, 40), (64, 64, 8)):
        found = number(function(n, k, r), "chance")
        common = r + (k - r) * (k - r) / (n - r) if k > r else r
        hints = {
            k / n: "; the recent tokens are the same for certain",
            common: "; that is a number of tokens, not a share of k",
            (r + (k - r) ** 2 / n) / k: "; the others are chosen from n - r tokens",
        }
        hint = next((hint for wrong, hint in hints.items() if abs(found - wrong) < 1e-9), "")
        message = f"n = {n}, k = {k}, r = {r}: {common / k:.4f} is expected, found {found:.4f}{hint}"
        expect(abs(found - common / k) < 1e-9, message)
    print("chance is right")


# Methods


@torch.no_grad()
def check_method(name: str) -> None:
    """A registered method keeps what its budget says, in every head, and padding or chunks make no difference to it."""
    expect(name in kvlib.METHODS, f'no method {name!r}: is the class decorated with @kvlib.register("{name}")?')
    model, ids = tiny_model(), torch.randint(5, 60, (1, 90), generator=torch.Generator().manual_seed(1))
    half, counts = kvlib.method(name, budget=0.5), {}
    with half(model) as run:
        model(ids)
    for layer in range(2):
        kept = run.kept(layer)
        counts |= {(layer, head): int((row >= 0).sum()) for head, row in enumerate(kept[0])}
    wrong = {place: count for place, count in counts.items() if count != 45}
    expect(not wrong, f"{name}: budget 0.5 of 90 tokens is 45, kept are {wrong} (layer, head): tokens")
    expect(
        run.stored_bytes() * 2 == run.full_bytes(), f"{name}: {run.stored_bytes()} of {run.full_bytes()} bytes stored"
    )

    with kvlib.method(name, budget=1.0)(model) as everything:
        whole = model(ids).logits
    expect(everything.stored_bytes() == everything.full_bytes(), f"{name}: budget 1.0 must keep everything")
    expect(torch.equal(whole, model(ids).logits), f"{name}: budget 1.0 must not change the logits")

    padded, mask = torch.cat([ids.new_zeros(1, 7), ids], 1), torch.arange(97)[None] >= 7
    with half(model) as other:
        model(padded, attention_mask=mask.long())
    same = all(torch.equal(run.kept(layer), other.kept(layer)) for layer in range(2))
    hint = "use view.positions and view.tokens, which leave padding out"
    expect(same, f"{name}: seven padding tokens in front change what is kept; {hint}")

    kept = []
    for chunk in (None, 13):
        with half(model) as other:
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk, pad_token_id=0)
        kept.append([other.kept(layer) for layer in range(2)])
    same = all(map(torch.equal, *kept))
    hint = "view.query holds this chunk only, view.column_sums(last=...) reaches back"
    expect(same, f"{name}: reading the prompt in chunks changes what is kept; {hint}")
    print(f"{name} keeps the contract: counts, bytes, budget 1.0, padding, chunks")


@torch.no_grad()
def check_long_keys(long: str, spared: str) -> None:
    """`long` keeps the tokens with the largest key norms, `spared` those with the smallest from layer 2 on."""
    # no token twice: equal tokens have equal norms in layer 0
    model, ids = tiny_model(layers=4), torch.randperm(64, generator=torch.Generator().manual_seed(2))[None, :40]
    with kvlib.method("full")(model) as run:
        model(ids)
    norms = [layer.rectangles(layer.keys)[0][0].norm(dim=-1) for layer in run.cache.layers]  # (kv_heads, tokens) each
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


def tiny_model(layers: int = 2):
    """Grouped heads, random weights large enough that attention is not uniform, float64."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()
