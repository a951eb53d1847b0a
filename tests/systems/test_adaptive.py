"""Budgets of heads on any host: Ada-KV where the host is SnapKV, and a literal count of the layer's best elsewhere."""

from math import floor

import pytest
import tiny
import torch

import kvlib

ROWS = [tiny.tokens(30), tiny.tokens(21, seed=1)]


def kept(method, model, steps=0, rows=ROWS):
    ids, mask = tiny.pad(rows)
    with method(model) as run:
        logits = model(ids, attention_mask=mask).logits[:, -1]
        first = tiny.kept(run)
        tiny.decode(model, run, logits, new=steps + 1)
    return first, tiny.kept(run)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_on_snapkv_it_is_adakv(share):
    model = tiny.model("llama-gqa")
    own = kept(kvlib.method("adaptive", host="snapkv", budget=0.4, floor=share), model, 2)
    assert own == kept(kvlib.method("adakv", budget=0.4, floor=share), model, 2)
    assert (own == kept(kvlib.method("snapkv", budget=0.4), model, 2)) == (share == 1.0)


def test_on_h2o_a_layer_keeps_its_best_tokens_and_each_head_its_newest():
    model, budget = tiny.model("llama-mha"), 10
    (first, later), heads = kept(kvlib.method("adaptive", budget=budget, floor=0.25), model, 3), 4
    model.set_attn_implementation("eager")
    for row, ids in enumerate(ROWS):
        layers = model(ids[None], output_attentions=True).attentions
        for layer, weights in enumerate(layers):
            n, sums = len(ids), weights[0].sum(1)
            heavy = [(-float(sums[h, i]), i, h) for h in range(heads) for i in range(n - 5)]
            best = [h for _, _, h in sorted(heavy)[: heads * 5]]
            exact = [0.75 * best.count(h) + 0.25 * 5 for h in range(heads)]
            counts = [floor(x) for x in exact]
            for h in sorted(range(heads), key=lambda h: (counts[h] - exact[h], h))[: heads * 5 - sum(counts)]:
                counts[h] += 1
            for h in range(heads):
                mine = sorted(range(n - 5), key=lambda i: (-float(sums[h, i]), i))[: counts[h]]
                assert first[row][layer][h] == [*sorted(mine), *range(n - 5, n)]
            assert [len(x) for x in later[row][layer]] == [5 + c for c in counts]  # while decoding, too
            assert all(x[-5:] == [*range(n - 2, n + 3)] for x in later[row][layer])
            assert len(set(counts)) > 1
    model.set_attn_implementation("sdpa")


def test_values_count_on_heads_with_budgets_of_their_own():
    model, rows = tiny.model("llama-gqa"), [tiny.tokens(100)]  # of 30 heavy tokens 20 are sinks
    methods = [kvlib.method("adaptive", host=host, budget=60) for host in ("h2o", "vatp")]
    plain, product = (kept(method, model, rows=rows)[0] for method in methods)
    assert plain != product
    lengths = [[len(head) for head in layer] for row in product for layer in row]
    assert all(sum(x) == 120 for x in lengths) and any(len(set(x)) > 1 for x in lengths)
    assert all(head[:20] == [*range(20)] for layer in product[0] for head in layer)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"host": "adakv"}, "unknown host 'adakv'"),
        ({"host": "uncomp"}, "unknown host 'uncomp'"),
        ({"host": "streaming_llm"}, "unknown host 'streaming_llm'"),
        ({"host": "full"}, "unknown host 'full'"),
        ({"host": "adaptive"}, "unknown host 'adaptive'"),
        ({"floor": 1.5}, "floor=1.5: a part of an equal share"),
        ({"budget": 1}, "budget=1: room for a heavy and a recent token"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("adaptive", **{"budget": 0.5} | arguments)


def test_heads_keep_the_sum_of_their_budgets():
    model, method = tiny.model("llama-gqa"), kvlib.method("adaptive", host="knorm", budget=0.5)
    with method(model) as run:
        model(torch.stack([ROWS[0]]))
    assert all(int(layer.lengths.sum()) == 2 * 15 for layer in run.cache.layers)
