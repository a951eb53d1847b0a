"""Later systems keep what kvpress keeps (`parity/kvpress_more/README.md`)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parity_kvpress import load
from test_parity_kvpress import recorded as prompts

import kvlib

DATA = Path(__file__).parent / "parity" / "kvpress_more"
CASES = json.loads((DATA / "cases.json").read_text())
RATIOS = CASES["compression_ratios"]

inputs = pytest.mark.parametrize(("kind", "prompt"), [(kind, p) for kind in ("mha", "gqa") for p in range(3)])


@cache
def recorded(name):
    return np.load(DATA / "kept.npz")[name]


def masks(press, ratio, kind, prompt):
    """What is kept, and what is ambiguous: boolean arrays `(layers, KV heads, tokens)`."""
    place = CASES["presses"].index(press), RATIOS.index(ratio)
    return [
        np.unpackbits(recorded(f"{kind}_p{prompt}_{name}")[place], axis=-1, count=CASES["n_tokens"][prompt]).astype(
            bool
        )
        for name in ("keep", "ambiguous")
    ]


@torch.no_grad()
def keep(method, kind, prompt):
    """What `method` keeps of a recorded prompt `(layers, KV heads, tokens)`; heads may differ in how many that is."""
    ids = torch.from_numpy(prompts(f"{kind}_p{prompt}_ids").astype(np.int64))[None]
    with method(load(kind)) as run:
        run.model(ids)
    everything = range(ids.shape[1])
    return np.array([[np.isin(everything, head) for head in run.kept(layer)[0]] for layer in range(4)])


def equal_sets(name, press, ratio, kind, prompt, exchanged, **settings):
    """Equal but for exchanges among ambiguous positions, in a head at most `exchanged` of them."""
    theirs, ambiguous = masks(press, ratio, kind, prompt)
    count = int(theirs[0].sum()) // len(theirs[0])
    ours = keep(kvlib.method(name, budget=count, **settings), kind, prompt)
    assert (ours.sum((1, 2)) == theirs.sum((1, 2))).all()
    assert (ours == theirs)[~ambiguous].all()
    assert ambiguous.sum(-1).max() <= exchanged
    return ours, theirs


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_keydiff(kind, prompt, ratio):
    equal_sets("keydiff", "keydiff", ratio, kind, prompt, 0)


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_expected_attention(kind, prompt, ratio):
    equal_sets("expected_attention", "expected_attention", ratio, kind, prompt, 2)
    equal_sets("expected_attention", "expected_attention_f16_s1", ratio, kind, prompt, 2, future=16, sinks=1)


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("window, kernel", [(8, 5), (32, 7)])
def test_critical_kv(kind, prompt, ratio, window, kernel):
    """Where the first half of the budget holds the window; else kvpress lets later tokens of it go."""
    press = f"criticalkv_snapkv_w{window}_k{kernel}"
    theirs, ambiguous = masks(press, ratio, kind, prompt)
    count = int(theirs[0, 0].sum())
    if count < 2 * window:
        return

    class Averaging(kvlib.METHODS["critical_kv"]):
        @property
        def hosted(self):
            return kvlib.method("snapkv", budget=self.budget, window=window, kernel=kernel, pooling="avg")

    ours = keep(Averaging(count), kind, prompt)
    assert (ours.sum(-1) == theirs.sum(-1)).all()
    assert (ours == theirs)[~ambiguous].all()
    assert ambiguous.sum(-1).max() <= 2


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
def test_adakv_without_a_floor(kind, prompt, ratio):
    """With one they differ: kvpress keeps each head's best tokens first, its authors mix numbers."""
    compared = 0
    for window, kernel in ((8, 5), (32, 7)):
        press = f"adakv_snapkv_w{window}_k{kernel}"
        if int(masks(press, ratio, kind, prompt)[0][0, 0].size * (1 - ratio)) >= 2 * window:
            settings = {"window": window, "kernel": kernel, "pooling": "avg", "floor": 0.0}
            ours, _ = equal_sets("adakv", press, ratio, kind, prompt, 4, **settings)
            compared += len({*ours.sum(-1).flatten().tolist()}) > 1
    assert compared >= (2 if ratio < 0.75 else 1)


@inputs
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sinks, lag", [(4, 16), (1, 32)])
def test_lagkv(kind, prompt, ratio, sinks, lag):
    """Tokens of one rank in their blocks are exchanged for each other: kvpress chooses among them arbitrarily.

    A budget that what always stays exceeds is not compared: kvpress keeps an arbitrary part of it.
    """
    press = f"lagkv_s{sinks}_l{lag}"
    theirs, ambiguous = masks(press, ratio, kind, prompt)
    n = theirs.shape[-1]
    blocks = (n - sinks) // lag
    certain = n - (blocks - 1) * lag
    if theirs[0, 0].sum() >= certain:
        ours, _ = equal_sets("lagkv", press, ratio, kind, prompt, blocks - 1, sinks=sinks, lag=lag)
        assert (ours & ambiguous).sum(-1).tolist() == (theirs & ambiguous).sum(-1).tolist()
    else:
        assert (sinks, lag, ratio) in [(4, 16, 0.9), (1, 32, 0.9), (1, 32, 0.75)]
