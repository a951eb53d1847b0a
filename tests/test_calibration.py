"""What is learned of a model beforehand: TidalDecode's selection layers, by attention mass and by accuracy."""

import functools
import itertools
import json
import os

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tidaldecode import oracle_choice

import kvlib
from kvlib import calibration, checksums, paths
from kvlib.calibration import selection_layers, sweep
from kvlib.calibration.attention_mass import attention_mass, candidates, held, score

SIX = {"num_hidden_layers": 6}
HEADS = ["query", "group", "all"]
SHIPPED = ["minilm", "smollm2"]


# Attention mass


def oracle_mass(model, ids, k, heads, positions):
    """`M` by loops over one dense pass, `k` tokens by the number in the text."""
    layers = kvlib.snapshot(model, ids).layers
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for at in range(ids.shape[1] - positions, ids.shape[1]):
        logits = []
        for query, key, _, scaling in layers:
            grouped = query[0, :, at].unflatten(0, (key.shape[1], -1))
            logits.append(torch.einsum("hgd,hkd->hgk", grouped, key[0, :, : at + 1]) * scaling)
        attention = [x.softmax(-1).flatten(0, 1).tolist() for x in logits]
        for i, chosen in enumerate(oracle_choice(x, k, heads, 0, 0.0) for x in logits):
            for j, rows in enumerate(attention):
                shares = [sum(row[token] for token in tokens) for row, tokens in zip(rows, chosen, strict=True)]
                total[i, j] += sum(shares) / len(shares) / positions
    return total


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize(("budget", "k"), [(5, 5), (0.3, 8)])
def test_mass_is_that_of_loops(architecture, budget, k):
    model, ids = tiny.model(architecture, **SIX), tiny.tokens(1, 30)
    found = attention_mass(model, ids, budget, positions=3)
    assert list(found) == HEADS
    for heads, mass in found.items():
        torch.testing.assert_close(mass, oracle_mass(model, ids, k, heads, 3), rtol=1e-9, atol=1e-9)


def test_mass_of_all_tokens_is_one():
    for mass in attention_mass(tiny.model("llama-gqa", **SIX), tiny.tokens(1, 20), 20).values():
        torch.testing.assert_close(mass, torch.ones(6, 6, dtype=torch.float64))


@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_candidates_are_all_choices_with_as_many_sparse_layers(layers, count, first, free):
    subsets = itertools.chain.from_iterable(itertools.combinations(range(layers), n) for n in range(1, layers + 1))

    def fits(chosen):
        alike = chosen[0] + len(chosen) == first + count if free else (chosen[0], len(chosen)) == (first, count)
        return alike and layers > chosen[0] + len(chosen)

    wanted = [chosen for chosen in subsets if fits(chosen)]
    if wanted:
        assert sorted(candidates(layers, count, first, free)) == sorted(wanted)
    else:
        with pytest.raises(ValueError, match=f"a model of {layers} has no layer left"):
            candidates(layers, count, first, free)


def oracle_score(mass, chosen):
    """Layer by layer: the latest selection layer before it."""
    sparse = [j for j in range(chosen[0], len(mass)) if j not in chosen]
    return sum(float(mass[max(s for s in chosen if s < j), j]) for j in sparse) / len(sparse)


@given(st.integers(4, 7), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_of_all(layers, count, first, free, seed):
    mass, other = torch.rand(2, layers, layers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if layers <= first + count:
        return
    compared = candidates(layers, count, first, free)
    here, there = ({chosen: score(m, chosen) for chosen in compared} for m in (mass, other))
    expected = {chosen: oracle_score(mass, chosen) for chosen in compared}
    assert here == pytest.approx(expected)
    cell = selection_layers.choose(compared, here, there)
    assert expected[cell["selection_layers"]] == pytest.approx(max(expected.values()))
    elsewhere = [oracle_score(other, cell["selection_layers"]), max(oracle_score(other, c) for c in compared)]
    assert cell["elsewhere"]["scores"] == pytest.approx(elsewhere, abs=1e-4)


@pytest.mark.parametrize(("starts", "count"), [((0, 6), 2), ((0, 4, 7), 3)])
def test_a_trace_whose_layers_are_known(starts, count):
    """Layers of a block attend to the same tokens, others than those of the next block: its first layer chooses."""
    layers, query_heads, tokens, k = 10, 4, 40, 5
    attention = torch.rand(layers, query_heads, tokens, generator=torch.Generator().manual_seed(0))
    for layer in range(layers):
        block = sum(start <= layer for start in starts)
        attention[layer, :, 8 * block : 8 * block + k] += 10
    attention /= attention.sum(-1, keepdim=True)
    mass = held(attention, attention.topk(k).indices)
    scores = {chosen: score(mass, chosen) for chosen in candidates(layers, count)}
    assert selection_layers.choose(list(scores), scores, scores)["selection_layers"] == (2, *starts[1:])


def test_of_equal_choices_the_earlier_one():
    compared = [(2, 3), (2, 4), (2, 5)]
    here, there = dict(zip([(2,), *compared], [9.0, 0.5, 1.0, 1.0])), dict(zip([(2,), *compared], [9.0, 0.5, 0.2, 0.0]))
    cell = selection_layers.choose(compared, here, there)
    assert cell["selection_layers"] == (2, 4)  # one layer alone is told, but is none of those compared
    assert cell["elsewhere"] == {"best": (2, 3), "scores": [0.2, 0.5]}
    assert cell["scores"] == {"2": [9.0, 9.0], "2 3": [0.5, 0.5], "2 4": [1.0, 0.2], "2 5": [1.0, 0.0]}


# The file


@given(
    st.recursive(
        st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_again(value):
    assert json.loads(selection_layers.readable(value)) == value


def cell(*layers):
    return {"selection_layers": layers}


def calibrated(folder, heads="query", budget=5):
    return kvlib.method("tidaldecode", budget=budget, selection_layers=str(folder), heads=heads)


def test_the_method_reads_what_was_stored(tmp_path):
    model, ids = tiny.model("llama-gqa", **SIX), [tiny.tokens(30)]
    found = {"query": {"mass": cell(1, 3)}, "all": {"mass": cell(1, 4), "accuracy": cell(2, 3)}}
    file = selection_layers.store(tmp_path / "new", "tiny", model, found)
    assert checksums.problems(file.parent) == [] and checksums.unlisted(file.parent, "*.json") == []
    for heads, layers in (("query", (1, 3)), ("all", (2, 3))):
        explicit = kvlib.method("tidaldecode", budget=5, selection_layers=layers, heads=heads)
        turn = tiny.once(model, calibrated(file.parent, heads), ids, new=5)
        assert torch.equal(turn.logits, tiny.once(model, explicit, ids, new=5).logits)
    with pytest.raises(ValueError, match=r"heads='group': .*tidaldecode.json has layers for query and all"):
        calibrated(file.parent, "group").prepare(model)


def test_a_second_result_stands_beside_the_first(tmp_path):
    model = tiny.model("llama-gqa", **SIX)
    selection_layers.store(tmp_path, "tiny", model, {"query": {"accuracy": cell(1, 3)}, "group": {"mass": cell(0, 3)}})
    file = selection_layers.store(tmp_path, "tiny", model, {"query": {"mass": cell(1, 4)}, "group": {"mass": cell(2)}})
    choices = json.loads(file.read_text())["choices"]
    assert choices == {"query": {"accuracy": {"selection_layers": [1, 3]}, "mass": {"selection_layers": [1, 4]}},
                       "group": {"mass": {"selection_layers": [2]}}}  # fmt: skip
    assert checksums.problems(tmp_path) == []


def test_a_calibration_of_another_model(tmp_path):
    model = tiny.model("llama-gqa", **SIX)
    selection_layers.store(tmp_path, "tiny", model, {"query": {"mass": cell(1, 3)}})
    trained = tiny.build("llama-gqa", **SIX)
    trained.model.layers[4].self_attn.o_proj.weight.mul_(1.1)
    for other in (tiny.model("llama-mha", **SIX), tiny.model("llama-gqa"), trained):
        with pytest.raises(ValueError, match="is the calibration of another model"):
            calibrated(tmp_path).prepare(other)
        with pytest.raises(ValueError, match="is the calibration of another model"):
            selection_layers.store(tmp_path, "other", other, {"query": {"mass": cell(0, 1)}})
    rounded = tiny.build("llama-gqa", torch.bfloat16, **SIX)
    assert calibrated(tmp_path).prepare(rounded) == (1, 3)


def test_no_calibration(tmp_path):
    for source in (tmp_path, "nobody"):
        with pytest.raises(ValueError, match=f"no tidaldecode.json for '{source}': .*one of minilm, smollm2"):
            calibrated(source).prepare(tiny.model())


# The sweep


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """A sweep on minilm's questions of 256 tokens, and what `evaluate` has been asked for: family, seeds, layers."""
    model, tokenizer = kvlib.load("minilm")
    asked, stop_at = [], []
    evaluate = sweep.evaluate

    @functools.wraps(evaluate)
    def watched(model, tokenizer, configurations, task, length, samples, **arguments):
        if len(asked) in stop_at:
            raise KeyboardInterrupt
        asked.append((task, *samples, *(json.loads(c.arguments)["selection_layers"][1] for c in configurations)))
        return evaluate(model, tokenizer, configurations, task, length, samples, **arguments)

    monkeypatch.setattr(sweep, "evaluate", watched)

    def run(seconds, budget=64, folder="kept", families=("needle",)):
        configurations = [sweep.configuration(budget, "all", (2, second)) for second in seconds]
        where = {"kept": tmp_path / folder, "block": 2}
        found = sweep.accuracies(model, tokenizer, configurations, families, 256, [7, 8, 9], **where)
        return [found[configuration] for configuration in configurations]

    return run, asked, stop_at


def test_a_sweep_goes_on_where_it_stopped(swept):
    run, asked, stop_at = swept
    stop_at.append(1)
    with pytest.raises(KeyboardInterrupt):
        run([3, 11])
    stop_at.clear()
    found = run([3, 11])
    assert asked == [("needle", 7, 8, 3, 11), ("needle", 9, 3, 11)] and found[0] < found[1]
    asked.clear()
    assert run([3, 11]) == found and run([11]) == found[1:] and asked == []
    assert run([11], folder="another") == found[1:] and asked == [("needle", 7, 8, 11), ("needle", 9, 11)]


def test_a_sweep_makes_what_is_missing(swept):
    run, asked, _ = swept
    (needle,) = run([11])
    asked.clear()
    assert run([11, 12])[0] == needle and asked == [("needle", 7, 8, 12), ("needle", 9, 12)]
    asked.clear()
    both, other = run([11], families=["needle", "label"]), run([11], families=["label"])
    assert asked == [("label", 7, 8, 11), ("label", 9, 11)] and both == [pytest.approx((needle + other[0]) / 2)]
    asked.clear()
    run([11], budget=63)
    assert asked == [("needle", 7, 8, 11), ("needle", 9, 11)]


def test_from_the_command_line(tmp_path, capsys):
    common = ["minilm", "--folder", str(tmp_path), "--length", "256", "--prompts", "1", "--heads", "all"]
    selection_layers.main([*common, "--count", "3", "--free", "--tasks", "needle", "--others", "label"])
    model, _ = kvlib.load("minilm")
    ways = json.loads((tmp_path / "tidaldecode.json").read_text())["choices"]["all"]
    assert calibrated(tmp_path, "all").prepare(model) == tuple(ways["mass"]["selection_layers"])
    assert ways["mass"]["prompts"] == [["needle"], ["label"]] and len(ways["mass"]["scores"]) <= 102
    selection_layers.main([*common, "--by", "accuracy", "--first", "12", "--rows", str(tmp_path / "rows")])
    ways = json.loads((tmp_path / "tidaldecode.json").read_text())["choices"]["all"]
    assert [*ways["accuracy"]["scores"]] == ["12", "12 13", "12 14", "12 15"]
    assert calibrated(tmp_path, "all").prepare(model) == tuple(ways["accuracy"]["selection_layers"])
    assert capsys.readouterr().out.count(str(tmp_path / "tidaldecode.json")) == 2
    with pytest.raises(SystemExit):
        selection_layers.main(["somebody/model"])
    assert "--folder: where the calibration" in capsys.readouterr().err


# What is committed


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_calibrations(name):
    file = calibration.find(name, "tidaldecode.json")
    assert file.stat().st_size < 60_000 and paths.DATA in file.parents
    recorded = json.loads(file.read_text())
    assert sorted(recorded["choices"]) == sorted(HEADS)
    for ways in recorded["choices"].values():
        for cell in ways.values():
            scores = {tuple(map(int, chosen.split())): pair for chosen, pair in cell["scores"].items()}
            compared = [chosen for chosen in scores if len(chosen) > 1]
            best, best_there = (max(compared, key=lambda c: scores[c][i]) for i in range(2))
            assert scores[tuple(cell["selection_layers"])][0] == scores[best][0]
            assert cell["elsewhere"]["scores"] == [scores[tuple(cell["selection_layers"])][1], scores[best_there][1]]
            assert cell["seeds"][0] >= 1_000_000
        rows = ways["mass"]["mass"]
        mass = torch.tensor([[0.0] * i + row for i, row in enumerate(rows)], dtype=torch.float64)
        for chosen, (value, _) in ways["mass"]["scores"].items():
            assert score(mass, tuple(map(int, chosen.split()))) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_have_their_layers(name):
    if name == "smollm2" and os.environ.get("MODEL") == "minilm":
        pytest.skip("without the real model")
    model, _ = kvlib.load(name)
    choices = json.loads(calibration.find(name, "tidaldecode.json").read_text())["choices"]
    for heads in HEADS:
        way = "accuracy" if "accuracy" in choices[heads] else "mass"
        method = kvlib.method("tidaldecode", budget=0.1, selection_layers=name, heads=heads)
        assert method.prepare(model) == tuple(choices[heads][way]["selection_layers"])
