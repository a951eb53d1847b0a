"""TidalDecode chooses, step by step, what its first author's fork chooses (`parity/tidaldecode`), and where not."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tidaldecode import tidal, watched
from transformers import AutoModelForCausalLM

DATA = Path(__file__).parent / "parity" / "tidaldecode"
FORK = [path.stem for path in sorted(DATA.glob("fork_*.npz"))]
STEPS = 8


@cache
def recorded(case):
    return np.load(DATA / f"{case}.npz")


@cache
def model(case):
    folder = "model_gqa" if "gqa" in case else "model"
    return AutoModelForCausalLM.from_pretrained(DATA / folder, dtype=torch.float32).eval()


@torch.no_grad()
def decode(case):
    """Greedy decoding as recorded: ids, logits `(steps + 1, vocabulary)`, and what was chosen in each step."""
    theirs = recorded(case)
    prompt = torch.from_numpy(theirs["prompt_ids"].astype(np.int64))[None]
    layers = tuple(theirs["selection_layers"].tolist())
    with watched(tidal(theirs["k"].item(), selection_layers=layers), model(case)) as (run, steps):
        logits = [model(case)(prompt).logits[0, -1]]
        for _ in range(STEPS):
            token = logits[-1].argmax().view(1, 1)
            logits.append(model(case)(token, past_key_values=run.cache).logits[0, -1])
    assert len(steps) == STEPS
    return torch.stack(logits), steps


@pytest.mark.parametrize("case", FORK)
def test_sets_ids_and_logits(case):
    theirs = recorded(case)
    logits, steps = decode(case)
    assert logits.argmax(-1).tolist() == theirs["generated_ids"].tolist()
    np.testing.assert_allclose(logits, theirs["logits"], atol=1e-3)
    for step, chosen in enumerate(steps):
        for at, layer in enumerate(theirs["selection_layers"].tolist()):
            for head, slots in enumerate(chosen[layer][0]):
                wanted = [x for x in theirs["selected"][step, at, head].tolist() if x >= 0]
                assert sorted(slots.tolist()) == wanted


@pytest.mark.parametrize("case", ["p0_full", "p0_k4096_r4"])
def test_a_budget_beyond_the_text_is_full_attention(case):
    theirs = recorded(case)
    prompt = torch.from_numpy(theirs["prompt_ids"].astype(np.int64))[None]
    with tidal(4096, selection_layers=(2, 4))(model(case)):
        made = model(case).generate(prompt, max_new_tokens=STEPS + 1, do_sample=False)
    assert made[0, prompt.shape[1] :].tolist() == theirs["generated_ids"].tolist()


def test_departure_the_current_token_is_always_read():
    """In the first release it competes, and is dropped in most steps: other logits, whatever else is equal."""
    logits, steps = decode("p0_k16_r4")
    last = len(recorded("p0_k16_r4")["prompt_ids"]) + np.arange(STEPS)
    assert all((chosen[2][0] == at).any(-1).all() for chosen, at in zip(steps, last))
    assert not recorded("p0_k16_r4")["current_selected"].all()
    assert (logits - torch.from_numpy(recorded("p0_k16_r4")["logits"])).abs().max() > 0.1
