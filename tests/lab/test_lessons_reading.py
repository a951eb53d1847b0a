"""What lessons show of copying heads, and their drawings of readers."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from test_recall import attentions, random_model
from test_tidaldecode import oracle_choice
from transformers import AutoTokenizer

from kvlib import paths
from kvlib.lab import statistics, tasks
from kvlib.lab.lessons import copying, prefills, reading
from kvlib.lab.plotting import COLORS, series
from kvlib.lab.results import studies

BUDGET = 150


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(tokens of the prompt and its answer, the latter with one in front that is not on the page; what it returns)"""
    tokenizer = AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")
    drawn = tasks.sample("needle", 400, 0, tokenizer=tokenizer)
    texts = {name: getattr(drawn, name) for name in ("context", "question", "lead", "answer", "ids")}
    prompt = SimpleNamespace(**texts, answer_ids=lambda tokenizer: [7, *drawn.answer_ids(tokenizer)])
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("prefills")
        patched.setattr(copying, "prefill", lambda model, ids: prefills.prefill(model, ids, folder))
        found = copying.writing(random_model("llama-gqa"), tokenizer, prompt, BUDGET)
    return [token for part in drawn.ids(tokenizer) for token in part], prompt.answer_ids(tokenizer), found


def test_steps_that_write_what_they_copy(written):
    """Each foretells one of these tokens: its query is that of the token before."""
    ids, answer, (steps, places) = written
    assert [ids[place] for place in places] == answer[1:]
    expected = attentions("llama-gqa", torch.tensor([ids + answer[:-1]]))  # of the last four tokens
    assert len(steps) == len(places) == 5 == len(expected) + 1
    for (attention, _), weights in zip(steps[1:], expected):
        torch.testing.assert_close(attention, torch.stack(weights), rtol=1e-9, atol=1e-12)


def test_what_is_known_of_the_copied_token(written):
    steps, places = written[-1]
    looked, held = copying.copied([(steps, places), (steps[1:], places[1:])])
    assert len(looked) == 2 * len(places) - 1 and set(held) == {"query", "group", "all"}
    for number, place in enumerate([*places, *places[1:]]):
        attention, _ = [*steps, *steps[1:]][number]
        for layer in range(len(attention)):
            grouped = attention[layer].log().unflatten(0, (2, -1))
            for kind, each in held.items():
                sets = oracle_choice(grouped, BUDGET, kind, 0, 0.0)
                assert each[number, layer].tolist() == [place in chosen for chosen in sets]
        assert torch.equal(looked[number], attention[:, :, place])


def test_copying_heads():
    looked = torch.zeros(2, 3, 2, dtype=torch.float64)
    looked[:, 2, 1] = torch.tensor([1.0, 0.5])
    looked[:, 0, 0] = torch.tensor([0.75, 0.125])  # a mean below one half
    looked[:, 1, 0] = 0.5
    held = {"query": torch.zeros(2, 3, 2, dtype=torch.bool), "all": torch.ones(2, 3, 2, dtype=torch.bool)}
    held["query"][0, 1, 1] = held["query"][:, 2, 1] = True  # layer 2 has chosen it, but layer 1 is asked
    found = copying.copying_heads(looked, held, 1)
    assert found.index.tolist() == ["layer 1, head 0", "layer 2, head 1"]
    assert found.to_dict("list") == {"attention": [0.5, 0.75], "query": [0, 0.5], "all": [1, 1]}
    assert copying.copying_heads(looked, held, 1, least=0.95).columns.tolist() == ["attention", "query", "all"]


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_a_step_is_drawn_layer_by_layer(axes):
    chosen = torch.eye(6, 8, dtype=torch.bool)
    handles = reading.step_map(axes, chosen, (1, 3))
    image = axes.images[0]
    names = {to_hex(handle.get_facecolor()): handle.get_label() for handle in handles}
    rows = [[names[to_hex(color)] for color in row] for row in image.cmap(image.norm(image.get_array()))]
    assert {*rows[0]} == {"read by a dense layer"}
    assert {*rows[1], *rows[3]} == {"read by a selection layer"}
    for layer, chooses in ((2, 1), (4, 3), (5, 3)):
        assert [role == "read by a sparse layer" for role in rows[layer]] == chosen[chooses].tolist()


def test_pairs_of_layers_are_drawn_above_the_diagonal(axes):
    matrix = torch.arange(49.0).reshape(7, 7) / 49
    reading.layer_pairs(axes, matrix)
    drawn = axes.collections[0].get_array().reshape(7, 7)
    expected = np.ma.masked_where(np.tril(np.ones((7, 7), dtype=bool)), matrix.numpy())
    assert np.array_equal(drawn.mask, expected.mask) and np.allclose(drawn.compressed(), expected.compressed())
    assert axes.collections[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5"]


def test_every_reader_of_a_study_has_its_own_look():
    """Of settings that differ in more than budget and numbers of layers, and of methods."""
    names = ["quest", "loki", "tokenselect", "full", "h2o", "tidaldecode", "tidaldecode (selection_layers=[2, 14])"]
    names += [f"tidaldecode (selection_layers=[2, 14], heads={kind})" for kind in ("group", "all")]
    less = ", ".join(f"{name}={value}" for name, value in studies.LESS_IS_MORE.items())
    names += [f"tidaldecode ({less})", "tidaldecode (selection_layers=[2, 14], correction=32)", "loki (rank=64)"]
    looks = {name: reading.look(name) for name in names}
    assert looks["quest"] == series("quest") and looks["tidaldecode"] == series("tidaldecode")
    assert looks["tidaldecode (selection_layers=[2, 14])"] == series("tidaldecode")
    assert [look["label"] for look in looks.values()][-5:] == [
        "TidalDecode, set per KV head", "TidalDecode, one set", "LessIsMore", "TidalDecode, corrected every 32",
        "Loki, all directions",
    ]  # fmt: skip
    apart = {(look["marker"], look["linestyle"], look["markerfacecolor"]) for look in looks.values()}
    assert len(apart) == len(names) - 1
    assert {look["color"] for name, look in looks.items() if "tidal" in name} == {COLORS["tidaldecode"]}
    assert looks["loki (rank=64)"]["color"] == COLORS["loki"]
    assert reading.look("loki (calibration=smollm2)") == series("loki")


def table() -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for method, budget, samples, read in (("full", 1.0, 8, 100), ("quest", 0.1, 4, 30), ("quest", 0.2, 8, 50)):
        for task in ("one", "two", "three"):
            for sample in reversed(range(samples)):
                rows.append((method, budget, json.dumps({}), task, sample, generator.random(), read + sample, 120))
    columns = ["method", "budget", "arguments", "task", "sample", "value", "read_bytes", "full_bytes"]
    return pd.DataFrame(rows, columns=columns)


def by_hand(rows: pd.DataFrame, method: str, budget: float, samples: int) -> list[np.ndarray]:
    cell = rows[rows["method"].eq(method) & rows["budget"].eq(budget)].set_index(["task", "sample"])["value"]
    return [np.array([cell[task, sample] for sample in range(samples)]) for task in ("one", "two")]


def test_points_are_means_over_families():
    rows = table()
    found = reading.points(rows, ["one", "two"])
    assert found.index.tolist() == [("full", 1.0), ("quest", 0.1), ("quest", 0.2)]
    assert found["read"].tolist() == pytest.approx([103.5 / 120, 31.5 / 120, 53.5 / 120])
    estimate = statistics.mean(by_hand(rows, "quest", 0.1, 4))
    assert found.loc[("quest", 0.1), ["value", "low", "high"]].tolist() == [estimate.value, estimate.low, estimate.high]


def test_points_above_another_setting_are_paired():
    rows = table()
    found = reading.points(rows, ["one", "two"], above=("full", 1.0))
    own, other = by_hand(rows, "quest", 0.1, 4), by_hand(rows, "full", 1.0, 4)  # the prompts that both have answered
    estimate = statistics.paired_difference(own, other)
    assert found.loc[("quest", 0.1), ["value", "low", "high"]].tolist() == [estimate.value, estimate.low, estimate.high]
    assert found.loc[("full", 1.0), ["value", "low", "high"]].tolist() == [0, 0, 0]


def test_one_setting_in_two_tables():
    """On the prompts that both have."""
    first, second = table(), table().assign(value=lambda rows: rows["value"] ** 2)
    second = second[second["sample"].ge(2) | second["method"].eq("full")]
    settings = {"a tenth": ("quest", 0.1), "whole": ("full", 1.0)}
    found = reading.between(first, second, settings, ["one", "two"])
    own = [values[2:] for values in by_hand(first, "quest", 0.1, 4)]
    estimate = statistics.paired_difference(own, [values**2 for values in own])
    expected = [100 * estimate.value, 100 * estimate.low, 100 * estimate.high]
    assert found.loc["a tenth", ["value", "low", "high"]].tolist() == pytest.approx(expected)
    assert found["prompts"].tolist() == [3 * 2, 3 * 8] and found["value"].gt(0).all()


def test_lines_join_the_budgets_of_a_setting(axes):
    found = reading.points(table(), ["one"])
    reading.lines_over_bytes(axes, found.iloc[::-1], 100)
    lines = {container.get_label(): container for container in axes.containers}
    assert set(lines) == {"full cache", "Quest"}
    line, _, (bars,) = lines["Quest"]
    assert line.get_xdata() == pytest.approx(100 * found.loc["quest", "read"])
    assert line.get_ydata() == pytest.approx(100 * found.loc["quest", "value"])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    assert np.allclose(ends, 100 * found.loc["quest", ["low", "high"]].to_numpy())


def test_lines_over_a_column(axes):
    found = reading.points(table(), ["one"])
    found["place"] = np.arange(len(found))[::-1]
    reading.lines_over(axes, found, "place")
    line, _, (bars,) = {container.get_label(): container for container in axes.containers}["Quest"]
    rows = found.loc["quest"].sort_values("place")
    assert line.get_xdata().tolist() == rows["place"].tolist() and np.allclose(line.get_ydata(), rows["value"])
    assert np.allclose([segment[:, 1] for segment in bars.get_segments()], rows[["low", "high"]])


def test_a_legend_names_everything_once():
    figure, panels = plt.subplots(1, 2)
    for axes, labels in zip(panels, ("ab", "bc")):
        for label in labels:
            axes.plot([0], label=label)
    handles, labels = reading.legend(panels)
    plt.close(figure)
    assert labels == ["a", "b", "c"] and [handle.get_label() for handle in handles] == labels
