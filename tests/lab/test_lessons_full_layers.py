"""Other full layers than a checkpoint's own: the same ones change nothing, and answers are those of the evaluation."""

import pytest
import torch

import kvlib
from kvlib.lab import tasks
from kvlib.lab.evaluation import anchored as evaluation
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.lessons import full_layers
from kvlib.methods.anchor_training import training
from kvlib.methods.anchors import anchored


@pytest.fixture(scope="module")
def arm():
    return kvlib.load("minilm-TML-4")


@torch.no_grad()
def logits(arm, method):
    model, tokenizer = arm
    text = "def area(w, h):\n    a = w * h\n    return a\n" * 3
    ids = tokenizer("").input_ids + anchored(text, tokenizer, model.config.anchorcoder)
    with training(model, method):
        return model(torch.tensor([ids]), use_cache=False).logits


def test_its_own_full_layers_change_nothing_and_others_do(arm):
    own = logits(arm, kvlib.method("anchorcoder"))
    assert torch.equal(logits(arm, full_layers.FullIn(everything=(0, 4, 8, 12))), own)
    assert not torch.allclose(logits(arm, full_layers.FullIn(everything=(0, 4, 8))), own)
    everything = logits(arm, full_layers.FullIn(everything=()))
    assert not torch.allclose(everything, logits(arm, full_layers.FullIn(everything=(12,))))


def test_answers_are_those_of_the_evaluation(arm):
    model, tokenizer = arm
    prompts = [tasks.sample("dict_lookup", 512, seed, tokenizer=tokenizer) for seed in range(4)]
    rows = evaluation.evaluate(
        model, tokenizer, [Configuration("anchorcoder", 1.0)], "dict_lookup", 512, range(4), name="minilm-TML-4"
    )
    with training(model, kvlib.method("anchorcoder")):
        found = full_layers.answered(model, tokenizer, prompts)
    assert found == rows.sort_values("sample")["value"].astype(bool).tolist()
    with training(model, full_layers.FullIn()):
        assert not any(full_layers.answered(model, tokenizer, prompts))
