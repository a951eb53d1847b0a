"""What lessons show of readers: sets of all layers, one step, answers; against the stock model and loops."""

import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from test_recall import STEPS, attentions, random_model
from test_tidaldecode import oracle_choice
from transformers import AutoTokenizer

import kvlib
from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.lessons import returning, selections

IDS = torch.arange(3, 43)[None] * 7 % 61
PROMPT, LAST = IDS[:, :-STEPS], IDS[0, -STEPS:].tolist()
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "qwen3"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


@pytest.mark.parametrize(("depth", "expected"), [(4, (0, 2)), (9, (0, 2)), (10, (2, 4)), (16, (2, 6)), (32, (2, 13))])
def test_every_model_has_two_selection_layers(depth, expected):
    config = SimpleNamespace(num_hidden_layers=depth)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert selections.selection_layers(model, None) == expected


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("k", [6, 100])
def test_a_trace_is_the_stock_models_attention_and_choices(architecture, k):
    model = random_model(architecture)
    steps = selections.trace(model, kvlib.snapshot(model, PROMPT), LAST, k)
    for (attention, chosen), expected in zip(steps, attentions(architecture, IDS), strict=True):
        torch.testing.assert_close(attention, torch.stack(expected), rtol=1e-9, atol=1e-12)
        for layer, weights in enumerate(expected):
            grouped = weights.log().unflatten(0, (4 if architecture == "llama-mha" else 2, -1))
            for heads, masks in chosen.items():
                sets = [{*mask.nonzero().flatten().tolist()} for mask in masks[layer]]
                assert sets == oracle_choice(grouped, k, heads, 0, 0.0)


def test_slots_that_are_no_tokens_mark_nothing():
    found = selections.marked(torch.tensor([[2, 0, -1], [-1, -1, 3]]), 5)
    assert found.int().tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_unions_by_sets(kv_heads):
    chosen = torch.rand(3, 6, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    found, group = selections.unions(chosen, kv_heads), 6 // kv_heads
    assert found.shape == (3, kv_heads)
    for layer in range(3):
        sets = [{*mask.nonzero().flatten().tolist()} for mask in chosen[layer]]
        expected = [len(set().union(*sets[head * group : (head + 1) * group])) for head in range(kv_heads)]
        assert found[layer].tolist() == expected


def test_a_passage_returns():
    goes_on, returns, shared = returning.passages(list(range(100, 200)), 16)
    assert goes_on == list(range(100, 116)) and shared == 10
    assert returns == [*range(100, 110), *range(104, 110)]


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize(("method", "arguments"), [("full", {}), ("h2o", {"budget": 6}), ("h2o", {"budget": 9})])
def test_bits_of_decoded_tokens(method, arguments, first):
    """Against a softmax by hand over a text that is fed token by token from its first one on."""
    model, ids = random_model("llama-gqa"), torch.cat([IDS[:, :24], IDS[:, 9:33]])
    found, logits = returning.bits(model, ids, first, method, **arguments)
    assert found.shape == (2, 24 - first) and found.dtype == logits.dtype == torch.float64
    for row, text in enumerate(ids):
        with kvlib.method(method, **arguments)(model) as run:
            every = [model(text[None, :1], use_cache=True)]
            every += [model(text[None, t : t + 1], past_key_values=run.cache) for t in range(1, 23)]
        every = torch.cat([step.logits[0] for step in every]).double()
        torch.testing.assert_close(logits[row], every[first - 1])
        expected = [-(line.exp() / line.exp().sum())[token].log2().item() for line, token in zip(every, text[1:])]
        assert found[row].tolist() == pytest.approx(expected[first - 1 :], rel=1e-5)
        at_once = torch.allclose(every, model(text[None, :-1]).logits[0].double(), rtol=1e-4, atol=1e-5)
        assert at_once == (method == "full")


def test_overlaps_by_loops():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(3, 3, 9, generator=generator) < 0.5
    sets = [[{*mask.nonzero().flatten().tolist()} for mask in layer] for layer in chosen]
    same, other = selections.overlaps(chosen)
    for i in range(3):
        for j in range(3):
            shares = {(g, h): len(sets[j][h] & sets[i][g]) / len(sets[j][h]) for g in range(3) for h in range(3)}
            assert same[i, j].item() == pytest.approx(sum(shares[h, h] for h in range(3)) / 3)
            assert other[i, j].item() == pytest.approx(sum(x for (g, h), x in shares.items() if g != h) / 6)
    assert not torch.equal(same, same.T)  # whose share it is


def test_similarity_by_loops():
    attention = torch.rand(4, 2, 6, generator=torch.Generator().manual_seed(0)).double()
    found = selections.similarity(attention)
    assert found.shape == (3, 2)
    for layer in range(3):
        for head in range(2):
            one, other = attention[layer, head].tolist(), attention[layer + 1, head].tolist()
            product = sum(a * b for a, b in zip(one, other))
            assert found[layer, head].item() == pytest.approx(product / (math.hypot(*one) * math.hypot(*other)))


@ARCHITECTURES
@pytest.mark.parametrize("heads", ["query", "group"])
def test_a_recorded_step_by_loops(architecture, heads):
    """Output of every layer from its own query and the rows that it may read; the bytes of these rows."""
    model, k = random_model(architecture), 6
    method = kvlib.method("tidaldecode", budget=k, selection_layers=[1, 3], heads=heads)
    layers, read = selections.recorded(model, kvlib.snapshot(model, PROMPT), LAST[0], method)
    rows = 0
    for number, layer in enumerate(layers):
        key, value = (x.tolist() for x in (layer["key"], layer["value"]))
        group = len(layer["query"]) // len(key)
        logits = [
            [layer["scaling"] * sum(q * k for q, k in zip(query, row)) for row in key[head // group]]
            for head, query in enumerate(layer["query"].tolist())
        ]
        if number in (1, 3):
            sets = oracle_choice(torch.tensor(logits).unflatten(0, (-1, group)), k, heads, 0, 0.0)
        everything = [range(len(key[0]))] * len(logits)
        seen = sets if number in (2, 4) else everything
        for head, (row, at) in enumerate(zip(logits, seen)):
            weights = {j: math.exp(row[j] - max(row)) for j in at}
            for channel, found in enumerate(layer["output"][head].tolist()):
                expected = sum(w * value[head // group][j][channel] for j, w in weights.items()) / sum(weights.values())
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        owners = len(logits) if number in (2, 4) and heads == "query" else len(key)
        rows += owners * len(seen[0])
    assert len(layers) == 5 and read == rows * 2 * len(key[0][0]) * 8  # keys and values in float64


def step_by_step(model, method, ids: list[int], question: list[int], tokens: int) -> list[int]:
    """Greedy, by the model's own calls."""
    with torch.no_grad(), method(model) as run:
        model(torch.tensor([ids]))
        written = []
        for token in question:
            logits = model(torch.tensor([[token]]), past_key_values=run.cache).logits
        for _ in range(tokens):
            written.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([[written[-1]]]), past_key_values=run.cache).logits
        return written


def test_answers_are_read_token_by_token(tokenizer):
    model = random_model("llama-gqa")
    prompt = tasks.sample("transform", 160, 0, tokenizer=tokenizer)
    context, question, lead = prompt.ids(tokenizer)
    methods = {
        "full": kvlib.method("full"),
        "tidaldecode": kvlib.method("tidaldecode", budget=4, selection_layers=[1]),
    }
    found = selections.answers(model, tokenizer, kvlib.snapshot(model, torch.tensor([context])), prompt, methods)
    tokens = len(prompt.answer_ids(tokenizer))
    for row, method in zip(found.itertuples(), methods.values(), strict=True):
        written = step_by_step(model, method, context, question + lead, tokens)
        assert row.answer == tokenizer.decode(written, skip_special_tokens=True) and not row.found
    assert found.index.tolist() == ["full cache", "TidalDecode"]
    seen = len(context + question + lead) + tokens
    rows = [2 * 2 * seen + 3 * 4 * 4, 5 * 2 * seen]  # two dense layers of two KV heads, three sparse ones of four heads
    assert found["read, %"].tolist() == [100, pytest.approx(100 * rows[0] / rows[1], abs=0.05)]
    assert found["answer"].nunique() == 2


def test_a_right_answer_is_found(tokenizer):
    model = random_model("llama-gqa")
    prompt = tasks.sample("transform", 160, 0, tokenizer=tokenizer)
    ids = prompt.ids(tokenizer)
    snapshot = kvlib.snapshot(model, torch.tensor([ids[0]]))
    written = step_by_step(model, kvlib.method("full"), ids[0], ids[1] + ids[2], len(prompt.answer_ids(tokenizer)))
    answer = tokenizer.decode(written, skip_special_tokens=True)
    right = SimpleNamespace(ids=prompt.ids, answer_ids=prompt.answer_ids, answer=answer)
    found = selections.answers(model, tokenizer, snapshot, right, {"full": kvlib.method("full")})
    assert found["found"].tolist() == [True]


def test_recall_by_the_second_selection_layer():
    given = [{"selection_layers": [2, 9]}, {"selection_layers": [2, 4]}, {"selection_layers": [2, 4]}]
    others = [{"selection_layers": [2]}, {"selection_layers": [2, 4], "heads": "all"}, {"selection_layers": [2, 4, 9]}]
    arguments = [json.dumps(each) for each in [*given, *others, given[0]]]
    methods = ["tidaldecode"] * 6 + ["another"]
    rows = {"method": methods, "arguments": arguments, "value": range(7), "agreement": range(10, 80, 10)}
    found = selections.by_second_layer(pd.DataFrame(rows))
    assert found.index.tolist() == [4, 9] and list(found) == ["recall", "mass"]
    assert found.to_numpy().tolist() == [[1.5, 25], [0, 10]]


@pytest.mark.parametrize("way", ["accuracy", "mass"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_sweep_is_what_the_file_says(way, elsewhere):
    recorded = json.loads((paths.DATA / "calibration" / "smollm2" / "tidaldecode.json").read_text())["choices"]
    found = selections.sweep("smollm2", way, elsewhere)
    assert list(found) == ["query", "group", "all"] and found.index.tolist() == [*range(3, 30)]
    for heads in found:
        scores = recorded[heads][way]["scores"]
        assert [scores[f"2 {layer}"][elsewhere] for layer in range(3, 30)] == found[heads].tolist()


def test_what_was_not_calibrated(tmp_path):
    with pytest.raises(ValueError, match=r"no tidaldecode\.json for"):
        selections.sweep(str(tmp_path), "mass")
    (tmp_path / "tidaldecode.json").write_text(
        '{"choices": {"query": {"mass": {"scores": {"2": [1, 1], "2 3": [0, 1]}}}}}'
    )
    pd.testing.assert_series_equal(
        selections.sweep(str(tmp_path), "mass")["query"],
        pd.Series([0], index=pd.Index([3], name="second selection layer"), name="query"),
    )
    with pytest.raises(ValueError, match="was not calibrated by accuracy"):
        selections.sweep(str(tmp_path), "accuracy")
