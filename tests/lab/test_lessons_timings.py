"""What lesson 91 draws: parts that add up, two numbers that predict, a roofline, and steps of the machine at hand."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import tiny
import torch

import kvlib
from kvlib.core.snapshot import snapshot
from kvlib.lab.lessons import timings
from kvlib.lab.lessons.timings import PARTS
from kvlib.lab.speed.captured import NOTHING
from kvlib.lab.speed.settings import STOCK

CASE = {
    "device": "D",
    "model": "M",
    "batch": 2,
    "context": 1000,
    "fused": False,
    "copy_gb_per_s": 1000.0,
    "weight_bytes": 3e9,
}


def rows() -> pd.DataFrame:
    """Weights take 3 ms, the context 4 and a fifth of it .8; without it a step takes 5 ms."""
    values = {STOCK: (9.5, 4e9), NOTHING: (5.0, 0), "snapkv": (6.0, 8e8), "h2o": (7.0, 8e8)}
    found = [CASE | {"method": name, "ms": ms, "read_bytes": read} for name, (ms, read) in values.items()]
    found.append(CASE | {"batch": 9, "method": "snapkv", "ms": 8.0, "read_bytes": 8e8})  # there is no stock
    return pd.DataFrame(found).assign(ideal_ms=lambda x: (x["read_bytes"] + x["weight_bytes"]) / 1e9)


def test_parts_add_up_to_the_step():
    found = timings.steps(rows())
    case = found.loc["M", 2, 1000, False]
    assert case[PARTS].sum(axis=1).tolist() == pytest.approx(case["ms"].tolist())
    assert case.loc["h2o", PARTS].tolist() == pytest.approx([3, 2, 2])
    assert case.loc["h2o", "ideal_context"] == pytest.approx(0.8)
    assert found.loc["M", 9, 1000, False][["small kernels, gaps", "predicted"]].isna().all(axis=None)


def test_one_device_at_a_time():
    with pytest.raises(ValueError, match="rows of several devices: D, E; choose one"):
        timings.steps(pd.concat([rows(), rows().assign(device="E")]))


def test_what_bytes_allow_and_what_two_numbers_predict():
    case = timings.steps(rows()).loc["M", 2, 1000, False]
    assert case["bytes_allow"].to_dict() == pytest.approx({"h2o": 7 / 3.8, "snapkv": 7 / 3.8, STOCK: 1, NOTHING: 7 / 3})
    assert case["predicted"].to_dict() == pytest.approx({"h2o": 9 / 5.8, "snapkv": 9 / 5.8, STOCK: 1, NOTHING: 9 / 5})


def test_bars_are_the_parts_and_the_line_is_where_bytes_end():
    figure, axes = plt.subplots()
    found = timings.steps(rows()).loc["M", 2, 1000, False].loc[[STOCK, "h2o"]]
    timings.stacked(axes, found, ["stock", "H2O"])
    widths = [bar.get_width() for bars in axes.containers for bar in bars]
    assert widths == pytest.approx([3, 3, 2, 2, 4.5, 2])
    starts = [bar.get_x() for bars in axes.containers for bar in bars]
    assert starts == pytest.approx([0, 0, 3, 3, 5, 5])
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([9, 5.8])
    assert [line.get_ydata().mean() for line in axes.lines] == [1, 0]  # the first row is on top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stock", "H2O"]
    plt.close(figure)


def test_a_roofline_counts_what_moves_and_what_is_computed():
    rate, peak, works = timings.roofline("cpu", size=16, megabytes=1)
    assert rate > 0 and peak == works["per_second"].iloc[0]
    assert works["bytes"].tolist() == [12 * 16**2, *[2**20] * 3]
    assert works["operations"].tolist() == [2 * 16**3, 2 * 2**18, 2 * 2**18, 16 * 2**18]
    assert works["intensity"].tolist() == pytest.approx([2 * 16 / 12, 0.5, 0.5, 4])
    assert works["per_second"].tolist() == pytest.approx((works["operations"] / works["seconds"]).tolist())


@torch.no_grad()
def test_live_steps_hold_what_they_say():
    model, ids = tiny.model(), tiny.tokens(1, 40)
    methods = {"full": kvlib.method("full"), "snapkv": kvlib.method("snapkv", budget=0.5, window=4)}
    found = timings.live(model, snapshot(model, ids), methods, tokens=2, repeats=2)
    with methods["full"](model) as run:
        model(ids)
    token = run.full_bytes() / 40 / 1e6
    assert found["stored, MB"].tolist() == pytest.approx([46 * token, 26 * token])
    assert found["read, MB"].tolist() == found["stored, MB"].tolist()
    assert (found["allocated, MB"] >= found["stored, MB"]).all()
    assert (found["least"] <= found["ms"]).all() and (found["ms"] <= found["most"]).all()
