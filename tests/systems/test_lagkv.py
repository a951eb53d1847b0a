"""LagKV against its formula, one block, one token and one channel at a time."""

import math
import statistics

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.lagkv import standing_out


def softmax(x):
    mass = [math.exp(v - max(x)) for v in x]
    return [v / sum(mass) for v in mass]


def spread(block, following):
    """Of each token of a block the standard deviation over channels, on the scale of the next one; a softmax of it."""
    channels = range(len(block[0]))
    low = [min(token[c] for token in following) for c in channels]
    high = [max(token[c] for token in following) for c in channels]
    flat = [high[c] - low[c] <= 1e-5 * max(abs(high[c]), abs(low[c])) for c in channels]
    scaled = [[0.0 if flat[c] else (token[c] - low[c]) / (high[c] - low[c]) for c in channels] for token in block]
    return softmax([statistics.stdev(token) for token in scaled])


def by_hand(key, value, budget, sinks, lag):
    """Which of the tokens of a head stay: keys and values as lists of lists."""
    n = len(key)
    first = min(sinks, budget - 1)
    whole = max(0, n - sinks) // lag
    tail = max(0, n - sinks) - max(0, whole - 1) * lag
    if first + tail >= budget or n <= budget:
        newest = min(tail, budget - first)
        certain = {*range(min(first, n)), *range(n - newest, n)}
        return sorted(certain | {i for i in range(n) if len(certain) < budget and i < budget})
    ranked = []
    for b in range(whole - 1):
        block, following = (
            range(sinks + b * lag, sinks + (b + 1) * lag),
            range(sinks + (b + 1) * lag, sinks + (b + 2) * lag),
        )
        both = [spread([x[i] for i in block], [x[i] for i in following]) for x in (key, value)]
        total = {i: both[0][j] + both[1][j] for j, i in enumerate(block)}
        order = sorted(block, key=lambda i: (-total[i], i))
        ranked += [(order.index(i), i) for i in block]
    chosen = [i for _, i in sorted(ranked)[: budget - first - tail]]
    return sorted([*range(first), *chosen, *range(n - tail, n)])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(2, 9),
    st.integers(1, 30),
    st.integers(0, 999),
)
def test_keeps_what_the_formula_says(name, sizes, sinks, lag, budget, seed):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows, 1)
    with kvlib.method("full")(model) as run:
        model(ids, attention_mask=mask)
        fields = [
            {k: layer.tail.rectangle(x).clone() for k, x in layer.tail.fields.items()} for layer in run.cache.layers
        ]
    with kvlib.method("lagkv", budget=budget, sinks=sinks, lag=lag)(model) as run:
        model(ids, attention_mask=mask)
    kept = tiny.kept(run)
    for row, text in enumerate(rows):
        for layer, stored in enumerate(fields):
            for head in range(model.config.num_key_value_heads):
                key, value = (stored[x][row, head, : len(text)].tolist() for x in ("key", "value"))
                assert kept[row][layer][head] == by_hand(key, value, budget, sinks, lag)


def test_a_later_turn_cuts_what_is_stored():
    model, lag = tiny.model("llama-gqa"), 4
    with kvlib.method("lagkv", budget=12, sinks=2, lag=lag)(model) as run:
        model(tiny.tokens(1, 30))
        before = tiny.kept(run)[0]
    fields = []

    class Watched(kvlib.METHODS["lagkv"]):
        def score(self, view):
            fields.append((view.key.clone(), view.value.clone()))
            return super().score(view)

    with Watched(12, 2, lag)(model) as run:
        model(tiny.tokens(1, 30))
        fields.clear()
        model(tiny.tokens(1, 11, seed=1), past_key_values=run.cache)
    for layer, (key, value) in enumerate(fields):
        for head in range(2):
            tokens = before[layer][head] + [*range(30, 41)]
            stays = by_hand(key[0, head].tolist(), value[0, head].tolist(), 12, 2, lag)
            assert tiny.kept(run)[0][layer][head] == [tokens[i] for i in stays]


def test_channels_that_do_not_vary_say_nothing():
    x = torch.randn(1, 1, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0, 1, :, 2] = 0.3
    x[0, 0, 1, 1, 2] += 1e-12
    found = standing_out(x)
    assert found.isfinite().all() and found.shape == (1, 1, 2, 4)
    expected = spread(x[0, 0, 0].tolist(), x[0, 0, 1].tolist())
    torch.testing.assert_close(found[0, 0, 0].tolist(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name, value", [("sinks", -1), ("sinks", 1.0), ("lag", 1), ("lag", 4.0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: a number of tokens >= (0|2)"):
        kvlib.method("lagkv", **{name: value})
