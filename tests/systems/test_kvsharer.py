"""KVSharer: what sharing layers attend to, what it weighs, and the search for them against its steps by hand."""

import json
import os

import pytest
import tiny
import torch

import kvlib
from kvlib import calibration, checksums
from kvlib.calibration import layer_sharing

FIVE = {"num_hidden_layers": 5}
SHIPPED = ["minilm", "smollm2"]


def eager(query, key, value, scaling, positions):
    """Causal attention `(batch, new, query_heads, head_dim)`; queries stand at `positions` `(new,)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    hidden = torch.arange(key.shape[2]) > positions[:, None]
    weights = (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def watched(**arguments):
    """The method, and for each pass and layer its query, new key and value, scaling and attention output."""
    seen = []

    class Watched(kvlib.METHODS["kvsharer"]):
        def attend(self, view):
            output = super().attend(view)
            seen.append(
                (view.layer_idx, view.query, view.new_key.clone(), view.new_value.clone(), view.scaling, output)
            )
            return output

    return Watched(**arguments), seen


@pytest.mark.parametrize("architecture", ["llama-gqa", "llama-mha"])
@pytest.mark.parametrize(
    ("pairs", "sources"),
    [
        ([(3, 1)], [0, 1, 2, 1, 4]),
        (((4, 2), (2, 0), (1, 0)), [0, 0, 0, 3, 0]),  # the source of layer 4 has one itself
    ],
)
def test_layers_attend_to_their_sources(architecture, pairs, sources):
    model, passes = tiny.model(architecture, **FIVE), [tiny.tokens(1, n, seed=n) for n in (12, 1, 1, 5, 1)]
    method, seen = watched(pairs=pairs)
    with method(model) as run:
        for i, ids in enumerate(passes):
            model(ids, past_key_values=run.cache if i else None)
    start, past = 0, [[], [], [], [], []]
    for i, ids in enumerate(passes):
        end = start + ids.shape[1]
        for layer, query, key, value, scaling, output in seen[5 * i : 5 * i + 5]:
            past[layer].append((key, value))
            stored = (torch.cat(x, dim=2) for x in zip(*past[sources[layer]]))
            torch.testing.assert_close(output, eager(query, *stored, scaling, torch.arange(start, end)))
        start = end
    assert start == 20 and len(seen) == 25


def test_sharing_layers_store_nothing_and_read_their_source():
    model = tiny.model("llama-gqa", torch.bfloat16, **FIVE)
    token = 2 * 2 * 2 * 8  # heads, keys and values, bytes, channels
    with kvlib.method("kvsharer", pairs=((4, 1), (2, 1)))(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        assert run.stored_bytes() == run.allocated_bytes() == 30 * 3 * token
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == 34 * 3 * token
        assert run.read_bytes() == run.full_bytes() == 34 * 5 * token
        assert [bool(layer.tail.fields) for layer in run.cache.layers] == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": ()}, r"pairs=\(\): pairs of a layer and a source before it"),
        ({"pairs": [(1, 1)]}, r"pairs=\[\(1, 1\)\]: "),
        ({"pairs": [(1, 2)]}, "pairs="),
        ({"pairs": [(2, 1), (2, 0)]}, "each layer once"),
        ({"pairs": [(2, -1)]}, "pairs="),
        ({"pairs": [(2, 1.0)]}, "pairs="),
        ({"pairs": [2, 1]}, "pairs="),
        ({"pairs": None}, "pairs=None: "),
        ({"pairs": "minilm", "count": 0}, "count=0: a number of layers >= 1"),
        ({"pairs": "minilm", "order": "best"}, "order='best': 'dissimilar' or 'similar' or 'random'"),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("kvsharer", **arguments)


def test_layers_that_the_model_does_not_have():
    with (
        pytest.raises(ValueError, match=r"pairs=\(\(2, 0\),\): the model has layers from 0 to 1"),
        kvlib.method("kvsharer", pairs=[(2, 0)])(tiny.model()),
    ):
        pass


# The search


def test_distances_are_those_of_the_formula():
    model, ids = tiny.model("llama-gqa", **FIVE), tiny.tokens(3, 7)
    texts = [kvlib.snapshot(model, row[None]).layers for row in ids]
    found = layer_sharing.distances(model, ids)
    assert sorted(found) == [(i, j) for i in range(5) for j in range(i)]
    for (i, j), apart in found.items():
        total = 0.0
        for kind in (1, 2):
            for head in range(2):
                for token in range(7):
                    mean = [sum(text[layer][kind][0, head, token] for text in texts) / 3 for layer in (i, j)]
                    total += float((mean[0] - mean[1]).norm()) / (2 * 7)
        assert apart == pytest.approx(total / 2)


def test_pairs_are_tried_in_the_order_that_is_asked_for():
    apart = {(i, j): float((7 * i + 3 * j) % 11) + i / 10 for i in range(6) for j in range(i)}
    near, far = (layer_sharing.arranged(apart, order) for order in ("similar", "dissimilar"))
    assert [apart[pair] for pair in near] == sorted(apart.values()) and far == near[::-1]
    lot = layer_sharing.arranged(apart, "random")
    assert sorted(lot) == sorted(apart) and lot not in (near, far)
    assert lot == layer_sharing.arranged(dict(apart), "random")


def test_the_search_goes_on_from_what_it_has_found(monkeypatch):
    """Cosines are told: a pair costs what it says, and what was found costs on."""
    costs, asked = {(3, 0): 0.3, (3, 1): 0.1, (2, 0): 0.3, (4, 2): 0.2, (4, 0): 0.1, (1, 0): 0.01}, []

    def hidden(model, ids, pairs):
        asked.append(pairs)
        cosine = 1 - sum(costs[pair] for pair in pairs)
        return torch.tensor([[cosine, (1 - cosine**2) ** 0.5]]).expand(2, -1)

    monkeypatch.setattr(layer_sharing, "last_hidden", hidden)
    found = layer_sharing.search(None, None, list(costs), 3)
    # (2, 0) would leave 0.4; layer 3 has its source; (4, 2) leaves exactly 0.5, which is not more
    assert asked == [[], [(3, 0)], [(3, 0), (2, 0)], [(3, 0), (4, 2)], [(3, 0), (4, 0)], [(3, 0), (4, 0), (1, 0)]]
    assert found == {"pairs": [(3, 0), (4, 0), (1, 0)], "cosines": [0.7, 0.6, 0.59], "tried": 5}
    assert layer_sharing.search(None, None, list(costs), 1)["pairs"] == [(3, 0)]


def test_last_hidden_states_are_those_of_the_model_that_shares():
    model, ids = tiny.model("llama-gqa", torch.float32, **FIVE), tiny.tokens(2, 6)
    plain = model.model(ids).last_hidden_state.flatten(1)
    torch.testing.assert_close(layer_sharing.last_hidden(model, ids, []), plain)
    shared = layer_sharing.last_hidden(model, ids, [(4, 0)])
    assert shared.shape == plain.shape and (shared - plain).abs().max() > 0.01


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer_sharing, "WINDOWS", 1)
    layer_sharing.main(["minilm", "--count", "1", "--folder", str(tmp_path)])
    file = tmp_path / "kvsharer.json"
    assert capsys.readouterr().out == f"{file}\n" and checksums.problems(tmp_path) == []
    recorded, (model, tokenizer) = json.loads(file.read_text()), kvlib.load("minilm")
    apart = layer_sharing.distances(model.float(), layer_sharing.windows(tokenizer))
    far = sorted(apart, key=apart.get)
    assert recorded["orders"]["similar"]["pairs"] == [[*far[0]]]
    assert recorded["orders"]["dissimilar"]["pairs"] == [[*far[-1]]]
    for order, found in recorded["orders"].items():
        read = kvlib.method("kvsharer", pairs=tmp_path, count=1, order=order).prepare(model)
        assert read == dict(found["pairs"])
    with pytest.raises(ValueError, match=r"count=2: .*kvsharer.json has 1 pairs"):
        kvlib.method("kvsharer", pairs=str(tmp_path), count=2).prepare(model)
    with pytest.raises(ValueError, match="is the calibration of another model"):
        kvlib.method("kvsharer", pairs=tmp_path).prepare(tiny.model())
    with pytest.raises(ValueError, match="no kvsharer.json for 'nobody': .*one of minilm, smollm2"):
        kvlib.method("kvsharer", pairs="nobody").prepare(model)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_calibrations(name):
    if name == "smollm2" and os.environ.get("MODEL") == "minilm":
        pytest.skip("without the real model")
    recorded = json.loads(calibration.find(name, "kvsharer.json").read_text())
    model, _ = kvlib.load(name)
    layers = model.config.num_hidden_layers
    assert list(recorded["orders"]) == ["dissimilar", "similar", "random"]
    for order, found in recorded["orders"].items():
        assert len(found["pairs"]) == layers // 4 <= found["tried"]
        assert all(layer > source for layer, source in found["pairs"]) and min(found["cosines"]) > 0.5
        read = kvlib.method("kvsharer", pairs=name, order=order).prepare(model)
        assert [*map(list, read.items())] == found["pairs"][:4]
