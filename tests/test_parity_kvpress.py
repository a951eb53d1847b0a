"""Our baselines keep what kvpress keeps (`parity/kvpress/README.md`), and where they do not."""

import json
from functools import cache
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kvlib

DATA = Path(__file__).parent / "parity" / "kvpress"
CASES = json.loads((DATA / "cases.json").read_text())
RATIOS = CASES["compression_ratios"]
SNAPKV = [(64, 5), (32, 7), (8, 5)]
PYRAMIDKV = [(64, 5, 20), (8, 5, 20), (8, 5, 4), (4, 7, 10)]

inputs = pytest.mark.parametrize(("kind", "prompt"), [(kind, p) for kind in ("mha", "gqa") for p in range(3)])


@cache
def load(kind):
    return AutoModelForCausalLM.from_pretrained(DATA / f"model_{kind}", dtype=torch.float32).eval()


@cache
def recorded(name):
    return np.load(DATA / "kept.npz")[name]


def masks(name, press, ratio, kind, prompt):
    """One recorded boolean array `(layers, KV heads, tokens)`."""
    packed = recorded(f"{kind}_p{prompt}_{name}")[CASES["presses"].index(press), RATIOS.index(ratio)]
    return np.unpackbits(packed, axis=-1, count=CASES["n_tokens"][prompt]).astype(bool)


@torch.no_grad()
def keep(method, kind, prompt):
    """What `method` keeps of a recorded prompt `(layers, KV heads, tokens)`, the run, and the last logits."""
    ids = torch.from_numpy(recorded(f"{kind}_p{prompt}_ids").astype(np.int64))[None]
    with method(load(kind)) as run:
        logits = run.model(ids).logits[0, -1]
    kept = [run.kept(layer)[0] for layer in range(4)]
    assert all((layer.diff(dim=-1) > 0).all() for layer in kept)  # in text order, kvpress stores high scores first
    mask = [torch.zeros(len(layer), ids.shape[1], dtype=torch.bool).scatter_(-1, layer, True) for layer in kept]
    return torch.stack(mask).numpy(), run, logits


def assert_equal_sets(ours, press, ratio, kind, prompt):
    """Equal but for exchanges among ambiguous positions, in a head at most 6 (copies of a token in the first layer)."""
    theirs, ambiguous = (masks(name, press, ratio, kind, prompt) for name in ("keep", "ambiguous"))
    assert (ours.sum(-1) == theirs.sum(-1)).all()
    assert (ours == theirs)[~ambiguous].all()
    assert ambiguous.sum(-1).max() <= 6


@inputs
def test_the_checkpoints_compute_what_was_recorded(kind, prompt):
    logits = keep(kvlib.method("full"), kind, prompt)[2]
    np.testing.assert_allclose(logits, recorded(f"{kind}_p{prompt}_last_logits"), rtol=0, atol=1e-5)


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_snapkv(kind, prompt, ratio):
    for window, kernel in SNAPKV:
        press = f"snapkv_w{window}_k{kernel}"
        count = masks("keep", press, ratio, kind, prompt)[0, 0].sum().item()
        if count >= 2 * window:
            method = kvlib.method("snapkv", budget=count, window=window, kernel=kernel, pooling="avg")
            assert_equal_sets(keep(method, kind, prompt)[0], press, ratio, kind, prompt)


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_knorm(kind, prompt, ratio):
    count = masks("keep", "knorm", ratio, kind, prompt)[0, 0].sum().item()
    assert_equal_sets(keep(kvlib.method("knorm", budget=count), kind, prompt)[0], "knorm", ratio, kind, prompt)


@inputs
@pytest.mark.parametrize("renumber", [True, False])
def test_streaming_llm(kind, prompt, renumber):
    for ratio in RATIOS:
        for sinks in (4, 1):
            theirs = masks("keep", f"streamingllm_s{sinks}", ratio, kind, prompt)
            method = kvlib.method("streaming_llm", budget=theirs[0, 0].sum().item(), sinks=sinks, renumber=renumber)
            assert (keep(method, kind, prompt)[0] == theirs).all()


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_pyramidkv_with_the_counts_of_kvpress(kind, prompt, ratio):
    """Which tokens stay once each layer's count is given; counts are compared below."""
    compared = 0
    for window, kernel, beta in PYRAMIDKV:
        press = f"pyramidkv_w{window}_k{kernel}_b{beta}"
        counts = masks("keep", press, ratio, kind, prompt)[:, 0].sum(-1).tolist()
        if min(counts) < window or round(CASES["n_tokens"][prompt] * (1 - ratio)) < 2 * window:
            continue  # there the windows differ

        class Counted(kvlib.METHODS["pyramidkv"]):
            def budgets(self, view, counts=counts):
                return torch.full_like(view.lengths, counts[view.layer_idx])

        method = Counted(1 - ratio, window=window, kernel=kernel, pooling="avg", beta=beta)
        assert_equal_sets(keep(method, kind, prompt)[0], press, ratio, kind, prompt)
        compared += 1
    assert compared >= 2


@inputs
def test_tova_but_for_the_last_token(kind, prompt):
    """kvpress pins the last token, ours goes by its attention: at most this one token is exchanged for another."""
    exchanged = 0
    for ratio in RATIOS:
        theirs = masks("keep", "tova", ratio, kind, prompt)
        ours = keep(kvlib.method("tova", budget=theirs[0, 0].sum().item()), kind, prompt)[0]
        assert (ours == ours[:, :1]).all() and theirs[..., -1].all()
        for layer in range(4):
            differ = (ours[layer] != theirs[layer])[0].nonzero()[0].tolist()
            if ours[layer, 0, -1]:
                assert differ == []
            else:
                assert len(differ) == 2 and differ[1] == theirs.shape[-1] - 1
                exchanged += 1
    assert exchanged < 16


# Where we depart on purpose


@inputs
def test_departure_snapkv_leaves_half_of_a_small_budget_to_the_prompt(kind, prompt):
    """Below 2 windows kvpress spends the budget on the window first, and below 1 keeps nothing else; ours halves it."""
    shown = 0
    for window, kernel in SNAPKV:
        for ratio in RATIOS:
            theirs = masks("keep", f"snapkv_w{window}_k{kernel}", ratio, kind, prompt)
            count, n = theirs[0, 0].sum().item(), theirs.shape[-1]
            if count >= 2 * window:
                continue
            shown += 1
            assert (theirs[..., n - window :].sum(-1) == min(count, window)).all()
            method = kvlib.method("snapkv", budget=count, window=window, kernel=kernel, pooling="avg")
            ours, run, _ = keep(method, kind, prompt)
            half = count // 2
            assert run.clamped["window"].tolist() == [half]
            assert ours[..., n - half :].all()
            assert ours[..., : n - half].sum(-1).tolist() == np.full(ours.shape[:2], count - half).tolist()
            if count <= window:
                assert not theirs[..., : n - window].any()
                assert ours[..., : n - window].any()
    assert shown >= 3


def test_departure_a_budget_is_what_is_kept():
    """kvpress rounds 200 x (1 - 0.9), which is 19.99... in floating point; we are told the share that stays, 0.1."""
    assert masks("keep", "knorm", 0.9, "mha", 0).sum(-1).max() == 19
    assert keep(kvlib.method("knorm", budget=0.1), "mha", 0)[0].sum(-1).min() == 20
    assert keep(kvlib.method("knorm", budget=1 - 0.9), "mha", 0)[0].sum(-1).max() == 19


def test_departure_snapkv_defaults_are_those_of_the_papers_runs():
    """Window 32, kernel 7 and max pooling, where kvpress takes averages of 5: other tokens stay."""
    theirs = masks("keep", "snapkv_w64_k5", 0.5, "mha", 2)
    ours = keep(kvlib.method("snapkv", budget=theirs[0, 0].sum().item()), "mha", 2)[0]
    assert (ours.sum(-1) == theirs.sum(-1)).all()
    assert (ours != theirs).any(-1).all()


@inputs
def test_departure_pyramidkv_counts_are_those_of_its_authors(kind, prompt):
    """The window on top of every layer's count and no pyramid for short prompts; there it is part of the count."""
    n, different = CASES["n_tokens"][prompt], 0
    for window, kernel, beta in PYRAMIDKV:
        for ratio in RATIOS:
            theirs = masks("keep", f"pyramidkv_w{window}_k{kernel}_b{beta}", ratio, kind, prompt)[:, 0].sum(-1)
            total = n * (1 - ratio)
            least, most = total / beta, 2 * total - total / beta
            if most >= n - window:
                least, most = 2 * total - (n - window), n - window
            if n >= most >= least >= window:
                assert theirs.tolist() == [round(most - layer * (most - least) / 3) for layer in range(4)]
            else:
                assert theirs.tolist() == [max(1, round(total))] * 4

            budget = round(total)
            mean = budget - min(window, budget // 2)
            least, most = mean // beta, 2 * mean - mean // beta
            if most >= n - budget + mean:
                least, most = 2 * mean - (n - budget + mean), n - budget + mean
            line = [most - layer * (most - least) / 3 for layer in range(4)]
            counts = [budget - mean + (floor(x) if x > mean else ceil(x)) for x in line]
            method = kvlib.method("pyramidkv", budget=budget, window=window, kernel=kernel, beta=beta)
            ours = keep(method, kind, prompt)[0].sum(-1)
            assert (ours == ours[:, :1]).all()
            assert ours[:, 0].tolist() == (counts if n >= 2 * mean else [budget] * 4)
            assert ours[:, 0].mean() == budget  # theirs is rounded layer by layer, and in the code up to 1.5 above
            different += ours[:, 0].tolist() != theirs.tolist()
    assert different
