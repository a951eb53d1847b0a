"""Arms beside a dense model under other methods: who is who; means, differences and bits by hand."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kvlib.lab.lessons import arms
from kvlib.lab.plotting import COLORS


def table(model, method, values, *, arguments="{}", task="next_line", length=1024, stored=25) -> pd.DataFrame:
    """Rows of one cell."""
    return pd.DataFrame({"value": values}).assign(
        model=model, method=method, arguments=arguments, task=task, length=length, budget=1.0,
        sample=range(len(values)), stored_bytes=stored, full_bytes=100,
    )  # fmt: skip


@pytest.fixture
def rows() -> pd.DataFrame:
    return arms.contenders([
        table("minilm-TML-4", "anchorcoder", [1.0, 0.99, 0.0, 1.0]),
        table("minilm-D1", "full", [1.0, 1.0, 1.0, 1.0], stored=100),
        table("minilm-D1", "streaming_llm", [0.0, 1.0, 0.0, 0.5], arguments='{"sinks": 0}'),
        table("minilm-TML-4", "anchorcoder", [1.1, 2.2], task="code_bits"),
        table("minilm-D1", "full", [1.0, 2.0], task="code_bits"),
        table("minilm-TML-4", "anchorcoder", [1.0, 0.5], length=2048),
    ])  # fmt: skip


def test_arms_have_their_names_and_methods_theirs(rows):
    assert list(dict.fromkeys(rows["contender"])) == ["TML-4", "full", "streaming_llm (sinks=0)"]


def test_means_by_hand(rows):
    means = arms.means(rows)
    assert means.loc[("next_line", 1024, "TML-4"), ["mean", "stored"]].tolist() == [0.5, 0.25]
    assert means.loc[("next_line", 1024, "full"), "stored"] == 1
    assert means.loc[("next_line", 2048, "TML-4"), "mean"] == 0.5
    inside = means.loc[("next_line", 1024, "TML-4")]
    assert inside["low"] < inside["mean"] < inside["high"]


def test_differences_by_hand(rows):
    pairs = {"TML-4 − full": ("TML-4", "full"), "full − window": ("full", "streaming_llm (sinks=0)")}
    found = arms.changes(rows, pairs, ["next_line"], 1024)
    assert found["value"].tolist() == pytest.approx([-50, 75]) and found["prompts"].tolist() == [4, 4]
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
    more = arms.changes(rows, {"TML-4 − full": ("TML-4", "full")}, ["code_bits"], 1024)
    assert more.loc["TML-4 − full", ["value", "low", "high"]].tolist() == pytest.approx([10, 10, 10])


def test_prompts_are_paired_in_whatever_order(rows):
    pairs = {"TML-4 − full": ("TML-4", "full")}
    turned = pd.concat([rows[rows["contender"] != "full"], rows[rows["contender"] == "full"][::-1]])
    assert arms.changes(turned, pairs, ["next_line"], 1024).equals(arms.changes(rows, pairs, ["next_line"], 1024))


def test_what_cannot_be_compared(rows):
    pair = {"a − b": ("TML-4", "full")}
    with pytest.raises(ValueError, match="bits and shares have no mean"):
        arms.changes(rows, pair, ["next_line", "code_bits"], 1024)
    fewer = rows[(rows["sample"] > 0) | (rows["contender"] != "full")]
    with pytest.raises(ValueError, match="a − b: not the same prompts"):
        arms.changes(fewer, pair, ["next_line"], 1024)


@pytest.fixture
def files() -> pd.DataFrame:
    rows = [("T-4", "a", 1000, 1.1), ("T-4", "b", 3000, 1.2), ("D2", "b", 3000, 1.0), ("D2", "a", 1000, 1.0)]
    return pd.DataFrame(rows, columns=["arm", "file", "characters", "bits"])


def test_more_bits_by_hand(files):
    """Long files count more, and files are paired in whatever order they stand."""
    found = arms.more_bits(files, {"TAA": ("T-4", "D2"), "the reverse": ("D2", "T-4")})
    assert found.loc["TAA", "value"] == pytest.approx(100 * ((1100 + 3600) / 4000 - 1))
    assert found.loc["the reverse", "value"] == pytest.approx(100 * (4000 / 4700 - 1))
    assert found["files"].tolist() == [2, 2]
    low, high = found.loc["TAA", ["low", "high"]]
    assert [low, high] == pytest.approx([10, 20])  # one file alone, drawn twice


def test_arms_that_read_other_files(files):
    with pytest.raises(ValueError, match="TAA: not the same files"):
        arms.more_bits(files[:-1], {"TAA": ("T-4", "D2")})


def test_looks():
    assert arms.look("TML-4")["color"] == COLORS["anchorcoder"]
    assert arms.look("full")["label"] == "full cache (D1)" and arms.look("h2o")["color"] == COLORS["h2o"]
    assert arms.look("streaming_llm (sinks=0)")["label"] == "window"
    drawn = [tuple(arms.look(name).values())[1:] for name in arms.LOOKS]
    assert len(set(drawn)) == len(drawn)


def test_lines_show_means_and_intervals(rows):
    means = arms.means(rows).xs("next_line").rename(columns={"mean": "value"})
    _, axes = plt.subplots()
    arms.lines(axes, means, ["TML-4"], scale=100)
    (line, _, bars), *_ = axes.containers
    assert line.get_ydata().tolist() == pytest.approx([50, 50])
    ends = [segment[:, 1].tolist() for segment in bars[0].get_segments()]
    expected = (100 * means.xs("TML-4", level="contender")[["low", "high"]]).to_numpy().tolist()
    assert ends == [pytest.approx(pair) for pair in expected]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 024", "2 048"]
    plt.close("all")


def test_outcomes_and_bars_by_hand():
    """Shares of a contender sum to 100 and stand behind each other; the interval is that of those that pass."""
    fates = {"TML-4": ["passed", "wrong value", "wrong value", "syntax"], "D2": ["passed", "passed"]}
    rows = pd.DataFrame(
        [(name, fate) for name, each in fates.items() for fate in each], columns=["contender", "outcome"]
    )
    kinds = arms.outcomes(rows).loc[["TML-4", "D2"]]
    assert kinds.loc["TML-4", ["passed", "wrong value", "syntax"]].tolist() == [25, 50, 25]
    assert kinds.loc["D2", "passed"] == 100 and (kinds.sum(axis=1) == 100).all()
    passed = pd.DataFrame({"mean": [25.0, 100.0], "low": [10.0, 90.0], "high": [60.0, 100.0]}, kinds.index)
    _, axes = plt.subplots()
    arms.bars(axes, kinds, passed)
    *parts, (_, _, (intervals,)) = axes.containers
    ends = [[part[place].get_x() + part[place].get_width() for part in parts] for place in (0, 1)]
    assert ends == [[25, 50, 100], [100, 100, 100]]
    assert [segment[:, 0].tolist() for segment in intervals.get_segments()] == [[10, 60], [90, 100]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["TML-4", "D2"]
    plt.close("all")


def test_points_show_values_and_intervals():
    table = pd.DataFrame({"value": [-5.0, 2.0], "low": [-7.0, 1.0], "high": [-4.0, 4.0]}, ["TML-4", "h2o"])
    _, axes = plt.subplots()
    arms.points(axes, table)
    found = [
        (line.get_xydata().tolist(), bars[0].get_segments()[0][:, 0].tolist()) for line, _, bars in axes.containers
    ]
    assert found == [([[-5, 0]], [-7, -4]), ([[2, 1]], [1, 4])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["TML-4", "H2O"] and axes.get_ylim() == (1.5, -0.5)
    plt.close("all")
