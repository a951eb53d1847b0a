"""`uncomp_release`: what the released code does and `uncomp_stage` does not."""

import pytest
import tiny
import torch
from staged import Staged

import kvlib
from kvlib.methods.head_groups import load


@pytest.mark.parametrize(
    ("window", "shortest", "lengths"),
    [(4096, 0.375, [3456, 2816, 2176, 1536]), (8192, 0.1875, [6528, 4864, 3200, 1536])],
)
def test_released_lengths_are_those_of_the_window(window, shortest, lengths):
    """As in the released files for Llama2-7B and Llama3-8B."""
    model = tiny.build("llama-gqa", num_hidden_layers=32, max_position_embeddings=window)
    method = kvlib.method("uncomp_release", budget=0.5, spread=0.0, shortest=shortest)
    assert method.prepare(model).shares == dict(zip((2, 15, 26, 31), lengths))


RELEASED = {"spread": 0.0, "window": 3, "starts": (1, 3), "shortest": 0.5}


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
def test_released_stages_keep_what_was_looked_at_and_the_last_token(architecture):
    """Of a window of 40 tokens 30 and 20 go on, of a shorter prompt all that there are."""
    model = tiny.build(architecture, num_hidden_layers=5, max_position_embeddings=40)
    ids = tiny.tokens(38, seed=4)[None]
    expected = Staged(model, ids, {1: 30, 3: 20}, 3, {37})
    assert 0 not in expected.positions[-1] and not {35, 36} <= {*expected.positions[-1]}  # which "clean" would force
    with kvlib.method("uncomp_release", budget=38, **RELEASED)(model) as run, torch.no_grad():
        logits = model(ids).logits[0, -1]
        assert [run.kept(layer)[0][0].tolist() for layer in range(5)] == expected.positions
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-9)


def test_released_lengths_are_the_same_for_all_rows():
    model = tiny.build("llama-gqa", num_hidden_layers=5, max_position_embeddings=40)
    with kvlib.method("uncomp_release", budget=38, **RELEASED)(model) as run:
        model(*tiny.pad([tiny.tokens(38), tiny.tokens(24, seed=1), tiny.tokens(11, seed=2)]))
        assert [layer.lengths[:, 0].tolist() for layer in run.cache.layers] == [
            [38, 24, 11], [30, 24, 11], [30, 24, 11], [20, 20, 11], [20, 20, 11]
        ]  # fmt: skip


def test_the_release_groups_by_its_greedy_rule():
    model, ids = kvlib.load("minilm")[0], tiny.tokens(60)[None]
    arguments = {"budget": 30, "groups": 4, "spread": 0.5, "types": "minilm"}
    found = {}
    for name, rule in (("uncomp", "clean"), ("uncomp_release", "release")):
        with kvlib.method(name, **arguments)(model) as run:
            model(ids)
            found[rule] = torch.stack([layer.lengths[0] for layer in run.cache.layers])
        labels = load("minilm", model).groups(4, rule)
        assert found[rule].equal(30 + torch.tensor([-15, -5, 5, 15])[labels])
    assert not found["clean"].equal(found["release"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "types=None: the release types heads by a calibration"),
        ({"types": "minilm", "across": True}, "across=True: the release has groups within each layer"),
        ({"types": "minilm", "shortest": 1536}, "shortest=1536: a share of the prompt"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("uncomp_release", budget=0.5, **arguments)
    kvlib.method("uncomp_release", budget=0.5, types="minilm")
