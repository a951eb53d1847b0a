"""Exercises of 00a_cache."""

import torch
from transformers import Cache

from kvlib.lab.checks import expect, number, tiny_model


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


@torch.no_grad()
def check_cache(layer_class, write) -> None:
    """A layer of a cache, and a loop that writes with it.

    Args:
        layer_class: `update(key, value)` takes in new tokens `(batch, kv_heads, new, head_dim)` and returns keys and
            values of all; `get_seq_length()` says how many there are.
        write: `(model, ids, cache, tokens)`: a list of ids, chosen greedily behind the ids `(1, n)`.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 1, 2)
    chunks = [[torch.randn(2, 3, size, 4, generator=generator) for _ in range(2)] for size in sizes]
    layer, other = layer_class(), layer_class()
    other.update(*[torch.zeros(2, 3, 5, 4) for _ in range(2)])
    for count in range(1, len(sizes) + 1):
        found = layer.update(*chunks[count - 1])
        check_update(found, [torch.cat([chunk[i] for chunk in chunks[:count]], dim=2) for i in range(2)], count)
        tokens, held = sum(sizes[:count]), layer.get_seq_length()
        expect(held == tokens, f"after {tokens} tokens get_seq_length() says {held!r}")

    model, ids = tiny_model(), torch.randint(5, 60, (1, 20), generator=generator)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    passes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    try:
        found = write(model, ids, Cache(layer_class_to_replicate=layer_class), 8)
    finally:
        hook.remove()
    expect(isinstance(found, list), f"write returned {type(found).__name__}, not a list of 8 ids")
    found = [int(i) for i in found]
    if found == [*ids[0].tolist(), *wanted]:
        expect(False, "write returned the prompt too; only the 8 new ids are asked for")
    expect(len(found) == 8, f"write returned {len(found)} ids, 8 are asked for")
    expect(sum(passes[:1]) == 20, f"the first pass reads the 20 tokens of the prompt, here it read {sum(passes[:1])}")
    most = max(passes[1:], default=1)
    expect(most == 1, f"after the prompt a pass read {most} tokens: with a cache each token is read once")
    expect(found == wanted, f"write gives {found}, the model's own loop {wanted}: is each id fed once, in its turn?")
    print("your cache and your loop are right: the same tokens, each read once")


def check_update(found, expected: list, calls: int) -> None:
    """Keys and values that `update` returned after so many calls."""
    pair = isinstance(found, tuple | list) and len(found) == 2 and all(map(torch.is_tensor, found))
    expect(pair, f"update returned {type(found).__name__}, not the pair keys, values")
    key, value = expected
    if all(map(torch.equal, found, (value, key))):
        expect(False, "update returned values, keys: the other way round")
    for name, one, all_of_them in zip(("keys", "values"), found, expected):
        shape, wanted = tuple(one.shape), tuple(all_of_them.shape)
        hint = ""
        if calls > 1 and shape[2:3] < wanted[2:3] and shape[:2] == wanted[:2]:
            hint = "; what came before is missing: keep it, in this layer"
        elif shape[2:3] > wanted[2:3]:
            hint = "; there is more than this layer was given: does every layer have its own?"
        elif shape[:2] != wanted[:2] or shape[3:] != wanted[3:]:
            hint = "; tokens are the third dimension"
        expect(shape == wanted, f"after {calls} calls {name} have shape {shape}, expected {wanted}{hint}")
        right = torch.equal(one, all_of_them)
        expect(right, f"after {calls} calls the {name} are not those that came, in the order in which they came")
