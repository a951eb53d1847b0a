"""Lessons and the tables in data/results: samples recomputed, verdicts, values by prompt."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kvlib.lab import lessons, statistics
from kvlib.lab.lessons import comparing, tables


def test_recompute_says_which_samples_agree(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tables.verification, "verify", lambda *given, **more: asked.append((given, more)) or 0.98)
    lessons.recompute("01_real", 2, 3)
    ((name, study, samples, seed), more) = asked[0]
    assert (name, samples, seed, more) == ("01_real", 2, 3, {"by_lot": True})
    drawn = tables.verification.draw(study, 2, 3)
    printed = capsys.readouterr().out
    assert all(f"{task}, sample {number} of {model}" in printed for model, task, number in drawn)
    assert printed.endswith("98% of the rows agree\n")


def test_verdicts_are_rows_of_the_ledger():
    found = lessons.verdicts(["vatp-needs-sinks-real", "td-latency"], "holm")
    assert list(found.index) == ["vatp-needs-sinks-real", "td-latency"]
    assert list(found.columns) == ["claim", "ours", "verdict", "holm"] and not found.isna().any(axis=None)
    with pytest.raises(KeyError):
        lessons.verdicts(["no such claim"])


def rows(values: dict[str, list[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"method": name, "arguments": "{}", "budget": 0.5, "task": "number", "sample": sample, "value": value}
        for name, column in values.items()
        for sample, value in enumerate(column)
    )


def test_prompts_on_which_the_answer_tips():
    table = rows({"h2o": [1, 0, 0, 1, 0, 0], "snapkv": [1, 1, 1, 0, 0, 1]})
    values = comparing.by_prompt(pd.concat([table, table.assign(budget=0.2)]), 0.5)
    assert values["snapkv"].tolist() == [1, 1, 1, 0, 0, 1] and values.index[3] == ("number", 3)
    drawn = comparing.tipped(values["snapkv"], values["h2o"], 2, 1, seed=0)
    assert drawn == comparing.tipped(values["snapkv"], values["h2o"], 2, 1, seed=0)
    assert drawn[2] == ("number", 3)
    assert set(drawn[:2]) < {("number", 1), ("number", 2), ("number", 5)}
    with pytest.raises(ValueError, match="larger sample"):
        comparing.tipped(values["snapkv"], values["h2o"], 1, 2, seed=0)


def test_points_are_percent():
    found = statistics.mean([[1.0, 0.0, 0.0, 1.0]])
    assert comparing.points(found) == {"value": 50, "low": 100 * found.low, "high": 100 * found.high}


def test_bars_reach_from_low_to_high():
    figure, axes = plt.subplots()
    found = pd.DataFrame({"value": [1.0, 2.0], "low": [0.5, 1.0], "high": [1.25, 4.0]})
    lessons.interval_bars(axes, [10, 20], found, color="black", label="both")
    (drawn,) = axes.containers
    segments = drawn[2][0].get_segments()
    assert [segment.tolist() for segment in segments] == [[[10, 0.5], [10, 1.25]], [[20, 1.0], [20, 4.0]]]
    assert axes.get_legend_handles_labels()[1] == ["both"]
    plt.close(figure)
