"""Ada-KV against a reference that works through one token, one head and one key at a time."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_baselines import decode, lists, prompt
from test_uncomp_controls import lengths

import kvlib

few = settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])


@dataclass
class Reference(reference.SnapKV):
    floor: Fraction = Fraction(1, 5)
    layers: dict = field(default_factory=dict)

    def pooled(self, head, before, window):
        scores, reach = self.received(head, range(before, before + window), range(before)), self.kernel // 2
        return [max(scores[j] for j in range(max(0, i - reach), min(before, i + reach + 1))) for i in range(before)]

    def __call__(self, head):
        (before, window), n = self.split(head), head.prompt
        if n <= before + window:
            return head.stored
        if head.layer not in self.layers:  # before any of its heads has evicted
            scores = [self.pooled(other, n - window, window) for other in head.neighbours]
            self.layers[head.layer] = scores, self.shared(scores, before)
        scores, counts = self.layers[head.layer]
        return self.heaviest(dict(enumerate(scores[head.index])), counts[head.index]) + list(range(n - window, n))

    def shared(self, scores, before):
        order = sorted((-score, at, h) for h, row in enumerate(scores) for at, score in enumerate(row))
        best = [h for _, _, h in order[: before * len(scores)]]
        exact = [(1 - self.floor) * best.count(h) + self.floor * before for h in range(len(scores))]
        counts = [int(share) for share in exact]
        left = before * len(scores) - sum(counts)
        for h in sorted(range(len(scores)), key=lambda h: (counts[h] - exact[h], h))[:left]:
            counts[h] += 1
        return counts


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_equals_reference(kv_heads):
    model = reference.tiny_llama(kv_heads)

    @few
    @example(0.3, Fraction(1, 5), 4, 3, [40, 25], 0)
    @example(0.3, Fraction(0), 4, 3, [40], 0)
    @given(
        st.floats(0.02, 0.95) | st.integers(2, 30),
        st.fractions(0, 1, max_denominator=5),
        st.integers(1, 9),
        st.sampled_from([1, 3, 5]),
        st.lists(st.integers(1, 40), min_size=1, max_size=2),
        st.integers(0, 99),
    )
    def check(budget, floor, window, kernel, sizes, seed):
        prompts = [prompt(length, seed + row) for row, length in enumerate(sizes)]
        settings = {"budget": budget, "window": window, "kernel": kernel}
        logits, kept, _ = decode(kvlib.method("adakv", floor=float(floor), **settings), model, prompts, 3)
        for row, ids in enumerate(prompts):
            expected = reference.simulate(model, ids, 3, Reference(**settings, floor=floor))
            assert lists(kept, row) == expected.kept
            np.testing.assert_allclose(torch.stack(logits)[:, row], expected.logits, rtol=0, atol=1e-9)

    check()


def test_a_floor_of_one_is_snapkv():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(40)
    kept = []
    for name, arguments in (("snapkv", {}), ("adakv", {"floor": 1.0})):
        with kvlib.method(name, budget=0.4, window=4, kernel=3, **arguments)(model) as run:
            model(torch.as_tensor(ids)[None])
            kept.append([run.kept(layer).tolist() for layer in range(len(run.cache.layers))])
    assert kept[0] == kept[1]


def test_heads_share_the_budget_of_their_layer():
    found = lengths(tiny.model("llama-mha"), kvlib.method("adakv", budget=0.5, window=4, kernel=3), tiny.tokens(40))
    assert (found.sum(1) == 4 * 20).all() and len(found.unique()) > 1
    assert (found >= 4 + int(0.2 * 16)).all()


def test_impossible_floors_are_named():
    with pytest.raises(ValueError, match=r"floor=1.5: a part of an equal share, in \[0, 1\]"):
        kvlib.method("adakv", budget=0.5, floor=1.5)
