"""KV-Compress against its formula, written out layer by layer, head by head and token by token."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib

ROWS = [tiny.tokens(30), tiny.tokens(21, seed=1)]


def squared(query, key, scaling, window, kernel) -> list[float]:
    """Of one query head and its KV head: pooled sums of squared attention, token by token."""
    tokens = len(key)
    sums = [0.0] * tokens
    for i in range(max(0, tokens - window), tokens):
        for j, weight in enumerate((query[i] @ key[: i + 1].T * scaling).softmax(0).tolist()):
            sums[j] += weight**2
    half = kernel // 2
    return [max(sums[max(0, j - half) : j + half + 1]) for j in range(tokens)]


def by_hand(model, row, budget, window, kernel, protected) -> list:
    """`[layer][head]` -> positions that stay."""
    ranked, layers = [], kvlib.snapshot(model, row[None]).layers
    for layer, (query, key, _, scaling) in enumerate(layers):
        group = query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            heads = range(head * group, (head + 1) * group)
            each = [squared(query[0, h], key[0, head], scaling, window, kernel) for h in heads]
            for j in range(len(row)):
                safe = j >= len(row) - min(protected, budget)
                ranked.append((not safe, -sum(scores[j] for scores in each), j, layer, head))
    heads = layers[0][1].shape[1]
    stays = sorted(ranked)[: len(layers) * heads * budget]
    return [
        [sorted(j for *_, j, at, of in stays if (at, of) == (layer, head)) for head in range(heads)]
        for layer in range(len(layers))
    ]


@settings(max_examples=12)
@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([1, 3, 7]), st.integers(0, 9))
def test_the_best_of_all_layers_and_heads_stay(budget, window, kernel, protected):
    model = tiny.model("llama-gqa")
    method = kvlib.method("kv_compress", budget=budget, window=window, kernel=kernel, protected=protected)
    ids, mask = tiny.pad(ROWS)
    with method(model) as run:
        model(ids, attention_mask=mask)
    for row, kept in zip(ROWS, tiny.kept(run)):
        assert kept == by_hand(model, row, budget, window, kernel, protected)


def test_what_heads_do_not_use_others_do_and_nothing_is_left_over():
    model = tiny.model("llama-gqa")
    with kvlib.method("kv_compress", budget=0.4, window=5, kernel=3, protected=2)(model) as run:
        model(*tiny.pad(ROWS))
        lengths = torch.cat([layer.lengths for layer in run.cache.layers], dim=1)
    assert (lengths.amax(1) > lengths.amin(1)).all() and lengths.min() >= 2
    assert lengths.sum(1).tolist() == [4 * 12, 4 * 8]
    assert run.stored_bytes() == run.allocated_bytes() == 4 * (12 + 8) * 2 * 8 * 8


def test_ties_go_to_the_earlier_token_and_to_the_first_layer_and_head():
    # All layers have the scores of a kernel that spans the prompt: every token of a head ties.
    model = tiny.model("llama-gqa")
    with kvlib.method("kv_compress", budget=1, window=1, kernel=21, protected=0)(model) as run:
        model(tiny.tokens(1, 9))
        lengths = torch.cat([layer.lengths[0] for layer in run.cache.layers]).tolist()
        assert sorted(lengths) == [0, 0, 0, 4]  # a head may go empty, and what comes next is read all the same
        assert [indices for layer in tiny.kept(run)[0] for indices in layer if indices] == [[0, 1, 2, 3]]
        assert model(tiny.tokens(1, 1), past_key_values=run.cache).logits.isfinite().all()
    with torch.random.fork_rng():
        flat = tiny.build("llama-gqa")
        for layer in flat.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    with kvlib.method("kv_compress", budget=2, window=1, kernel=1, protected=0)(flat) as run:
        flat(tiny.tokens(1, 9))  # all weights are 1 / 9
    assert tiny.kept(run)[0] == [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]
    with kvlib.method("kv_compress", budget=3, window=1, kernel=1, protected=1)(flat) as run:
        flat(tiny.tokens(1, 9))
    assert tiny.kept(run)[0] == [[[0, 1, 8], [0, 1, 8]], [[0, 1, 8], [0, 1, 8]]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 0}, r"window=0: a number of queries >= 1"),
        ({"kernel": 2}, r"kernel=2: an odd number of tokens"),
        ({"protected": -1}, r"protected=-1: a number of tokens >= 0"),
        ({"protected": 1.0}, r"protected=1\.0: a number of tokens >= 0"),
    ],
)
def test_settings_that_can_never_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("kv_compress", budget=0.5, **arguments)
