"""What lessons share: the prefill on disk, asking, drawings."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import LogNorm, to_rgba

import kvlib
from kvlib.lab import lessons, statistics
from kvlib.lab.checks import tiny_model
from kvlib.lab.lessons import asking, comparing, drawing, prefills, start
from kvlib.lab.plotting import COLORS

IDS = [7, 3, 9, 11, 5, 3, 20, 41, 8, 6]


# The prefill on disk


def same(one, other) -> bool:
    tensors = [(*x.layers[0][:3], *x.layers[1][:3], x.ids, x.positions, x.counts, x.logits) for x in (one, other)]
    return all(map(torch.equal, *tensors)) and [x[3] for x in one.layers] == [x[3] for x in other.layers]


def test_a_prefill_is_the_snapshot_read_or_computed(tmp_path, monkeypatch):
    model = tiny_model()
    snapshot = kvlib.snapshot(model, torch.tensor([IDS]))
    assert same(prefills.prefill(model, IDS, tmp_path), snapshot)
    monkeypatch.setattr(kvlib, "snapshot", None)  # from here on nothing is computed
    stored = prefills.prefill(model, IDS, tmp_path)
    assert same(stored, snapshot)
    with kvlib.method("snapkv", budget=0.5)(model) as run:
        run.fork(stored)
    assert run.kept(0).shape[-1] == 5


def other_weight(model):
    model.lm_head.weight[3, 2] += 1e-9


def other_config(model):
    model.config.rope_parameters = dict(model.config.rope_parameters, rope_theta=5.0)


@pytest.mark.parametrize("change", [other_weight, other_config])
@torch.no_grad()
def test_another_model_is_read_anew(tmp_path, change):
    model = tiny_model()
    prefills.prefill(model, IDS, tmp_path)
    change(model)
    prefills.prefill(model, IDS, tmp_path)
    prefills.prefill(model, IDS[:-1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"x", lambda data: b""])
def test_a_damaged_file_is_written_anew(tmp_path, damage):
    model = tiny_model()
    prefills.prefill(model, IDS, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert same(prefills.prefill(model, IDS, tmp_path), kvlib.snapshot(model, torch.tensor([IDS])))
    assert file.read_bytes() == good


def test_old_prefills_go(tmp_path, monkeypatch):
    monkeypatch.setattr(prefills, "FILES", 2)
    model = tiny_model()
    for tokens in (4, 5, 6):
        prefills.prefill(model, IDS[:tokens], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@torch.no_grad()
def test_reading_on_is_reading_it_all():
    model = tiny_model()
    begun = kvlib.snapshot(model, torch.tensor([IDS[:6]]))
    found, whole = lessons.read_on(model, begun, IDS[6:]), kvlib.snapshot(model, torch.tensor([IDS]))
    for one, other in zip(found.layers, whole.layers, strict=True):
        for x, y in zip(one[:3], other[:3]):
            torch.testing.assert_close(x, y)
        assert one[3] == other[3]
    torch.testing.assert_close(found.logits, whole.logits)
    for name in ("ids", "positions", "counts"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert begun.positions.shape[1] == 6 and len(begun.layers) == len(found.layers)  # as it was


# Asking


@pytest.mark.parametrize("name", ["full", "streaming_llm", "snapkv", "h2o"])
@torch.no_grad()
def test_asking_is_reading_the_prompt_in_two_parts(name):
    """The same ids as `read` and `ask`, and for the full cache as `generate` in one piece."""
    model, letters = tiny_model(), Letters()
    method = kvlib.method(name, budget=0.5) if name != "full" else kvlib.method(name)
    text, stored = lessons.ask(model, letters, kvlib.snapshot(model, torch.tensor([IDS])), method, [2, 4], 6)
    with method(model) as run:
        run.read(input_ids=torch.tensor([IDS]))
        assert stored == run.stored_bytes()
        out = run.ask(torch.tensor([[2, 4]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert text == letters.decode(out[0, 2:])
    if name == "full":
        whole = model.generate(torch.tensor([[*IDS, 2, 4]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert text == letters.decode(whole[0, -6:])


class Letters:
    """A tokenizer of the tiny model's 64 tokens."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(48 + int(i)) for i in ids)


class Prompt:
    """Asks for what the model writes anyway."""

    def __init__(self, answer: str):
        self.answer = answer

    def ids(self, tokenizer):
        return IDS[:6], IDS[6:9], IDS[9:]

    def answer_ids(self, tokenizer):
        return [0] * len(self.answer)


def test_answers_of_both_protocols(tmp_path, monkeypatch):
    model, letters = tiny_model(), Letters()
    read = []
    monkeypatch.setattr(
        asking, "prefill", lambda model, ids: read.append(ids) or prefills.prefill(model, ids, tmp_path)
    )
    whole = model.generate(torch.tensor([IDS]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    methods = {"full": kvlib.method("full"), "snapkv": kvlib.method("snapkv", budget=0.5)}
    for later, before in ((False, IDS[:9]), (True, IDS[:6])):
        found = lessons.answers(model, letters, Prompt(letters.decode(whole[0, -3:])), methods, later=later)
        assert list(found.index) == ["full cache", "SnapKV"]
        assert found.loc["full cache", "found"]
        assert read.pop() == before
    assert not lessons.answers(model, letters, Prompt("..."), methods)["found"].any()


# Setting up


def test_setup_says_when_the_prose_is_about_another_model(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(start, "display", lambda markdown: shown.append(markdown.data))
    monkeypatch.setattr(kvlib, "load", lambda name: (tiny_model(), None))
    with torch.enable_grad():
        lessons.setup("minilm", written_for="minilm")
        assert not shown and not torch.is_grad_enabled()
        lessons.setup("minilm")
    assert "This run is on `minilm`" in shown[0] and "are those of `smollm2`" in shown[0]
    assert "2 layers of 4 query heads on 2 KV heads" in capsys.readouterr().out


# Drawings


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_strips_show_the_share_of_heads_that_keep(axes):
    kept = {"h2o": torch.tensor([[True, True, False], [True, False, False]]), "mine": torch.tensor([0.25, 0, 1])}
    lessons.strips(axes, kept, marks={"here": [1, 2]}, labels=["a", "b", "c"])
    picture = axes.images[0].get_array()
    color, none = np.array(to_rgba(COLORS["h2o"])), np.array(to_rgba(drawing.EVICTED))
    assert np.allclose(picture[0], [color, (color + none) / 2, none])
    assert np.allclose(picture[1, 1:], [none, to_rgba("#555555")])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["H2O", "mine"]
    assert axes.texts[0].get_text() == "here" and axes.texts[0].xy == (1.5, -0.5)


@pytest.mark.parametrize("log", [False, True])
def test_a_grid_shows_every_number(axes, log):
    lessons.annotated_grid(axes, torch.tensor([[0.4, 20.0, torch.nan]]), "share, %", limits=(1, 100), log=log, digits=1)
    assert [text.get_text() for text in axes.texts] == ["0.4", "20.0"]
    assert axes.collections[0].get_clim() == (1, 100)
    assert isinstance(axes.collections[0].norm, LogNorm) == log
    assert axes.figure.axes[1].get_ylabel() == "share, %"


def test_lines_have_the_intervals_of_the_table(axes):
    table = pd.DataFrame(
        [["h2o", 0.5, 0.3, 0.2, 0.6], ["h2o", 0.1, 0.1, 0.0, 0.2], ["full", 1.0, 0.9, 0.8, 1.0]],
        columns=["configuration", "stored", "mean", "low", "high"],
    )
    lessons.interval_lines(axes, table)
    lessons.budget_axis(axes, ticks=(0.1, 0.5))
    line, bars = axes.containers[0].lines[0], axes.containers[0].lines[2][0]
    assert np.allclose(line.get_xydata(), [[0.1, 10], [0.5, 30]])
    assert np.allclose([segment[:, 1] for segment in bars.get_segments()], [[0, 20], [20, 60]])
    assert any(np.allclose(other.get_ydata(), 90) for other in axes.lines)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "50"]


def test_points_have_the_intervals_of_the_table(axes):
    table = pd.DataFrame({"value": [1.0, -2], "low": [0.5, -5], "high": [3.0, 0]}, index=["vatp", "a row"])
    lessons.interval_points(axes, table)
    ends = [container.lines[2][0].get_segments()[0][:, 0] for container in axes.containers]
    assert np.allclose(ends, [[0.5, 3], [-5, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["VATP", "a row"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row on top


# Tables


def test_changes_are_of_the_prompts_that_both_have():
    """By hand: one task of which two prompts are shared, another of which one is."""
    rows = [("h2o", "number", n, value) for n, value in enumerate((1.0, 0.0, 1.0, 1.0))]
    rows += [("vatp", "number", n, value) for n, value in enumerate((0.0, 0.0))]
    rows += [("h2o", "year", 0, 0.0), ("vatp", "year", 0, 1.0), ("vatp", "year", 1, 0.0)]
    table = pd.DataFrame(rows, columns=["method", "task", "sample", "value"])
    table = table.assign(model="a model", budget=0.5, arguments="{}").sample(frac=1, random_state=0)
    pairs = {"up": ("vatp", "h2o", 0.5), "down": ("h2o", "vatp", 0.5), "same": ("h2o", "h2o", 0.5)}
    found = comparing.changes(table, pairs, ["number", "year"])
    assert found["value"].tolist() == pytest.approx([25, -25, 0])  # the mean of -50 and 100
    assert found["prompts"].tolist() == [3, 3, 5] and found["differ"].tolist() == [2, 2, 0]
    assert found["deviation"].tolist() == pytest.approx([100, 100, 0])  # of -1, 0, 1
    expected = statistics.paired_difference([[0, 0], [1]], [[1, 0], [0]])
    assert found.loc["up", ["low", "high"]].tolist() == pytest.approx([100 * expected.low, 100 * expected.high])
    assert found["p"].tolist() == pytest.approx([expected.above(0), expected.above(0), 1], abs=0.05)
    assert found.loc["down", "low"] < -25 < found.loc["down", "high"]
    with pytest.raises(KeyError):
        comparing.changes(table, {"missing": ("vatp", "h2o", 0.2)}, ["number"])
