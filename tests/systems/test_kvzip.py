"""KVzip against its formula: the text and its repetition read by the stock model, and attention by hand."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib

ROWS = [tiny.tokens(26), tiny.tokens(17, seed=1)]
MODEL = "llama-gqa"


def by_hand(text: list[int], chunk: int, sinks: int, prompt_ids: tuple) -> torch.Tensor:
    """Scores `(layers, heads, tokens)`."""
    model, length = tiny.model(MODEL), len(text)
    heads, group = model.config.num_key_value_heads, 2
    score = torch.zeros(model.config.num_hidden_layers, heads, length, dtype=torch.float64)
    for start in range(0, length, chunk):
        part = text[start : start + chunk]
        postfix = text[start - chunk : start][-8:] if start else []
        ids = [*text, *prompt_ids, *postfix, *part]
        for layer, (query, key, _, scaling) in enumerate(kvlib.snapshot(model, torch.tensor([ids])).layers):
            for i in range(length, len(ids)):
                read = [*range(min(sinks, start)), *range(start, start + len(part)), *range(length, i + 1)]
                for head in range(heads * group):
                    weights = (key[0, head // group, read] @ query[0, head, i] * scaling).softmax(0)
                    for j, weight in zip(read, weights.tolist()):
                        if start <= j < start + len(part):
                            score[layer, head // group, j] = max(score[layer, head // group, j], weight)
    return score


def best(score: torch.Tensor, count: int, sinks: int) -> list:
    """`[layer][head]` -> positions of the `count` highest scores of all."""
    layers, heads, tokens = score.shape
    places = [(i, head, j) for i in range(layers) for head in range(heads) for j in range(tokens)]
    order = sorted(places, key=lambda at: (at[2] >= sinks, -score[at], at[2], at[0], at[1]))[:count]
    return [[sorted(j for i, h, j in order if (i, h) == (a, b)) for b in range(heads)] for a in range(layers)]


@settings(max_examples=14)
@given(
    st.integers(2, 14),
    st.sampled_from([2, 3, 7, 10, 17, 30]),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([(), (7,), (3, 9, 4)]),
)
def test_what_the_repetition_looks_at_stays(budget, chunk, sinks, layerwise, prompt_ids):
    model = tiny.model(MODEL)
    method = kvlib.method("kvzip", budget=budget, chunk=chunk, sinks=sinks, layerwise=layerwise, prompt_ids=prompt_ids)
    ids, mask = tiny.pad(ROWS)
    with method(model) as run:
        model(ids, attention_mask=mask)
    for row, kept in zip(ROWS, tiny.kept(run)):
        score = by_hand(row.tolist(), chunk, sinks, prompt_ids)
        first = min(sinks, budget)
        if layerwise:
            assert kept == [best(one[None], 2 * budget, first)[0] for one in score]
        else:
            assert kept == best(score, 4 * budget, first)


@pytest.mark.parametrize("chunk, sinks", [(7, 3), (2, 5)])
def test_a_chunk_is_scored_when_its_text_is_repeated_and_by_no_other(chunk, sinks):
    model = tiny.model(MODEL)
    with kvlib.method("kvzip", budget=20, chunk=chunk, sinks=sinks)(model) as run:
        model(ROWS[0][None])
    score = by_hand(ROWS[0].tolist(), chunk, sinks, ())
    for layer, kept in zip(range(2), tiny.kept(run)[0]):
        found = tiny.remembered(run.cache.layers[layer], "most")
        for head, places in enumerate(kept):
            torch.testing.assert_close(found[0, head, : len(places)], score[layer, head, places])


@pytest.mark.parametrize("layerwise", [False, True])
def test_bytes_are_freed(layerwise):
    model = tiny.model(MODEL)
    with kvlib.method("kvzip", budget=0.5, chunk=8, layerwise=layerwise)(model) as run:
        logits = model(*tiny.pad(ROWS)).logits
        lengths = torch.stack([layer.lengths for layer in run.cache.layers])
        assert run.stored_bytes() == run.allocated_bytes() == 4 * (13 + 8) * 2 * 8 * 8
        assert run.cache.get_seq_length() == 26 and run.full_bytes() == 4 * 43 * 2 * 8 * 8
    each = lengths.sum(2)
    assert each.sum(0).tolist() == [4 * 13, 4 * 8]
    assert bool((each[0] == each[1]).all()) is layerwise
    with kvlib.method("full")(model):
        ids, mask = tiny.pad(ROWS)
        assert torch.equal(logits, model(ids, attention_mask=mask).logits)


def test_what_a_prompt_forces_is_told():
    model = tiny.model(MODEL)
    with kvlib.method("kvzip", budget=3, sinks=9)(model) as run:
        model(ROWS[0][None])
    assert {name: x.tolist() for name, x in run.clamped.items()} == {"sinks": [3]}
    assert tiny.kept(run)[0] == [[[0, 1, 2]] * 2] * 2


def test_embeddings_cannot_be_repeated():
    model, ids = tiny.model(MODEL), tiny.tokens(1, 12)
    with kvlib.method("kvzip", budget=5)(model), pytest.raises(ValueError, match="embeddings were passed"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"chunk": 0}, r"chunk=0: a number of tokens >= 1"),
        ({"sinks": -1}, r"sinks=-1: a number of tokens >= 0"),
        ({"layerwise": 1}, r"layerwise=1: True or False"),
        ({"prompt_ids": [-1]}, r"prompt_ids=\(-1,\): a tuple of token ids"),
        ({"prompt_ids": (1, -1)}, r"prompt_ids=\(1, -1\): a tuple of token ids"),
        ({"prompt_ids": "ab"}, r"prompt_ids='ab': a tuple of token ids"),
    ],
)
def test_settings_that_can_never_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("kvzip", budget=0.5, **arguments)
