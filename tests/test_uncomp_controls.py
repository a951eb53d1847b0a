"""UNComp's controls, and its groups on other hosts, against references and by the laws that they obey."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_baselines import decode, lists, prompt
from test_uncomp import Stub, above, truncated

import kvlib
from kvlib.methods.head_groups import STATISTICS
from kvlib.methods.uncomp_controls import proportional

few = settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
SIZES = {"window": 4, "kernel": 3}


@dataclass
class OnH2O(reference.H2O):
    spread: float = 2 / 3
    ranks: dict = field(default_factory=dict)

    def split(self, head):
        mean = sum(super().split(head))
        furthest = max(0, min(int(self.spread * mean), head.prompt - mean, mean - 2))
        budget = mean + above(head, self.ranks, None, furthest)
        return budget - budget // 2, budget // 2


@dataclass
class OnPyramidKV(reference.PyramidKV):
    spread: float = 2 / 3
    ranks: dict = field(default_factory=dict)

    def split(self, head):
        before, window = super().split(head)
        furthest = max(0, min(int(self.spread * (before + window)), head.prompt - before - window, before - 1))
        return before + above(head, self.ranks, None, furthest), window


HOSTS = {"uncomp_h2o": (OnH2O, {}), "uncomp_pyramidkv": (OnPyramidKV, {"window": 3, "kernel": 3, "beta": 4})}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_groups_on_other_hosts_equal_reference(name, kv_heads):
    model, (policy, arguments) = reference.tiny_llama(kv_heads), HOSTS[name]

    @few
    @example(8, 0.9, 40, 0)  # the spread gives way to what the smallest head needs
    @given(st.floats(0.05, 0.95) | st.integers(8, 20), st.floats(0, 0.9), st.integers(2, 40), st.integers(0, 99))
    def check(budget, spread, length, seed):
        settings = {"budget": budget, "spread": spread, **arguments}
        ids = prompt(length, seed)
        logits, kept, _ = decode(kvlib.method(name, **settings), model, [ids], 4)
        expected = reference.simulate(model, ids, 4, policy(**settings))
        assert lists(kept, 0) == expected.kept
        np.testing.assert_allclose(torch.stack(logits)[:, 0], expected.logits, rtol=0, atol=1e-9)

    check()


def lengths(model, method, ids) -> torch.Tensor:
    """Tokens that every head keeps, `(layers, kv_heads)`."""
    with method(model) as run:
        model(torch.as_tensor(ids)[None])
        return torch.stack([layer.lengths[0] for layer in run.cache.layers])


def test_reversed_groups_mirror_the_budgets():
    model, ids = tiny.model("llama-mha"), tiny.tokens(40)
    one, other = (
        lengths(model, kvlib.method(name, budget=0.5, spread=0.5, **SIZES), ids)
        for name in ("uncomp", "uncomp_reversed")
    )
    assert (one + other == 40).all() and (one != other).all()


def test_reversed_groups_of_a_calibration():
    model, text = kvlib.load("minilm")[0], tiny.tokens(60)
    settings = {"budget": 0.5, "spread": 0.5, "groups": 2, "types": "minilm", "across": True}
    one, other = (lengths(model, kvlib.method(name, **settings), text) for name in ("uncomp", "uncomp_reversed"))
    assert (one + other == 60).all() and one.unique().tolist() == [15, 45]


@pytest.mark.parametrize("across", [False, True])
def test_groups_by_lot_are_of_equal_size_and_stay(across):
    model, drawn = tiny.model("llama-mha"), {}
    for seed in range(5):
        method = kvlib.method("uncomp_random", budget=0.5, groups=2, spread=0.5, across=across, seed=seed, **SIZES)
        drawn[seed] = lengths(model, method, tiny.tokens(40))
        assert (drawn[seed] == lengths(model, method, tiny.tokens(40, seed=9))).all()
        assert sorted(drawn[seed].unique().tolist()) == [10, 30] and drawn[seed].double().mean() == 20
        assert across or (drawn[seed].sum(1) == 80).all()
    assert len({tuple(found.flatten().tolist()) for found in drawn.values()}) > 1
    assert not across or any((found.sum(1) != 80).any() for found in drawn.values())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_rank_heads(statistic):
    """Tokens that fill 1, 3, 9 and 16 of 16 directions; of four eigenvalues, not renormalised, entropy falls again."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randn(200, r, generator=draw) @ torch.eye(16)[:r] for r in (1, 3, 9, 16)])
    found = STATISTICS[statistic](tokens, torch.ones(4, 200, dtype=torch.bool)).argsort().tolist()
    if statistic == "renormalised":  # of both 9 and 16 directions all four are filled
        assert found[:2] == [0, 1]
    else:
        assert found == ([0, 3, 2, 1] if statistic == "truncated" else [0, 1, 2, 3])


def test_continuous_budgets_are_in_proportion_to_effective_ranks():
    """Planted statistics: entropies of ln 1, ln 2 and ln 5, or these ratios themselves; 80 tokens for four heads."""
    ratios = torch.tensor([[1.0, 2.0, 5.0, 2.0]])
    for statistic, planted in (("truncated", ratios.log()), ("participation", ratios)):
        method = kvlib.method("uncomp_continuous", budget=20, statistic=statistic)
        assert method.budgets(Stub(60, planted)).tolist() == [[8, 16, 40, 16]]
        assert method.budgets(Stub(30, planted)).tolist() == [[10, 20, 30, 20]]


def test_the_window_leaves_a_token_to_the_smallest_head():
    """Of 6 tokens a head the smallest has 3: two of the window, one by score."""
    method = kvlib.method("uncomp_continuous", budget=9, window=8)
    stub = Stub(60, torch.tensor([[1.0, 2.0, 6.0]]).log())
    stub.per_prompt = lambda name, compute: compute(stub)
    assert method.budgets(stub).tolist() == [[3, 6, 18]] and method.recent(stub).tolist() == [2]


def test_continuous_budgets_follow_effective_ranks():
    model, ids, traced = reference.tiny_llama(4), prompt(40, 3), []

    def note(head):
        traced.append(head)
        return head.stored

    note.evicts_in_decode = False
    reference.simulate(model, ids, 1, note)
    found = lengths(model, kvlib.method("uncomp_continuous", budget=0.4, **SIZES), ids)
    for layer, kept in enumerate(found.tolist()):
        heads = sorted((head for head in traced if head.layer == layer), key=lambda head: head.index)
        ranks = [np.exp(truncated(head, head.index, 40)) for head in heads]
        assert sum(kept) == 64 and np.abs(np.array(kept) - 64 * np.array(ranks) / sum(ranks)).max() < 1


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 50), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_whole_numbers_in_proportion(weights, mean, beyond):
    most = mean + beyond
    found = proportional(weights, len(weights) * mean, most)
    assert sum(found) == len(weights) * mean and min(2, mean) <= min(found) and max(found) <= most
    inside = [(number / weight, weight) for number, weight in zip(found, weights) if 2 < number < most]
    for one, w in inside:  # one factor for all that no bound holds, up to one token
        for other, v in inside:
            assert abs(one - other) <= 1 / w + 1 / v + 1e-6
        assert all(number / v >= one - 1 / w - 1 / v for number, v in zip(found, weights) if number < most)
        assert all((number - 1) / v <= one + 1 / w for number, v in zip(found, weights) if number > 2)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("uncomp_random", {"seed": -1}, "seed=-1: a whole number >= 0"),
        ("uncomp_random", {"types": "minilm"}, "types='minilm': heads are typed by lot"),
        ("uncomp_continuous", {"groups": 2}, "groups=2: budgets follow from entropies alone"),
        ("uncomp", {"statistic": "rank"}, "statistic='rank': 'truncated' or 'full'"),
        ("uncomp", {"statistic": "full", "types": "minilm"}, "statistic='full': calibrations hold truncated"),
    ],
)
def test_impossible_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method(name, budget=0.5, **arguments)
