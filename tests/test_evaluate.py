"""The evaluator against plain greedy decoding, a table against its own recomputation, and the intervals."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import kvlib
from kvlib.lab import evaluate, tasks
from kvlib.lab.evaluate import Configuration, Study
from kvlib.lab.statistics import mean_interval, paired_difference

CONFIGURATIONS = (
    Configuration("full", 1.0),
    Configuration("snapkv", 0.2, '{"kernel": 15}'),
    Configuration("h2o", 0.6),
    Configuration("random", 0.7),
)
STUDY = Study(tasks=("needle",), length=160, samples=6, configurations=CONFIGURATIONS)


@pytest.fixture(scope="module")
def model():
    return kvlib.load()


@pytest.fixture(scope="module")
def table(model):
    return evaluate.evaluate(*model, CONFIGURATIONS, "needle", STUDY.length, range(6), name="minilm", batch=4)


def test_values_are_what_greedy_decoding_gives(model, table):
    model, tokenizer = model
    for configuration in CONFIGURATIONS:
        for number in range(6):
            drawn = tasks.sample("needle", STUDY.length, number, tokenizer=tokenizer)
            inputs = tokenizer(drawn.prompt, return_tensors="pt")
            with configuration.make()(model) as run:
                model(**inputs)
                stored, full = run.stored_bytes(), run.full_bytes()
                out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == float(text.startswith(drawn.answer + "\n"))
            assert (row["stored_bytes"], row["full_bytes"]) == (stored, full)
    assert 0 < table["value"].mean() < 1, "all right or all wrong compares nothing"


def test_a_table_that_was_changed_is_found_out(model, table):
    assert evaluate.verify(table, *model, STUDY, [1, 4]) == 1.0
    flipped = table.assign(value=table["value"].where(table["method"] != "full", 1 - table["value"]))
    with pytest.raises(ValueError, match="recomputed rows agree with the table"):
        evaluate.verify(flipped, *model, STUDY, [1, 4])
    with pytest.raises(ValueError, match="stored bytes differ"):
        evaluate.verify(table.assign(stored_bytes=table["stored_bytes"] + 4), *model, STUDY, [1])
    with pytest.raises(ValueError, match="lacks 1 of 4 rows"):
        evaluate.verify(table[(table["method"] != "full") | (table["sample"] != 1)], *model, STUDY, [1])
    with pytest.raises(ValueError, match="unknown task"):
        evaluate.verify(table, *model, replace(STUDY, tasks=("needles",)), [1])


def test_the_shipped_table_has_every_cell_once():
    study = evaluate.STUDIES["00_kv_cache"]
    table = pd.read_parquet(evaluate.paths.RESULTS / "00_kv_cache.parquet")
    cells = table.groupby(["task", "method", "budget", "arguments"])["sample"]
    assert len(cells) == len(study.tasks) * len(study.configurations)
    assert all(sorted(samples) == list(range(study.samples)) for _, samples in cells)
    share = table["stored_bytes"] / table["full_bytes"]
    assert (share <= 1.05 * table["budget"]).all()


def test_intervals():
    values = np.repeat([0.0, 1.0], [60, 40])
    mean, low, high = mean_interval(values)
    width = 1.96 * np.sqrt(0.4 * 0.6 / 100)
    assert mean == 0.4 and np.allclose([low, high], [0.4 - width, 0.4 + width], atol=0.02)
    assert mean_interval(values) == (mean, low, high)
    mean, low, high = mean_interval(np.ones(200))
    assert mean == high == 1.0 and low == pytest.approx(0.025 ** (1 / 200))  # Clopper and Pearson
    # Pairing takes out what the samples share: the same shift on very different samples is known exactly.
    base = torch.randn(50, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert paired_difference(base + 0.5, base) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="the same samples"):
        paired_difference(base, base[1:])
