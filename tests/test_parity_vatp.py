"""H2O, Scissorhands and VATP keep, step by step, what the VATP authors' code keeps (`parity/vatp`), and where not."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kvlib

DATA = Path(__file__).parent / "parity" / "vatp"
CASES = [path.stem for path in sorted(DATA.glob("p?_*.npz")) if path.stem != "p0_full"]
LAYERS, HEADS = 4, 4


@cache
def recorded(case):
    return np.load(DATA / f"{case}.npz")


def ids(case):
    """The prompt of a case `(1, tokens)`."""
    return torch.from_numpy(recorded(case)["prompt_ids"].astype(np.int64))[None]


PROMPT = ids("p0_full")


def watched(name, budget=0.5, **arguments):
    """A method that notes in its run, selection by selection, what its host ranks and which tokens these are."""

    class Watched(kvlib.METHODS[name]):
        def score(self, view):
            view.run.__dict__.setdefault("ranked", []).append((view.state["attention"].clone(), view.positions.clone()))
            return super().score(view)

    return Watched(budget=budget, **arguments)


def ours(case):
    host, *values = case.removeprefix("p0_").removeprefix("p1_").split("_")
    return watched("vatp", host=host, sinks=recorded(case)["F_sinks"].item()) if values else watched(host)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DATA / "model", dtype=torch.float32).eval()


@torch.no_grad()
def decode(method, model, rows, steps=8):
    """Greedy decoding: logits `(steps, rows, vocabulary)`, kept `(steps, layers, rows, heads, columns)`, the run."""
    new, logits, keep = rows, [], []
    with method(model) as run:
        for _ in range(steps + 1):
            logits.append(model(new, past_key_values=run.cache if logits else None).logits[:, -1])
            new = logits[-1].argmax(-1, keepdim=True)
            kept = torch.stack([run.kept(layer) for layer in range(LAYERS)])
            keep.append(torch.zeros(*kept.shape[:3], rows.shape[1] + steps, dtype=torch.bool).scatter_(-1, kept, True))
    return torch.stack(logits), torch.stack(keep), run


def test_full_cache(model):
    logits, keep, _ = decode(kvlib.method("full"), model, PROMPT)
    np.testing.assert_allclose(logits[:, 0], recorded("p0_full")["logits"], rtol=0, atol=1e-4)
    assert logits[:, 0].argmax(-1).tolist() == recorded("p0_full")["generated_ids"].tolist()
    assert keep[-1].all()


@pytest.mark.parametrize("case", CASES)
def test_every_step(model, case):
    theirs = recorded(case)
    logits, keep, run = decode(ours(case), model, ids(case))
    assert (keep[:, :, 0].numpy() == theirs["keep"]).all()
    assert logits[:, 0].argmax(-1).tolist() == theirs["generated_ids"].tolist()
    np.testing.assert_allclose(logits[:, 0], theirs["logits"], rtol=0, atol=1e-3)
    assert run.clamped == {}


@pytest.mark.parametrize("case", [case for case in CASES if "scores_prefill" in recorded(case)])
def test_scores_after_the_prompt(model, case):
    """Their scores of forced sinks are the largest float."""
    theirs, sinks = recorded(case)["scores_prefill"], recorded(case)["F_sinks"]
    run = decode(ours(case), model, ids(case), steps=0)[2]
    scores = torch.cat([scores for scores, _ in run.ranked])
    np.testing.assert_allclose(scores[..., sinks:], theirs[..., sinks:], rtol=1e-3)
    if case == "p0_h2o":
        np.testing.assert_allclose(scores.sum(-1), PROMPT.shape[1], rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "scores_last" in recorded(case)])
def test_scores_after_the_last_step(model, case):
    """Of the tokens that stay: theirs are 0 for evicted ones."""
    theirs, sinks = recorded(case)["scores_last"], recorded(case)["F_sinks"].item()
    run = decode(ours(case), model, ids(case))[2]
    compared = 0
    for layer, (scores, positions) in enumerate(run.ranked[-LAYERS:]):
        expected = torch.from_numpy(theirs[layer]).gather(-1, positions[0].long())
        stays = (expected > 0) & (positions[0] >= sinks)
        np.testing.assert_allclose(scores[0][stays], expected[stays], rtol=1e-3)
        compared += stays.sum().item()
    assert compared == recorded(case)["keep"][-1].sum() - LAYERS * HEADS * sinks


@pytest.mark.parametrize("case", CASES)
def test_generate(model, case):
    theirs = recorded(case)
    with ours(case)(model) as run:
        output = model.generate(ids(case), max_new_tokens=9, do_sample=False)
    assert output[0, theirs["n"] :].tolist() == theirs["generated_ids"].tolist()
    kept = torch.stack([run.kept(layer)[0] for layer in range(LAYERS)])
    assert (torch.zeros(LAYERS, HEADS, theirs["n"] + 8).scatter_(-1, kept, 1).numpy() == theirs["keep"][-1]).all()


@pytest.mark.parametrize("case", CASES)
def test_a_whole_number_is_the_same_budget(model, case):
    theirs = recorded(case)
    budget = (theirs["H_heavy"] + theirs["R_recent"]).item()
    _, keep, _ = decode(dataclasses.replace(ours(case), budget=budget), model, ids(case))
    assert (keep[:, :, 0].numpy() == theirs["keep"]).all()


# Where we depart on purpose


@pytest.mark.parametrize("case", ["p0_h2o", "p0_scissorhands_vatp"])
def test_departure_scores_are_summed_per_row(model, case):
    """The authors sum over the batch (and ask for batch 1): with a second row, that sum would keep other tokens."""
    other = PROMPT.roll(100)
    _, keep, run = decode(ours(case), model, torch.cat([PROMPT, other]))
    theirs = recorded(case)
    assert (keep[:, :, 0].numpy() == theirs["keep"]).all()
    recent, heavy, n = theirs["R_recent"].item(), theirs["H_heavy"].item(), PROMPT.shape[1]
    for layer, (scores, _) in enumerate(run.ranked[:LAYERS]):
        old = scores[..., : n - recent].sum(0)
        old[..., : theirs["F_sinks"]] = torch.inf
        summed = torch.zeros_like(old).scatter_(-1, old.topk(heavy).indices, 1)
        assert (summed.numpy() != theirs["keep"][0, layer, :, : n - recent]).any(-1).all()


@pytest.mark.parametrize("host", ["h2o", "scissorhands"])
def test_departure_the_shortest_prompts_keep_one_heavy_and_one_recent_token(model, host):
    """Three tokens at 0.25 + 0.25 make H = R = 0 there: H2O prunes nothing, Scissorhands fails at H = -10."""
    _, keep, run = decode(kvlib.method(host, budget=0.5), model, PROMPT[:, :3], steps=3)
    assert keep.sum(-1).unique().tolist() == [2]
    assert run.clamped["budget"].tolist() == [1]


@pytest.mark.parametrize("length", [4, 19, 20, 23, 24])
def test_departure_scissorhands_always_has_a_heavy_token(model, length):
    """At 0.5 theirs fails below 20 tokens; from 20 to 23 only the last 10 survive, even sinks that VATP forces go."""
    total = 2 * (length // 4)
    recent = min(10, total - 1)
    _, keep, run = decode(kvlib.method("vatp", budget=0.5, host="scissorhands"), model, PROMPT[:, :length], steps=2)
    for step in range(3):
        assert keep[step].sum(-1).unique().tolist() == [total]
        assert keep[step][..., length + step - recent : length + step].all()
        assert keep[step][..., : total - recent - 1].all()  # as many sinks as leave one place to the score
    clamped = {"recent": recent, "sinks": total - recent - 1} if length < 24 else {"sinks": 1}
    assert {name: values.tolist() for name, values in run.clamped.items()} == {k: [v] for k, v in clamped.items()}


def test_departure_sinks_leave_a_place_to_the_score(model):
    """With 20 sinks and 10 heavy tokens theirs ranks all sinks alike, and keeps an arbitrary 10 of them."""
    _, keep, run = decode(kvlib.method("vatp", budget=0.5), model, PROMPT[:, :40], steps=0)
    assert run.clamped["sinks"].tolist() == [9]
    assert keep[0, ..., :9].all() and keep[0, ..., 30:40].all()
    assert (keep[0, ..., 9:30].sum(-1) == 1).all()


def test_departure_sinks_can_be_forced_without_values(model):
    """There a method has both or neither (1.6.2). The control keeps others than H2O, and others than VATP."""
    _, keep, _ = decode(kvlib.method("forced_sinks", budget=0.5), model, PROMPT)
    assert keep[..., :20].all()
    for case in ("p0_h2o", "p0_h2o_vatp"):
        assert (keep[:, :, 0].numpy() != recorded(case)["keep"]).any((0, 2, 3)).all()


def test_departure_budget_one_never_evicts(model):
    """With heavy ratio 0.5 theirs keeps the whole prompt, then evicts one token a step; ours does so for a number.

    And their driver crashes if the cache is to stay whole (1.6.6).
    """
    rows = PROMPT[:, :20]
    for name in ("h2o", "scissorhands", "vatp"):
        _, keep, _ = decode(kvlib.method(name, budget=1.0), model, rows, steps=4)
        assert keep[-1].all()
        _, keep, _ = decode(kvlib.method(name, budget=20), model, rows, steps=4)
        assert keep[0, ..., :20].all()
        assert keep.sum(-1).unique().tolist() == [20]


def test_departure_decoding_may_go_on_in_several_tokens(model):
    """There only single tokens may follow the prompt; here a second turn is a prompt, budgets are set anew."""
    for name, recent in (("h2o", 11), ("scissorhands", 10), ("vatp", 11)):
        with torch.no_grad(), kvlib.method(name, budget=0.5)(model) as run:
            model(PROMPT[:, :40])
            model(PROMPT[:, 40:46], past_key_values=run.cache)
        assert run.kept(0).shape == (1, HEADS, 22)
        assert run.kept(0)[..., -recent:].tolist() == [[list(range(46 - recent, 46))] * HEADS]


def test_departure_a_second_turn_is_judged_by_its_own_queries(model):
    """Scissorhands looks at the last 400 queries of a prompt; here that is the latest one, whatever came before."""
    method = watched("scissorhands", budget=20)
    with torch.no_grad(), method(model) as run:
        model(PROMPT[:, :40])
        model(PROMPT[:, 40:41], past_key_values=run.cache)  # a bare call of one token decodes
        model(PROMPT[:, 41:47], past_key_values=run.cache)
    totals = [scores.sum(-1).mean().item() * 400 for scores, _ in run.ranked[::LAYERS]]
    assert totals[0] == pytest.approx(40, rel=1e-5)
    assert totals[1] > 400  # the decoded query has weight 1
    assert totals[2] == pytest.approx(6, rel=1e-5)


def test_departure_the_rotary_base_is_the_model_s(model):
    """Theirs turns by 10000 ** (-2j / d) whatever the configuration says; our attention is the model's own."""
    other = AutoModelForCausalLM.from_pretrained(
        DATA / "model", dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    logits, _, _ = decode(kvlib.method("vatp", budget=0.5), other.eval(), PROMPT, steps=0)
    assert torch.equal(logits[0], other(PROMPT).logits[:, -1])
    assert not torch.allclose(logits[0], model(PROMPT).logits[:, -1], atol=1e-2)
