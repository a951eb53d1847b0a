"""The size of a sink's value, against attention weights and values that the model itself gives."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.evaluation import evaluate, sinks
from kvlib.lab.evaluation.configuration import Configuration

TASK = "transform"
FULL = Configuration("full", 1.0)


@pytest.fixture(scope="module")
def small():
    tokenizer = AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")
    return tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024), tokenizer


def by_hand(ids: list[int], last: int, share: float) -> float:
    """Head by head, from whole matrices of attention."""
    model, values, found = tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024), [], []
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[-1][0]))
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    for attention, value in zip(attentions, values):
        size = model.config.head_dim
        for head, weights in enumerate(attention[0]):
            own = value[:, head // 2 * size :][:, :size].abs().sum(1).detach().numpy()
            if weights[-last:, 0].mean() >= share:
                found.append(own[0] / np.median(own))
    return np.median(found) if found else np.nan


@pytest.mark.parametrize("protocol", ["asked", "later"])
@pytest.mark.parametrize(("last", "share"), [(128, 0.004), (10, 0.0001), (1000, 0.03), (128, 0.99)])
def test_values_of_sinks(small, monkeypatch, protocol, last, share):
    """In prompts of several lengths, also shorter than the last queries, and where no head has a sink."""
    model, tokenizer = small
    monkeypatch.setattr(sinks, "LAST", last)
    monkeypatch.setattr(sinks, "SHARE", share)
    table = sinks.evaluate(model, tokenizer, [FULL], TASK, 160, range(3), name="tiny", protocol=protocol, block=3)
    read = []
    for number, value in zip(range(3), table["value"], strict=True):
        context, question, _ = tasks.sample(TASK, 160, number, tokenizer=tokenizer).ids(tokenizer)
        read.append(context + (question if protocol == "asked" else []))
        expected = by_hand(read[-1], last, share)
        assert value == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert len({len(ids) for ids in read}) > 1  # padding
    assert table["value"].isna().all() if share == 0.99 else table["value"].nunique() == 3


def test_the_other_columns_are_those_of_the_evaluator(small):
    arguments = (*small, [FULL], TASK, 160, range(3))
    table, plain = (module.evaluate(*arguments, name="tiny", block=2) for module in (sinks, evaluate))
    pd.testing.assert_frame_equal(table.drop(columns="value"), plain.drop(columns="value"))


def test_evicted_values_tell_nothing(small):
    with pytest.raises(ValueError, match="with the full cache"):
        sinks.evaluate(*small, [FULL, Configuration("h2o", 0.5)], TASK, 160, [0], name="tiny")
    with pytest.raises(ValueError, match="window is 1024"):
        sinks.evaluate(*small, [FULL], TASK, 1025, [0], name="tiny")
