"""UNComp against a reference that works through one token, one head and one key at a time, and its budgets by hand."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from reference import Host, count, simulate, tiny_llama
from staged import Staged
from test_baselines import decode, lists, prompt

import kvlib
from kvlib.methods import entropy
from kvlib.methods.head_groups import load
from kvlib.methods.uncomp import Prepared

few = settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
SIZES = {"window": 4, "kernel": 3}


@dataclass
class Reference(Host):
    """The method's policy; heads are ranked when one of them is asked for the first time."""

    window: int = 8
    kernel: int = 7
    groups: int | None = None
    spread: float = 2 / 3
    ranks: dict = field(default_factory=dict)
    evicts_in_decode = True

    def __call__(self, head):
        mean = count(self.budget, head.prompt)
        furthest = 0 if self.groups == 1 else max(0, min(int(self.spread * mean), head.prompt - mean))
        budget = mean + above(head, self.ranks, self.groups, furthest)
        if len(head.stored) <= budget:
            return head.stored
        start = head.tokens - max(1, min(self.window, mean - furthest - 1))
        older = [at for at in head.stored if at < start]
        scores = self.received(head, range(start, head.tokens), older)
        reach = self.kernel // 2
        pooled = {at: max(scores[j] for j in older[max(0, i - reach) : i + reach + 1]) for i, at in enumerate(older)}
        newest = [at for at in head.stored if at >= start]
        return self.heaviest(pooled, budget - len(newest)) + newest


def above(head, ranks: dict, groups: int | None, furthest: int) -> int:
    """Tokens that a head has above the mean of its layer, whose order is worked out once."""
    if head.layer not in ranks:
        ranks[head.layer] = ranked(head.neighbours, head.prompt)
    groups = groups or len(head.neighbours)
    group = ranks[head.layer].index(head.index) * groups // len(head.neighbours)
    return 0 if groups == 1 else int(furthest * (2 * group - groups + 1) / (groups - 1))


def ranked(heads, tokens: int) -> list[int]:
    """KV heads of a layer from the lowest entropy of their queries to the highest."""
    means = {head.index: np.mean([truncated(head, h, tokens) for h in head.query_heads]) for head in heads}
    return sorted(means, key=lambda index: (round(float(means[index]), 5), index))


def truncated(head, h, tokens: int) -> float:
    rows = np.array([head.queries[h, at] for at in range(tokens)])
    rows = rows - rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows[lengths > 1e-12]
    if len(rows) == 0:
        return 0.0
    singular = np.linalg.svd(rows / lengths[lengths > 1e-12][:, None], compute_uv=False)
    shares = singular[: rows.shape[1] // 4] ** 2 / len(rows)
    return -sum(share * np.log(share) for share in shares if share > 0)


ARGUMENTS = st.fixed_dictionaries(
    {
        "window": st.integers(1, 9),
        "kernel": st.sampled_from([1, 3, 5]),
        "groups": st.sampled_from([None, 1, 2]),
        "spread": st.floats(0, 0.7),
    }
)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_equals_reference(kv_heads):
    model = tiny_llama(kv_heads)

    @few
    @example({}, 0.01, [13, 30], 3, 0)
    @example({"window": 2}, 9, [1, 6], 6, 1)
    @example({"groups": 2, "spread": 0.5, "window": 3}, 20, [40], 12, 2)
    @example({"window": 8}, 0.35, [40, 12], 10, 3)  # in one row the window gives way
    @example({"window": 9}, 0.35, [30, 9], 10, 4)
    @example({"window": 1, "kernel": 7}, 0.35, [40, 12], 10, 5)  # pooling reaches beyond the last token of a head
    @example({"window": 2, "kernel": 7}, 0.35, [30, 9], 10, 6)
    @given(
        ARGUMENTS,
        st.floats(0.01, 0.99) | st.integers(32, 40),
        st.lists(st.integers(1, 40), min_size=1, max_size=2),
        st.integers(0, 12),
        st.integers(0, 99),
    )
    def check(arguments, budget, lengths, steps, seed):
        prompts = [prompt(length, seed + row) for row, length in enumerate(lengths)]
        logits, kept, _ = decode(kvlib.method("uncomp", budget=budget, **arguments), model, prompts, steps)
        for row, ids in enumerate(prompts):
            expected = simulate(model, ids, steps, Reference(budget, **arguments))
            assert lists(kept, row) == expected.kept
            np.testing.assert_allclose(torch.stack(logits)[:, row], expected.logits, rtol=0, atol=1e-9)

    check()


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
def test_one_group_keeps_of_the_prompt_what_snapkv_keeps(architecture):
    model, rows = tiny.model(architecture), [tiny.tokens(40), tiny.tokens(31, seed=1)]
    kept = []
    for method in (kvlib.method("snapkv", budget=0.5, **SIZES), kvlib.method("uncomp", budget=0.5, groups=1, **SIZES)):
        with method(model) as run:
            model(*tiny.pad(rows))
            kept.append([run.kept(layer).tolist() for layer in range(len(run.cache.layers))])
    assert kept[0] == kept[1]


@given(st.integers(10, 400), st.floats(0.02, 0.98), st.floats(0, 0.9), st.sampled_from([2, 4, 8, None]))
@settings(max_examples=30, deadline=None)
def test_budgets_keep_their_mean_and_rise_with_entropy(tokens, budget, spread, groups):
    """Eight heads with a known order: the mean is that of one budget for all, steps are even, nothing exceeds the
    prompt."""
    rank = torch.tensor([[3, 1, 7, 0, 5, 2, 6, 4]])
    method = kvlib.method("uncomp", budget=budget, spread=spread, groups=groups)
    found = method.budgets(Stub(tokens, rank))
    mean = max(1, int(budget * tokens))
    assert found.double().mean() == mean
    by_rank = [found[0, (rank[0] == r).nonzero().item()].item() for r in range(8)]
    assert by_rank == sorted(by_rank) and by_rank[0] >= 1 and by_rank[-1] <= tokens
    size = 8 // (groups or 8)
    firsts = by_rank[::size]
    assert all(by_rank[i] == firsts[i // size] for i in range(8))
    steps = [b - a for a, b in pairwise(firsts)]
    assert max(steps) - min(steps) <= 2  # rounding towards the mean
    assert by_rank[-1] - mean == min(int(spread * mean), tokens - mean)


class Stub:
    """What `budgets` looks at."""

    def __init__(self, tokens, rank):
        self.prompt_tokens, self.lengths = torch.tensor([tokens]), torch.full_like(rank, tokens)
        self.layer = type("Layer", (), {"rows": {"statistic": rank}})
        self.run = type("Run", (), {"prepared": Prepared(None, {})})

    def clamp(self, name, value, low=None, high=None):
        value = torch.as_tensor(value)
        value = value if high is None else torch.minimum(value, high)
        return value.clamp(min=low)


def test_budgets_of_the_paper():
    """Two groups of 256 and 512 tokens, eight from 129 to 640 in steps of 73."""
    rank = torch.arange(8)[None]
    two = kvlib.method("uncomp", budget=384, groups=2, spread=1 / 3).budgets(Stub(4096, rank))
    assert two.tolist() == [[256] * 4 + [512] * 4]
    eight = kvlib.method("uncomp", budget=384, spread=2 / 3).budgets(Stub(4096, rank))[0]
    published = torch.tensor([129, 202, 275, 348, 421, 494, 567, 640])
    assert (eight - published).abs().max() <= 1


def planted(ranks: list[int], tokens: int = 60, dim: int = 16) -> torch.Tensor:
    """Queries `(1, heads, tokens, dim)` that fill so many directions each."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(tokens, r, generator=draw) @ torch.randn(r, dim, generator=draw) for r in ranks])[
        None
    ]


def test_heads_of_known_rank_get_budgets_in_this_order():
    """Up to k = dim / 4 directions; beyond them the truncated entropy falls again, as it does in the release."""
    queries = planted([3, 1, 4, 2])
    found = entropy.entropy(entropy.spectrum(queries), entropy.truncation(16))
    rank = found.argsort(dim=1).argsort(dim=1)
    assert rank.tolist() == [[2, 0, 3, 1]]
    assert kvlib.method("uncomp", budget=40, spread=0.6).budgets(Stub(60, rank)).tolist() == [[46, 20, 60, 34]]


@pytest.mark.parametrize("alike", [{"groups": 1}, {"spread": 0.0}])
def test_where_all_heads_are_alike_no_entropy_is_worked_out(alike, monkeypatch):
    monkeypatch.setattr("kvlib.methods.head_groups.spectrum", None)
    kvlib.method("uncomp", budget=9, **alike)  # no group has less, and a token beside the window is enough
    model = tiny.model("llama-gqa")
    with kvlib.method("uncomp", budget=0.5, **SIZES, **alike)(model) as run:
        tiny.generate(model, run, [tiny.tokens(30)])
        assert all((layer.lengths == 15).all() and "statistic" not in layer.rows for layer in run.cache.layers)


def test_later_turns_keep_the_groups_of_the_first():
    model, method = tiny.model("llama-gqa"), kvlib.method("uncomp", budget=0.5, spread=0.5, **SIZES)
    with method(model) as run:
        first = tiny.generate(model, run, [tiny.tokens(30)])
        entropies = [layer.rows["statistic"].tolist() for layer in run.cache.layers]
        tiny.generate(model, run, [tiny.tokens(20, seed=5)], before=first)
        assert [layer.rows["statistic"].tolist() for layer in run.cache.layers] == entropies
        assert not any({"queries", "asked"} & {*layer.rows} for layer in run.cache.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups=0: a number >= 1, or None"),
        ({"spread": 1.0}, r"spread=1.0: a share of the mean budget, in \[0, 1\)"),
        ({"budget": 24}, "budget=24: the smallest group has 8 of them, and the window alone takes 8"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("uncomp", **{"budget": 0.5, **arguments})
    kvlib.method("uncomp", budget=25)


def test_groups_have_heads_and_are_symmetric():
    model, method = tiny.model("llama-gqa"), kvlib.method("uncomp", budget=0.5, groups=4)
    with pytest.raises(ValueError, match="groups=4: groups of 2 KV heads whose"), method(model):
        model(tiny.tokens(30)[None])
    with pytest.raises(ValueError, match="groups=2: groups of 3 KV heads whose"):
        kvlib.method("uncomp", budget=0.5, groups=2).symmetric(3)
    assert kvlib.method("uncomp", budget=0.5, groups=3).symmetric(4) == 3


# Stages


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("tokens", [40, 11])
def test_stages_equal_stock_layers_that_get_fewer_tokens(architecture, tokens):
    model, ids = tiny.build(architecture, num_hidden_layers=5), tiny.tokens(tokens)[None]
    counts = {1: max(4, int(0.75 * tokens)), 3: max(4, int(0.5 * tokens))}
    expected = Staged(model, ids, counts, 3, {0, *range(tokens - 3, tokens)})
    # As many tokens as there are: nothing is evicted from what layers have read.
    method = kvlib.method("uncomp_stage", budget=tokens, spread=0, window=3, starts=(1, 3), shortest=0.5)
    with method(model) as run, torch.no_grad():
        logits = model(ids).logits[0, -1]
        for layer, positions in enumerate(expected.positions):
            assert run.kept(layer)[0].tolist() == [positions] * 2
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-9)
    counts = [len(positions) for positions in expected.positions]
    assert counts == [tokens, int(0.75 * tokens), int(0.75 * tokens), int(0.5 * tokens), int(0.5 * tokens)]


def test_layers_store_their_budgets_or_all_that_they_have_read():
    model, rows = tiny.build("llama-gqa", num_hidden_layers=4), [tiny.tokens(40), tiny.tokens(21, seed=1)]
    arguments = {"budget": 0.6, "spread": 0.5, "starts": (2, 3), "shortest": 0.5, **SIZES}
    with kvlib.method("uncomp_stage", **arguments)(model) as run:
        model(*tiny.pad(rows))
        lengths = torch.stack([layer.lengths.sort(dim=1).values for layer in run.cache.layers])
        assert lengths[:, 0].tolist() == [[12, 36], [12, 36], [12, 30], [12, 20]]
        assert lengths[:, 1].tolist() == [[6, 18], [6, 18], [6, 15], [6, 10]]
        assert run.stored_bytes() == lengths.sum() * 2 * 8 * 8 and run.full_bytes() == 61 * 4 * 2 * 2 * 8 * 8


def test_released_stages_at_other_depths():
    model = tiny.build("llama-gqa", num_hidden_layers=30)
    prepared = kvlib.method("uncomp_stage", budget=0.5).prepare(model)
    assert [*prepared.shares] == [1, 14, 24, 29] and [*prepared.shares.values()] == pytest.approx(
        [0.84375, 0.6875, 0.53125, 0.375]
    )


def test_questions_are_not_shortened():
    model, columns = tiny.build("llama-gqa", num_hidden_layers=4), []
    model.model.layers[3].register_forward_hook(lambda layer, args, output: columns.append(args[0].shape[1]))
    method = kvlib.method("uncomp_stage", budget=30, spread=0, window=2, starts=(2,), shortest=0.4)
    with method(model) as run:
        run.read(input_ids=tiny.tokens(30)[None])
        before = [layer.lengths.tolist() for layer in run.cache.layers]
        assert before == [[[30, 30]]] * 2 + [[[12, 12]]] * 2
        run.ask(input_ids=tiny.tokens(9, seed=1)[None], max_new_tokens=2)
        assert [layer.lengths.tolist() for layer in run.cache.layers] == before
    assert columns == [12, 9, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": (0, 2)}, "starts=\\(0, 2\\): a tuple of layers >= 1"),
        ({"starts": (3, 2)}, "starts=\\(3, 2\\): a tuple of layers >= 1, ascending"),
        ({"shortest": 0.0}, "shortest=0.0: a share of the prompt"),
    ],
)
def test_impossible_stages_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("uncomp_stage", budget=0.5, **arguments)


def test_stages_of_layers_that_there_are_not():
    model = tiny.model("llama-gqa")
    with pytest.raises(ValueError, match="starts=\\(1, 2\\): of 2 layers"):
        kvlib.method("uncomp_stage", budget=0.5, starts=(1, 2))(model).__enter__()


# Calibrated


@pytest.mark.parametrize(("groups", "across"), [(2, False), (None, False), (8, True), (5, True)])
def test_a_calibration_says_the_groups(groups, across):
    """The published labels give each head its budget; over all heads the mean is the budget."""
    model, tokenizer = kvlib.load("minilm")
    ids = tokenizer("import os\n" * 60, return_tensors="pt").input_ids[:, :100]
    arguments = {"budget": 50, "groups": groups, "spread": 0.5, "types": "minilm", "across": across}
    with kvlib.method("uncomp", **arguments)(model) as run:
        model(ids)
        kept = torch.stack([layer.lengths[0] for layer in run.cache.layers])
    labels = load("minilm", model).groups(groups or 8, over_layers=across)
    last = int(labels.max())
    assert last + 1 == (groups or 8)
    assert kept.tolist() == [[50 + int(25 * (2 * label - last) / last) for label in row] for row in labels.tolist()]
    assert kept.double().mean() == 50 and (kept.double().mean(1) == 50).all() != across


def test_calibrations_that_do_not_fit():
    with pytest.raises(ValueError, match="across=True: only with a calibration"):
        kvlib.method("uncomp", budget=0.5, across=True)
    with pytest.raises(ValueError, match="minilm"):
        kvlib.method("uncomp", budget=0.5, types="minilm")(tiny.model("llama-gqa")).__enter__()
