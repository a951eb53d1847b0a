"""Summaries of a table small enough to count by hand."""

import numpy as np
import pandas as pd
import pytest

from kvlib.lab import statistics
from kvlib.lab.results import summaries
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.tasks import FAMILIES, NATURAL
from kvlib.paths import RESULTS

BOTH = {"both": ["needle", "dict_lookup"], "needle": ["needle"]}


@pytest.fixture
def table() -> pd.DataFrame:
    """Two tasks, ten samples: the full cache is always right, snapkv in eight needles and two dictionaries, its variant
    always; a second model, whose name comes first, is always wrong."""
    right = {("full", "{}", 1.0): (10, 10), ("snapkv", "{}", 0.2): (8, 2), ("snapkv", '{"kernel": 15}', 0.2): (10, 10)}
    return pd.DataFrame(
        [
            {"model": model, "task": task, "method": method, "arguments": arguments, "budget": budget, "sample": sample}
            | {"value": float(model == "one" and sample < count), "stored_bytes": 1000 * budget, "full_bytes": 1000}
            | {"divergence": sample / 100 + (task == "needle"), "agreement": np.nan}
            for model in ("one", "before one")
            for (method, arguments, budget), counts in right.items()
            for task, count in zip(("needle", "dict_lookup"), counts)
            for sample in range(10)
        ]
    )


@pytest.fixture
def one(table) -> pd.DataFrame:
    return table[table["model"] == "one"]


def test_configurations_have_readable_names(table):
    assert list(summaries.named(table)["configuration"].unique()) == ["full", "snapkv", "snapkv (kernel=15)"]


def test_summaries_by_hand(table):
    summary = summaries.summarise(table.sample(frac=1, random_state=0), BOTH)
    rows = summary.set_index(["model", "tasks", "configuration"])
    assert len(rows) == 2 * 2 * 3
    both, needle = rows.loc["one", "both", "snapkv"], rows.loc["one", "needle", "snapkv"]
    assert (both["stored"], both["mean"], both["samples"]) == (0.2, 0.5, 20)
    assert (needle["mean"], needle["samples"]) == (0.8, 10)
    assert (needle["divergence"], both["divergence"]) == pytest.approx((1.045, 0.545)) and np.isnan(both["agreement"])
    assert 0.4 < needle["low"] < 0.8 < needle["high"] <= 1
    assert summary.loc[summary["model"] == "before one", "mean"].eq(0).all()
    wanted = statistics.mean([[1.0] * 8 + [0.0] * 2, [1.0] * 2 + [0.0] * 8])
    assert (both["low"], both["high"]) == (wanted.low, wanted.high)


def test_stored_is_a_share_of_all_bytes(one):
    longer = one["task"] == "needle"
    one = one.assign(
        full_bytes=one["full_bytes"].where(~longer, 3000), stored_bytes=one["stored_bytes"].where(~longer, 600)
    )
    rows = summaries.summarise(one, BOTH).set_index(["tasks", "configuration"])["stored"]
    assert rows["needle", "snapkv"] == 0.2 and rows["both", "snapkv"] == (600 + 200) / (3000 + 1000)


def test_families_are_summarised_together_if_all_are_there(one):
    assert summaries.task_sets(one) == {"needle": ["needle"], "dict_lookup": ["dict_lookup"]}
    for name, families in (("families", FAMILIES), ("natural", NATURAL)):
        sets = summaries.task_sets(pd.DataFrame({"task": [*families, "next_line"]}))
        assert sets.pop(name) == list(families) and list(sets) == [*families, "next_line"]


def test_models_are_never_pooled(table):
    with pytest.raises(ValueError, match="rows of one, before one: choose one model"):
        summaries.values(table, "needle", "snapkv", 0.2)


def test_committed_summaries_are_those_of_the_tables():
    """Of a few cells of each, to save time; the intervals follow from them."""
    made = [study for study in STUDIES if (RESULTS / f"{study}.parquet").is_file()]
    assert made
    for study in made:
        table, summary = pd.read_parquet(RESULTS / f"{study}.parquet"), pd.read_csv(RESULTS / f"{study}.csv")
        sets = summaries.task_sets(table)
        assert len(summary) == len(sets) * len(table[["model", "method", "arguments", "budget"]].drop_duplicates())
        table = summaries.named(table)
        means = table.groupby(["model", "task", "configuration", "budget"])["value"].mean()
        for row in summary.to_dict("records"):
            mean = np.mean(
                [means[row["model"], task, row["configuration"], row["budget"]] for task in sets[row["tasks"]]]
            )
            assert row["mean"] == pytest.approx(mean, abs=1e-5) and row["low"] <= row["mean"] <= row["high"]
        last = table.iloc[-1]
        some = table[(table["budget"] == last["budget"]) & (table["configuration"] == last["configuration"])]
        again = summaries.summarise(some, dict([next(iter(sets.items()))])).round(5)
        recorded = summary.merge(again[summaries.SUMMARY[:4]])
        order = summaries.SUMMARY[:4]
        pd.testing.assert_frame_equal(
            *(rows.sort_values(order, ignore_index=True) for rows in (recorded, again)), atol=2e-5, rtol=0
        )
