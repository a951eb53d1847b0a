"""Checks of the exercises: each says what is wrong, and prints one line when nothing is.

A check never compares with a hidden answer alone; it says which property is violated and on which input.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
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
    """`function(memory, weights, layers, kv_heads, head_dim, width, budget)`: tokens of the longest prompt that fits."""
    per_token = 2 * 32 * 8 * 128 * 2
    cases = [
        ((80 * 2**30, 15 * 2**30, 32, 8, 128, 2, 1.0), 65 * 2**30 // per_token, "Llama-3.1-8B geometry, 80 GiB, budget 1.0"),
        ((80 * 2**30, 15 * 2**30, 32, 8, 128, 2, 0.25), 4 * 65 * 2**30 // per_token, "the same with a budget of 0.25"),
        ((80 * 2**30, 15 * 2**30, 32, 32, 128, 2, 1.0), 65 * 2**30 // per_token // 4, "the same without grouped heads"),
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
            hint = "; that is the sum of the single errors, but each of them renormalises as if the others were still there"
        expect(torch.allclose(found, expected), f"evicting {evicted}: expected {expected}, found {found}{hint}")
    print("change_of_output is right")


def check_smallest_budget(function, table) -> None:
    """`function(table, task, method, loss)`: the smallest budget certainly at most `loss` below the full cache, or None."""
    for task in table["task"].unique():
        for method in ("random", "snapkv", "knorm"):
            expected = smallest_budget(table, task, method, loss=0.1)
            found = function(table, task, method, 0.1)
            expect(found is not ..., "smallest_budget returned Ellipsis: replace the `...`")
            hint = ""
            if found is not None and expected is not None:
                hint = "; too optimistic" if found < expected else "; too cautious"
                hint += ": use the lower end of the interval of the paired difference"
            expect(found == expected, f"{task}, {method}: expected {expected}, found {found}{hint}")
    print("smallest_budget is right")


def smallest_budget(table, task: str, method: str, loss: float) -> float | None:
    """Smallest budget whose paired difference to the full cache has a 95 % interval entirely above −loss."""
    cells = table[(table["task"] == task) & (table["arguments"] == "{}")].set_index("sample")
    full = cells.loc[cells["method"] == "full", "value"].sort_index()
    for budget, cell in cells[cells["method"] == method].groupby("budget"):
        if paired_difference(cell["value"].sort_index(), full)[1] > -loss:
            return budget
    return None


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
        view = f"layer {layer}: {kept[0].tolist()}"
        expect(bool((kept.diff(dim=-1)[kept[..., 1:] >= 0] > 0).all()), f"{name}: indices are not ascending and unique in {view}")
    wrong = {place: count for place, count in counts.items() if count != 45}
    expect(not wrong, f"{name}: budget 0.5 of 90 tokens is 45, kept are {wrong} (layer, head): tokens")
    expect(run.stored_bytes() == run.full_bytes() / 2, f"{name}: {run.stored_bytes()} of {run.full_bytes()} bytes stored at budget 0.5")

    with kvlib.method(name, budget=1.0)(model) as everything:
        whole = model(ids).logits
    expect(everything.stored_bytes() == everything.full_bytes(), f"{name}: budget 1.0 must keep everything")
    expect(torch.equal(whole, model(ids).logits), f"{name}: budget 1.0 must not change the logits")

    padded, mask = torch.cat([ids.new_zeros(1, 7), ids], 1), torch.arange(97)[None] >= 7
    with half(model) as other:
        model(padded, attention_mask=mask.long())
    same = all(torch.equal(run.kept(layer), other.kept(layer)) for layer in range(2))
    expect(same, f"{name}: seven padding tokens in front change what is kept; use view.positions and view.tokens, which leave padding out")

    kept = []
    for chunk in (None, 13):
        with half(model) as other:
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk, pad_token_id=0)
        kept.append([other.kept(layer) for layer in range(2)])
    same = all(map(torch.equal, *kept))
    expect(same, f"{name}: reading the prompt in chunks changes what is kept; ask view.column_sums(last=...) for queries")
    print(f"{name} keeps the contract: counts, bytes, budget 1.0, padding, chunks")


def tiny_model():
    """Two layers, grouped heads, random weights large enough that attention is not uniform, float64."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()
