"""What the lesson on UNComp's parts computes: elbows by geometry, typings by loops, rotation by hooks."""

import itertools
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import tiny
import torch

import kvlib
from kvlib.lab.lessons import comparing, spreads, typing_heads
from kvlib.methods.entropy import entropy
from kvlib.methods.head_groups import Measured, by_rank, clean, group_sizes, release

N = 24


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "qwen3"])
def test_queries_and_keys_before_rotation_are_the_projections(architecture):
    """In a model with norms behind the projections (Qwen3) they are what comes out of these."""
    model, ids, seen = tiny.model(architecture), tiny.tokens(1, N), {}
    handles = []
    for name, module in model.model.layers[1].self_attn.named_modules():
        if name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            hook = lambda module, inputs, output, name=name: seen.__setitem__(name[0], output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    snapshot = kvlib.snapshot(model, ids)
    for handle in handles:
        handle.remove()
    query, key, value, scaling = typing_heads.before_rotation(model, snapshot).layers[1]
    for found, name in ((query, "q"), (key, "k")):
        expected = seen[name].view(1, N, -1, found.shape[-1]).transpose(1, 2)
        growth = 1 + torch.arange(N)[:, None] / 256  # with the position, in these models (`tiny`)
        torch.testing.assert_close(found, growth * expected, rtol=1e-6, atol=1e-6)
        rotated = snapshot.layers[1][name == "k"]
        assert not torch.allclose(found[:, :, 1:], rotated[:, :, 1:], atol=1e-2)
    assert value is snapshot.layers[1][2] and scaling == snapshot.layers[1][3]


def furthest(points):
    """The point furthest from the line through the ends, by perpendicular distances, counted from 1."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = math.hypot(x1 - x0, y1 - y0)
    away = [abs((x1 - x0) * (y0 - y) - (x0 - x) * (y1 - y0)) / length for x, y in points]
    return away.index(max(away)) + 1


@pytest.mark.parametrize("axes", ["linear", "log", "log-log"])
def test_elbows_are_furthest_from_the_chord(axes):
    """By perpendicular distances, whatever the units of the axes are."""
    curves = torch.rand(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(-1).values
    curves = curves.flip(-1) ** 4
    found = typing_heads.elbow(curves, axes)
    for i, j in itertools.product(range(2), range(3)):
        x, y = [float(number) for number in range(1, 17)], curves[i, j].tolist()
        x = [math.log(number) for number in x] if axes == "log-log" else x
        y = [math.log(number) for number in y] if axes != "linear" else y
        assert found[i, j] == furthest(list(zip(x, y))) == furthest(list(zip(x, [7 * number for number in y])))


def test_elbows_by_hand():
    bent = torch.tensor([8.0, 4, 2, 1, 0.9, 0.8, 0.7])
    assert typing_heads.elbow(bent, "linear") == 3  # chord 8, 6.78, 5.57, 4.35, ...: 2 is 3.57 below it, 1 is 3.35
    assert typing_heads.elbow(torch.tensor([5.0, 4.9, 4.8, 4.7, 1.0]), "linear") == 4  # above the chord
    assert typing_heads.elbow(torch.tensor([1.0, 0.5, 0.0, 0.0]), "log") == 3  # 0 has a logarithm that can be drawn
    with pytest.raises(KeyError):
        typing_heads.elbow(bent, "semilog")


def test_distances_by_loops():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    texts, heads = typing_heads.distances(first, second)

    def apart(one, other):
        return sum(abs(math.log10(a) - math.log10(b)) for a, b in zip(one.tolist(), other.tolist())) / 5

    places = list(itertools.product(range(2), range(3)))
    assert texts == pytest.approx(sum(apart(first[place], second[place]) for place in places) / 6)
    both = [layer for x in (first, second) for layer in x]  # a layer on a text each
    pairs = [pair for layer in both for pair in itertools.combinations(layer, 2)]
    assert heads == pytest.approx(sum(apart(*pair) for pair in pairs) / len(pairs))
    assert typing_heads.distances(first, first)[0] == 0


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (9, 2), (3, 3), (32, 8), (7, 1)])
def test_chance_by_counting(heads, groups):
    labels = [group for group, size in enumerate(group_sizes(heads, groups)) for _ in range(size)]
    same = sum(a == b for a, b in itertools.product(labels, labels))
    assert typing_heads.chance(heads, groups) == pytest.approx(same / heads**2)


@pytest.mark.parametrize(
    ("heads", "groups", "spread"), [(3, 3, 2 / 3), (8, 2, 0.95), (8, 4, 1 / 3), (90, 8, 0.5), (5, 1, 0.5)]
)
def test_tokens_that_are_moved(heads, groups, spread):
    """By the budgets of all heads, of a mean so large that rounding is nothing."""
    mean, place = 10**7, [group for group, size in enumerate(group_sizes(heads, groups)) for _ in range(size)]
    budgets = [mean * (1 + spread * (2 * g - groups + 1) / max(1, groups - 1)) for g in place]
    given = sum(mean - budget for budget in budgets if budget < mean)
    assert typing_heads.moved(heads, groups, spread) == pytest.approx(given / sum(budgets))


def test_two_rules_and_two_typings():
    windows = torch.tensor([[0.0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0, 1], [1, 2, 0]])[
        :, None
    ]  # (windows, layers, heads)
    measured = Measured({"a": windows, "b": windows[:1]}, {}, 3, 8, 2)
    found = typing_heads.two_rules(measured, 3)
    assert found == pytest.approx({"by lot": 200 / 3, "a": 200 / 3, "b": 0, "all texts": 0, "furthest jump": 0})
    scores = torch.tensor([[1.0, 2, 3, 4], [1.0, 2, 3, 4]])
    (like, halves), in_layers = typing_heads.two_typings(scores, torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 1, 2]]))
    assert in_layers.tolist() == pytest.approx([1, -0.8]) and (like, halves) == pytest.approx((0.1, 50))
    (like, _), in_layers = typing_heads.two_typings(scores[:, :3], scores[:, :3])
    assert math.isnan(like) and in_layers.isnan().all()


@pytest.mark.parametrize("rule", ["clean", "release"])
def test_stability_against_all_splits(rule):
    """Of four windows one or two type, and the others judge: so few that every split can be listed."""
    generator, of = torch.Generator().manual_seed(0), {"clean": clean, "release": release}[rule]
    entropies = torch.rand(4, 5, 6, generator=generator) + torch.rand(6, generator=generator)
    found = typing_heads.stability(entropies, 3, (1, 2), rule=rule, draws=300)
    for count in (1, 2):
        shares = []
        for chosen in itertools.combinations(range(4), count):
            others = [window for window in range(4) if window not in chosen]
            shares.append((of(entropies[[*chosen]], 3) == of(entropies[others], 3)).double().mean().item())
        assert found.loc[count, "value"] == pytest.approx(sum(shares) / len(shares), abs=0.02)
        assert min(shares) - 1e-9 <= found.loc[count, "low"] <= found.loc[count, "high"] <= max(shares) + 1e-9


def test_stability_against_other_windows():
    entropies = torch.tensor([[[1.0, 2, 3, 4]], [[1.0, 2, 3, 4]]])
    found = typing_heads.stability(entropies, 2, (1, 2), against=entropies.flip(-1), draws=3)
    assert found["value"].tolist() == [0, 0] and found.index.name == "windows"
    assert typing_heads.stability(entropies, 2, (2,), against=entropies[:1], draws=3)["value"].tolist() == [1]
    assert torch.equal(by_rank(entropies[0], 2), torch.tensor([[0, 0, 1, 1]]))


def test_bends_over_heads():
    curves = torch.tensor([[8.0, 4, 2, 1, 0.9, 0.8, 0.7, 0.6], [5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 1.0]])[None]
    found = typing_heads.bends(curves, {"linear": "linear axes", "log": "logarithmic"})
    ends = [typing_heads.elbow(curves, axes).flatten().tolist() for axes in ("linear", "log")]
    assert found["k = d/4"] == 2 and found["elbow, linear axes"] == min(ends[0])  # torch's median is the lower one
    assert [found["from"], found["to"]] == [min(map(min, ends)), max(map(max, ends))]
    assert list(found) == ["k = d/4", "elbow, linear axes", "elbow, logarithmic", "from", "to"]


def test_before_and_after_rotation():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(2, 5, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    before, after = (x / x.sum(-1, keepdim=True) for x in (before, after))
    found, in_layers = typing_heads.before_and_after(
        {("a", "prose", "query", "before"): before, ("a", "prose", "query", "after"): after}
    )
    for kind, count in (("truncated", 2), ("full", 8)):
        pair = [entropy(x, count) for x in (before, after)]
        (like, same), layers = typing_heads.two_typings(*pair)
        expected = [pair[0].mean().item(), pair[1].mean().item(), like, same]
        assert found.loc["a", "query", "prose", kind].tolist() == pytest.approx(expected)
        entropies, each = in_layers["a", "query", "prose", kind]
        assert torch.equal(each, layers) and torch.equal(entropies[1], pair[1])


def test_other_numbers_of_eigenvalues():
    spectra = torch.rand(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(-1).values
    spectra = spectra.flip(-1) / spectra.sum(-1, keepdim=True)
    found = typing_heads.other_counts(spectra, (1 / 4, 1)).set_index(["kind", "k / d"])
    assert found.loc[("as released", 1 / 4)].tolist() == pytest.approx([1, 100])  # 4 of 16, as UNComp
    assert found.loc[("as released", 1)].tolist() == pytest.approx(found.loc[("renormalised", 1)].tolist())
    kept = spectra[..., :4] / spectra[..., :4].sum(-1, keepdim=True)
    (like, same), _ = typing_heads.two_typings(entropy(spectra, 4), -(kept * kept.log()).sum(-1))
    assert found.loc[("renormalised", 1 / 4)].tolist() == pytest.approx([like, same])
    narrow = typing_heads.other_counts(spectra[..., :8], (1 / 16, 1 / 8))  # a sixteenth of 8 is no eigenvalue
    assert narrow["k / d"].tolist() == [1 / 8, 1 / 8]


def test_a_prompt_types_as_a_calibration():
    """Four query heads on two KV heads; the prompt ranks these as prose does, and the other way round than code."""
    flat, narrow = torch.full((8,), 1 / 8).double(), torch.tensor([1.0] + 7 * [0.0]).double()
    spectra = torch.stack([narrow, flat, flat, flat])[None]  # (layers, query_heads, d)
    prose, code = torch.tensor([[[0.0, 1, 3, 3]]]), torch.tensor([[[3.0, 3, 0, 1]]])
    measured = Measured({"prose": prose, "code": code}, {}, 2, 8, 2)
    found = typing_heads.as_calibrated(spectra, measured, 2)
    assert [found["typed by prose"], found["typed by code"], found["by lot"]] == [100, 0, 50]
    assert list(found) == ["typed by prose", "typed by code", "typed by both", "by lot"]


def test_stability_within_and_between_texts():
    """Every window of a text is the same; code has the order of prose the other way round."""
    prose = torch.tensor([1.0, 2, 3, 4]).expand(4, 2, 4)
    measured = Measured({"prose": prose, "code": -prose}, {}, 4, 8, 2)
    rows = typing_heads.between_texts(measured, 2, draws=3)
    assert rows.groupby("kind")["value"].agg(list).to_dict() == {
        "prose by prose": [100, 100],
        "code by code": [100, 100],
        "prose by code": [0, 0, 0],
    }
    assert rows["windows"].tolist() == [1, 2, 1, 2, 1, 2, 4] and rows["at"].is_unique


def test_settings_against_one_budget(monkeypatch):
    """By hand: one prompt more of two is answered; groups of all heads move what their number of heads says."""
    rows = [("{}", 0, 1.0), ("{}", 1, 1.0), ('{"spread": 0.0}', 0, 1.0), ('{"spread": 0.0}', 1, 0.0)]
    table = pd.DataFrame(rows, columns=["arguments", "sample", "value"])
    table = table.assign(model="a", method="uncomp", budget=0.2, task="number")
    settings = [("by entropy", 3, 0.5, "uncomp"), ("over all layers", 2, 0.5, "uncomp")]
    monkeypatch.setattr(spreads, "SETTINGS", {"a": settings})
    measured = {"a": Measured({}, {"prose": torch.zeros(1, 5)}, 3, 8, 2)}
    found = spreads.above({"a": table}, {"a": ["number"]}, measured)
    assert found["value"].tolist() == [50, 50] and found["prompts"].tolist() == [2, 2]
    expected = [100 * typing_heads.moved(3, 3, 0.5), 100 * typing_heads.moved(15, 2, 0.5)]
    assert found["moved, %"].tolist() == pytest.approx(expected)
    assert found["low"][0] == comparing.changes(table, {"": ("uncomp", spreads.UNIFORM, 0.2)}, ["number"])["low"].item()


def test_intervals_are_drawn_by_kind():
    rows = pd.DataFrame(
        {
            "kind": ["a", "b", "a"],
            "at": [1, 2, 3],
            "value": [1.0, 5, 2],
            "low": [0.5, 5 + 1e-15, 1],
            "high": [2.0, 6, 4],
        }
    )
    axes = plt.figure().subplots()
    typing_heads.intervals(axes, rows, {"a": {"color": "black"}, "b": {"color": "black", "linestyle": ""}})
    first, second = axes.containers
    assert [first.get_label(), second.get_label()] == ["a", "b"]
    assert first.lines[0].get_xydata().tolist() == [[1, 1], [3, 2]]
    assert [segment[:, 1].tolist() for segment in first.lines[2][0].get_segments()] == [[0.5, 2], [1, 4]]
    assert second.lines[2][0].get_segments()[0][:, 1].tolist() == [5, 6]
