"""The real model computes what was recorded, and ours keep what kvpress keeps (`parity/kvpress_smollm2/README.md`)."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import kvlib
from kvlib import smollm2
from kvlib.core.method import Method
from kvlib.methods.loki import principal

RECORDED = np.load(Path(__file__).parent / "parity" / "kvpress_smollm2" / "kept.npz")
LAYERS, OBSERVED = 30, (0, 14, 29)
ALMOST_TIED = 1e-5  # relative
SNAPKV = {"window": 64, "kernel": 5}, {"window": 32, "kernel": 7}

pytestmark = pytest.mark.skipif(
    os.environ.get("MODEL") == "minilm" and not (smollm2.cache() / "smollm2").exists(),
    reason="MODEL=minilm: the real model was not fetched",
)
prompts = pytest.mark.parametrize("prompt", "AB")
ratios = pytest.mark.parametrize("ratio", (50, 75))


@cache
def model():
    return kvlib.load("smollm2")[0]


@cache
def read(prompt):
    """A snapshot of a prompt, which methods start from."""
    return kvlib.snapshot(model(), torch.from_numpy(RECORDED[f"{prompt}_ids"].astype(np.int64))[None])


def kept(method, prompt):
    """Positions that a method keeps, by layer and head."""
    with method(model()) as run:
        run.fork(read(prompt))
    return [[set(head[head >= 0].tolist()) for head in run.kept(layer)[0]] for layer in range(LAYERS)]


def assert_same(method, press, ratio, prompt):
    """Equal sets; where scores almost tie, one token may be exchanged."""
    theirs, margins = (RECORDED[f"{prompt}_{press}_r{ratio}_{what}"] for what in ("kept", "margin"))
    for layer, heads in enumerate(kept(method, prompt)):
        for head, ours in enumerate(heads):
            expected = set(theirs[layer, head].tolist()) - {-1}
            assert len(ours) == len(expected)
            assert len(ours - expected) <= (abs(margins[layer, head]) < ALMOST_TIED), (layer, head)


def budget(press, ratio, prompt):
    return int(RECORDED[f"{prompt}_{press}_r{ratio}_count"][0])


def test_the_weights_are_those_of_the_recordings():
    sums = (smollm2.fetch() / smollm2.SUMS).read_text()
    assert "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b  model.safetensors" in sums


@prompts
def test_logits_and_greedy_tokens_are_the_recorded_ones(prompt):
    values, ids = read(prompt).logits[0].topk(10)
    assert ids.tolist() == RECORDED[f"{prompt}_top_ids"].tolist()
    np.testing.assert_allclose(values, RECORDED[f"{prompt}_top_logits"], rtol=0, atol=1e-3)
    assert decoded(kvlib.method("full"), prompt) == RECORDED[f"{prompt}_full_new"].tolist()


@torch.no_grad()
def decoded(method, prompt, tokens=12):
    """What greedy decoding writes when the method has read the prompt."""
    with method(model()) as run:
        run.fork(read(prompt))
        chosen = [read(prompt).logits.argmax(-1)]
        while len(chosen) < tokens:
            chosen.append(model()(chosen[-1][:, None], past_key_values=run.cache).logits[:, -1].argmax(-1))
    return torch.cat(chosen).tolist()


@prompts
@ratios
@pytest.mark.parametrize("settings", SNAPKV, ids=str)
def test_snapkv(prompt, ratio, settings):
    press = f"snapkv_w{settings['window']}_k{settings['kernel']}"
    assert_same(
        kvlib.method("snapkv", budget=budget(press, ratio, prompt), pooling="avg", **settings), press, ratio, prompt
    )


def test_snapkv_writes_what_kvpress_writes():
    press = "snapkv_w64_k5"
    method = kvlib.method("snapkv", budget=budget(press, 75, "A"), window=64, kernel=5, pooling="avg")
    assert decoded(method, "A") == RECORDED[f"A_{press}_r75_new"].tolist()


@prompts
@ratios
@pytest.mark.parametrize(
    ("name", "press"), [("streaming_llm", "streaming_llm_s4"), ("tova", "tova"), ("knorm", "knorm")]
)
def test_other_methods(prompt, ratio, name, press):
    assert_same(kvlib.method(name, budget=budget(press, ratio, prompt)), press, ratio, prompt)


@prompts
def test_pyramidkv_with_the_counts_of_kvpress(prompt):
    press = "pyramidkv_w64_k5_b20"
    counts = RECORDED[f"{prompt}_{press}_r50_count"].tolist()

    class Counted(kvlib.METHODS["pyramidkv"]):
        def budgets(self, view):
            return torch.full_like(view.lengths, counts[view.layer_idx])

    assert_same(Counted(0.5, window=64, kernel=5, pooling="avg", beta=20), press, 50, prompt)


@prompts
def test_column_sums_and_norms_of_values(prompt):
    found = {}

    class Watched(Method):
        def observe(self, view):
            if view.layer_idx in OBSERVED:
                found[view.layer_idx] = view.column_sums()[0].sum(1), view.value[0].abs().sum(-1)

    with Watched()(model()) as run:
        run.fork(read(prompt))
    for layer, sums, norms in zip(OBSERVED, RECORDED[f"{prompt}_column_sums"], RECORDED[f"{prompt}_value_l1"]):
        np.testing.assert_allclose(found[layer][0], sums, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[layer][1], norms, rtol=1e-3)


@prompts
def test_shipped_directions_are_those_of_its_keys(prompt):
    """Sixteen hold, of a text that they were not made of, most of what its own hold; random ones at most half."""
    with kvlib.method("loki", budget=32, calibration="smollm2")(model()) as run:
        run.fork(read(prompt))
    for layer in run.cache.layers:
        key = layer.tail.rectangle(layer.tail.fields["key"])[0]
        own, shipped = principal(key, torch.ones_like(key[..., 0], dtype=torch.bool)), layer.rows["directions"][0]
        centred = key - key.mean(1, keepdim=True)
        held = [(centred @ directions).square().sum((1, 2)) for directions in (own[..., :16], shipped)]
        assert (held[1] / held[0]).min() > 0.7
