"""What lessons 02 and 02c measure of heads and of needles, by hand and by loops."""

import math

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import AutoTokenizer

import kvlib
from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.lessons import entropies, head_budgets, needles
from kvlib.lab.plotting import COLORS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


# Entropies


@pytest.mark.parametrize("tensor", entropies.TENSORS)
def test_spectra_are_those_of_every_head(tensor):
    snapshot = kvlib.snapshot(tiny.model("llama-gqa"), tiny.tokens(1, 30))
    found = entropies.spectra(snapshot, tensor)
    assert found.shape == (2, 4 if tensor == "query" else 2, 8) and found.dtype == torch.float64
    rows = snapshot.layers[1][entropies.TENSORS.index(tensor)][0, 1].numpy()  # layer 1, head 1
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert found[1, 1].tolist() == pytest.approx(np.linalg.svd(rows, compute_uv=False) ** 2 / 30, abs=1e-12)


def test_statistics_of_a_flat_spectrum():
    """m equal directions of 16, of which 4 count: ln m, (4/m) ln m beyond 4, ln 4 renormalised, m."""
    for m in (1, 2, 4, 8, 16):
        flat = torch.zeros(16, dtype=torch.float64)
        flat[:m] = 1 / m
        found = {name: x.item() for name, x in entropies.statistics(flat).items()}
        kept = min(4, m)
        expected = {
            "truncated": kept / m * math.log(m),
            "full": math.log(m),
            "renormalised": math.log(kept),
            "participation": m,
        }
        assert found == pytest.approx(expected, abs=1e-12)


def test_trends_over_depth_and_within_layers():
    rising = torch.arange(6.0)[:, None] + torch.tensor([0.0, 10.0, 3.0])
    assert entropies.depth_trend(rising) == pytest.approx(1) == -entropies.depth_trend(-rising)
    inside = entropies.within_layers(rising)
    assert inside.tolist() == pytest.approx(6 * [-13 / 3, 17 / 3, -4 / 3], abs=1e-5)  # depth has no part in it


def test_a_correlation_and_its_interval():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 20, generator=generator)
    second = first + torch.randn(4, 20, generator=generator)
    value, low, high = entropies.correlation(first, second)
    assert value == pytest.approx(stats.spearmanr(first.flatten(), second.flatten()).statistic)
    assert low < value < high
    fisher = np.tanh(np.arctanh(value) + np.array([-1, 1]) * 1.96 * 1.03 / math.sqrt(77))  # roughly that of theory
    assert [low, high] == pytest.approx(fisher.tolist(), abs=0.07)
    assert entropies.correlation(first, second) == (value, low, high)


def test_places():
    score = torch.arange(10.0).view(2, 5)
    chosen = torch.zeros(2, 5, dtype=torch.bool)
    chosen[1, 3:] = True  # the two highest of ten
    mean, p = entropies.place(score, chosen)
    assert mean == pytest.approx((8 / 9 + 1) / 2)
    assert p == pytest.approx(2 / 45, abs=0.01)  # of 45 pairs the highest and the lowest are as far from the middle
    assert entropies.place(-score, chosen) == (pytest.approx(1 - mean), pytest.approx(p, abs=0.01))
    middle, even = entropies.place(score, torch.tensor([[True] + 4 * [False], 4 * [False] + [True]]))
    assert (middle, even) == (0.5, 1)


def test_statistics_beside_copying():
    """A statistic that only says how deep a head is has no place within layers."""
    generator = torch.Generator().manual_seed(0)
    looked = 0.4 * torch.rand(6, 5, generator=generator).double()
    looked[4, 1] = looked[4, 3] = looked[5, 1] = 0.9
    depth = torch.arange(6.0).double()[:, None] + 0.001 * torch.rand(6, 5, generator=generator)
    rows = entropies.beside_copying({"depth": depth, "copying": looked}, looked)
    assert rows.loc["copying", ["correlation", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert rows.loc["copying", "place"] == pytest.approx((27 + 28 + 29) / 3 / 29)
    assert tuple(rows.loc["depth", ["place", "p"]]) == entropies.place(depth, looked >= 0.5)
    assert rows.loc["depth", "place"] > 0.7 and rows.loc["copying", "within"] > 0.9
    inside = (depth - depth.mean(1, keepdim=True)).flatten()
    assert tuple(rows.loc["depth", ["within", "p within"]]) == entropies.place(inside, (looked >= 0.5).flatten())


def test_three_excerpts(tokenizer):
    found = entropies.excerpts(tokenizer, 50)
    assert {name: len(ids) for name, ids in found.items()} == {"prose": 50, "code": 50, "random": 50}
    assert "CHAPTER 1. " in tokenizer.decode(found["prose"])
    assert len({*found["random"]}) > 40 and not {*found["random"]} & {*tokenizer.all_special_ids}
    assert (
        found["random"] == entropies.excerpts(tokenizer, 50)["random"] != entropies.excerpts(tokenizer, 50, 1)["random"]
    )


# Needles


def test_the_released_score_of_needles():
    """Nine words of the needle's 21 are given: 2 · 9 / (9 + 21) for an empty answer."""
    assert needles.rouge1(needles.PREFIX, needles.NEEDLE) == pytest.approx(60)
    assert needles.rouge1(needles.PREFIX + 20 * " word", needles.NEEDLE) == pytest.approx(36)
    assert needles.rouge1(needles.NEEDLE.upper(), needles.NEEDLE) == 100
    assert needles.rouge1("", needles.NEEDLE) == 0 == needles.rouge1("", "")
    assert needles.rouge1("a a a", "a b") == pytest.approx(100 * 2 * 1 / 5)  # as often as in both


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_hidden_needle(tokenizer, depth):
    prompt = needles.hidden(tokenizer, 600, depth)
    assert prompt.context.count(needles.NEEDLE) == 1 and prompt.length <= 600
    assert prompt.text.endswith(needles.PREFIX) and needles.NEEDLE.startswith(needles.PREFIX + prompt.answer)
    before, behind = (len(part) for part in prompt.context.split(needles.NEEDLE))
    assert abs(before / (before + behind) - depth) < 0.3
    again, other = needles.hidden(tokenizer, 600, depth), needles.hidden(tokenizer, 600, depth, seed=1)
    assert prompt == again and prompt.context != other.context


def test_found_needles(tokenizer):
    model = tiny.build("llama-gqa", vocab_size=len(tokenizer), max_position_embeddings=1024)
    prompts = {
        (tokens, 0.5): tasks.sample("needle", tokens, 0, tokenizer=tokenizer, depth=0.5) for tokens in (160, 200)
    }
    methods = {"full": kvlib.method("full"), "snapkv": kvlib.method("snapkv", budget=0.2)}
    rows = needles.found(model, tokenizer, prompts, methods)
    assert rows[["tokens", "method"]].to_numpy().tolist() == [[t, m] for t in (160, 200) for m in methods]
    assert not rows["found"].any()
    for row in rows.itertuples():
        prompt = prompts[row.tokens, row.depth]
        line = (prompt.question + prompt.lead).splitlines()[-1]
        assert row.rouge == pytest.approx(needles.rouge1(line + row.answer, line + prompt.answer))
        assert 0 < row.rouge < 100  # a wrong answer behind the given words


# Budgets


def test_looks_differ_and_keep_their_colours():
    names = ["uncomp", "snapkv", "pyramidkv", "vatp (host=snapkv)", *head_budgets.VARIANTS]
    drawn = {(look["color"], look["marker"], look["linestyle"]) for look in map(head_budgets.look, names)}
    assert len(drawn) == len({*names})
    assert head_budgets.look("adakv")["color"] == head_budgets.look("adakv (window=8)")["color"]
    assert head_budgets.look("uncomp")["color"] == COLORS["uncomp"] == head_budgets.look("uncomp_reversed")["color"]
    assert head_budgets.look("uncomp (groups=2)")["label"] == "UNComp (groups=2)"
    assert head_budgets.look("snapkv")["label"] == "SnapKV"
    names = ("uncomp (groups=2)", "uncomp (statistic=full)", "uncomp_random (seed=1)", "uncomp_continuous")
    labels = [head_budgets.chosen(name)["label"] for name in names]
    assert labels == ["by truncated entropy", "by another statistic", "by lot", "by truncated entropy"]


def test_tokens_stored_by_head():
    model = tiny.model("llama-gqa")
    with kvlib.method("uncomp", budget=24, spread=0.5)(model) as run:
        model(tiny.tokens(1, 60))
    stored = head_budgets.tokens_stored(run)
    assert stored.sort(1).values.tolist() == [[12, 36]] * 2
    assert run.stored_bytes() == stored.sum() * 2 * 8 * 8  # keys and values of eight channels in float64


def test_what_some_heads_are_given():
    model, methods = tiny.model("llama-gqa"), {"groups": {"spread": 0.5}, "uniform": {"spread": 0.0}}
    methods = {name: kvlib.method("uncomp", budget=24, **given) for name, given in methods.items()}
    snapshot = kvlib.snapshot(model, tiny.tokens(1, 60))
    with methods["groups"](model) as run:
        run.fork(snapshot)
    richest = head_budgets.tokens_stored(run) == 36
    assert head_budgets.given(model, snapshot, richest, methods) == {"groups": 1.5, "uniform": 1}
    assert head_budgets.given(model, snapshot, ~richest, methods) == {"groups": 0.5, "uniform": 1}


def test_favoured_heads():
    """Half more than the mean for one head of layer 1, nothing changed in layer 0; bytes stay."""
    model, snapshot = tiny.model("llama-gqa"), kvlib.snapshot(tiny.model("llama-gqa"), tiny.tokens(1, 60))
    with head_budgets.Favoured(20, heads=((1, 0),), factor=1.5)(model) as run:
        run.fork(snapshot)
    assert head_budgets.tokens_stored(run).tolist() == [[20, 20], [30, 10]]


def test_right_answers():
    """Our model finds constants with its whole cache, and none in the last few tokens."""
    model, tokenizer = kvlib.load("minilm")
    prompts = [tasks.sample("needle", 200, seed, tokenizer=tokenizer) for seed in (0, 1)]
    methods = {"full": kvlib.method("full"), "streaming_llm": kvlib.method("streaming_llm", budget=12)}
    found = head_budgets.right(model, tokenizer, prompts, methods)
    assert found.to_dict("list") == {"full": [1, 1], "streaming_llm": [0, 0]}
