"""H2O keeps, step by step, what the VATP authors' code keeps (`parity/vatp/README.md`), and where it does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kvlib
from kvlib import baselines

DATA = Path(__file__).parent / "parity" / "vatp"
FULL, H2O = np.load(DATA / "p0_full.npz"), np.load(DATA / "p0_h2o.npz")
STEPS, LAYERS, HEADS, COLUMNS = H2O["keep"].shape
PROMPT = torch.from_numpy(H2O["prompt_ids"].astype(np.int64))


class Watched(baselines.H2O):
    """H2O that notes, per run and layer, the scores that the first selection ranks."""

    def score(self, view):
        view.run.__dict__.setdefault("scores", []).append(view.state["attention"])
        return super().score(view)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DATA / "model", dtype=torch.float32).eval()


@torch.no_grad()
def decode(method, model, rows, steps=STEPS - 1):
    """Greedy decoding: logits `(steps, rows, vocabulary)`, kept `(steps, layers, rows, heads, columns)`, the run."""
    ids, logits, keep = rows, [], []
    with method(model) as run:
        for _ in range(steps + 1):
            logits.append(model(ids, past_key_values=run.cache if logits else None).logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            kept = torch.stack([run.kept(layer) for layer in range(LAYERS)])
            keep.append(torch.zeros(*kept.shape[:3], rows.shape[1] + steps, dtype=torch.bool).scatter_(-1, kept, True))
    return torch.stack(logits), torch.stack(keep), run


def test_full_cache(model):
    logits, keep, _ = decode(kvlib.method("full"), model, PROMPT[None])
    np.testing.assert_allclose(logits[:, 0], FULL["logits"], rtol=0, atol=1e-4)
    assert logits[:, 0].argmax(-1).tolist() == FULL["generated_ids"].tolist()
    assert keep[-1].all()


def test_h2o(model):
    logits, keep, run = decode(Watched(0.5), model, PROMPT[None])
    assert (keep[:, :, 0].numpy() == H2O["keep"]).all()
    assert logits[:, 0].argmax(-1).tolist() == H2O["generated_ids"].tolist()
    np.testing.assert_allclose(logits[:, 0], H2O["logits"], rtol=0, atol=1e-3)
    scores = torch.cat(run.scores[:LAYERS])
    np.testing.assert_allclose(scores, H2O["scores_prefill"], rtol=1e-3)
    np.testing.assert_allclose(scores.sum(-1), len(PROMPT), rtol=1e-5)


def test_generate(model):
    with kvlib.method("h2o", budget=0.5)(model) as run:
        output = model.generate(PROMPT[None], max_new_tokens=STEPS, do_sample=False)
    assert output[0, len(PROMPT) :].tolist() == H2O["generated_ids"].tolist()
    kept = torch.stack([run.kept(layer)[0] for layer in range(LAYERS)])
    assert (torch.zeros(LAYERS, HEADS, COLUMNS).scatter_(-1, kept, 1).numpy() == H2O["keep"][-1]).all()


def test_a_whole_number_is_the_same_budget(model):
    heavy, recent = H2O["H_heavy"].item(), H2O["R_recent"].item()
    _, keep, _ = decode(kvlib.method("h2o", budget=heavy + recent), model, PROMPT[None])
    assert (keep[:, :, 0].numpy() == H2O["keep"]).all()


# Where we depart on purpose


def test_departure_scores_are_summed_per_row(model):
    """The authors sum over the batch (and ask for batch 1): with a second row, that sum would keep other tokens."""
    other = PROMPT.roll(100)
    _, keep, run = decode(Watched(0.5), model, torch.stack([PROMPT, other]))
    assert (keep[:, :, 0].numpy() == H2O["keep"]).all()
    recent, heavy, n = H2O["R_recent"].item(), H2O["H_heavy"].item(), len(PROMPT)
    for layer, scores in enumerate(run.scores[:LAYERS]):
        old = scores[..., : n - recent].sum(0)
        summed = torch.zeros_like(old).scatter_(-1, old.topk(heavy).indices, 1)
        assert (summed.numpy() != H2O["keep"][0, layer, :, : n - recent]).any(-1).all()


def test_departure_the_shortest_prompts_keep_one_heavy_and_one_recent_token(model):
    """Three tokens at 0.25 + 0.25 make H = R = 0 there, and nothing is pruned."""
    _, keep, run = decode(kvlib.method("h2o", budget=0.5), model, PROMPT[None, :3], steps=3)
    assert keep.sum(-1).unique().tolist() == [2]
    assert run.clamped["budget"].tolist() == [1]


def test_departure_budget_one_never_evicts(model):
    """With heavy ratio 0.5 theirs keeps the whole prompt, then evicts one token a step; ours does so for a number."""
    rows = PROMPT[None, :20]
    _, keep, _ = decode(kvlib.method("h2o", budget=1.0), model, rows, steps=4)
    assert keep[-1].all()
    _, keep, _ = decode(kvlib.method("h2o", budget=20), model, rows, steps=4)
    assert keep[0, ..., :20].all()
    assert keep.sum(-1).unique().tolist() == [20]


def test_departure_decoding_may_go_on_in_several_tokens(model):
    """There only single tokens may follow the prompt; here a second turn is a prompt, budgets are set anew."""
    with torch.no_grad(), kvlib.method("h2o", budget=0.5)(model) as run:
        model(PROMPT[None, :40])
        model(PROMPT[None, 40:46], past_key_values=run.cache)
    assert run.kept(0).shape == (1, HEADS, 22)
    assert run.kept(0)[..., -11:].tolist() == [[list(range(35, 46))] * HEADS]
