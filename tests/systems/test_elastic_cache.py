"""Elastic Cache against its rules, written out token by token: what stays, what it becomes, and what goes later."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.elastic_cache import nearest

ROWS = [tiny.tokens(30), tiny.tokens(21, seed=1)]


def by_hand(layer, budget, sinks) -> tuple[list, dict]:
    """Positions that stay, and which positions each of them is the mean of."""
    query, key, _, scaling = layer
    heads, tokens = query.shape[1], query.shape[2]
    sums = [0.0] * tokens
    for head in range(heads):
        for i in range(tokens):
            seen = key[0, head * key.shape[1] // heads, : i + 1]
            for j, weight in enumerate((seen @ query[0, head, i] * scaling).softmax(0).tolist()):
                sums[j] += weight
    sinks = min(sinks, budget - 1)
    middle = sorted(range(sinks, tokens - 1), key=lambda j: (-sums[j], j))[: budget - sinks - 1]
    stays = sorted([*range(sinks), *middle, tokens - 1])
    members = {j: [j] for j in stays}
    for j in set(range(tokens)) - set(stays):
        members[min(middle or stays, key=lambda to: (abs(to - j), to))].append(j)
    return stays, members


def fields(layer, row):
    """Keys and values of a row in text order."""
    layer.tail.restore_order()
    return [layer.tail.rectangle(layer.tail.fields[name])[row] for name in ("key", "value")]


@settings(max_examples=10)
@given(st.integers(1, 25), st.integers(0, 6), st.integers(1, 9))
def test_tokens_are_merged_into_the_nearest_and_one_goes_for_each_that_comes(budget, sinks, recent):
    model = tiny.model("llama-gqa")
    ids, mask = tiny.pad(ROWS)
    with kvlib.method("elastic_cache", budget=budget, sinks=sinks, recent=recent)(model) as run:
        logits = model(ids, attention_mask=mask).logits[:, -1]
        stored = []
        for row, text in enumerate(ROWS):
            stored.append([])
            for index, layer in enumerate(kvlib.snapshot(model, text[None]).layers):
                stays, members = by_hand(layer, min(budget, len(text)), sinks)
                stored[-1].append(stays)
                for have, x in zip(fields(run.cache.layers[index], row), layer[1:3]):
                    means = torch.stack([x[0, :, members[j]].mean(1) for j in stays], dim=1)
                    torch.testing.assert_close(have[:, : len(stays)], means, rtol=1e-12, atol=1e-12)
        assert tiny.kept(run) == [[[stays] * 2 for stays in layers] for layers in stored]
        goes = budget - min(recent, budget - min(sinks, budget - 1))
        for step in range(9):
            logits = model(logits.argmax(-1)[:, None], past_key_values=run.cache).logits[:, -1]
            for text, layers in zip(ROWS, stored):
                for stays in layers:
                    stays.append(len(text) + step)
                    if len(stays) > budget:
                        del stays[goes]
            assert tiny.kept(run) == [[[stays] * 2 for stays in layers] for layers in stored]


def test_what_a_question_brings_drives_out_as_many():
    model = tiny.model("llama-gqa")
    with kvlib.method("elastic_cache", budget=12, sinks=2, recent=5)(model) as run:
        run.read(input_ids=ROWS[0][None])
        before = tiny.kept(run)[0]
        run.ask(tiny.tokens(1, 8, seed=4), max_new_tokens=1, do_sample=False)
    for layer, kept in zip(before, tiny.kept(run)[0]):
        for stays, now in zip(layer, kept):
            text = list(stays)
            for j in range(30, 38):
                text.append(j)
                del text[12 - 5]
            assert now == text


def test_decoded_tokens_do_not_look():
    # Scores of a later turn are attention from prompts alone.
    model = tiny.model("llama-gqa")
    with kvlib.method("elastic_cache", budget=12, sinks=2, recent=5)(model) as run:
        logits = model(ROWS[0][None]).logits[:, -1]
        before = [tiny.remembered(layer, "attention").clone() for layer in run.cache.layers]
        tiny.decode(model, run, logits, new=4)  # three of them are read
        for layer, sums in zip(run.cache.layers, before):
            after = tiny.remembered(layer, "attention")
            assert torch.equal(after[..., :7], sums[..., :7]) and (after[..., :7] > 0).all()
            assert torch.equal(after[..., 7:9], sums[..., -2:]) and (after[..., 9:] == 0).all()


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.integers(0, 3))
def test_the_earlier_of_two_neighbours_is_the_nearest(chosen, empty):
    places = [2 * j + (j > 3) for j in range(len(chosen))]
    at = torch.tensor([[places + [-1] * empty]])
    found = nearest(at, torch.tensor([[chosen + [False] * empty]]))[0, 0].tolist()
    there = [j for j, yes in enumerate(chosen) if yes]
    for j, slot in enumerate(found[: len(chosen)]):
        assert slot == min(there, key=lambda to: (abs(places[to] - places[j]), to))


def test_bytes_stay_at_the_budget_and_half_precision_is_averaged_exactly():
    model = tiny.model("llama-gqa", torch.float16)
    with kvlib.method("elastic_cache", budget=10, sinks=2, recent=3)(model) as run:
        logits = model(ROWS[0][None]).logits[:, -1]
        exact = kvlib.snapshot(model, ROWS[0][None]).layers[0]
        stays, members = by_hand(tuple(x.double() if torch.is_tensor(x) else x for x in exact), 10, 2)
        assert tiny.kept(run)[0][0][0] == stays
        for have, x in zip(fields(run.cache.layers[0], 0), exact[1:3]):
            means = torch.stack([x[0, :, members[j]].float().mean(1).half() for j in stays], dim=1)
            torch.testing.assert_close(have, means, rtol=1e-3, atol=1e-4)
        assert run.stored_bytes() == run.allocated_bytes() == 10 * 4 * 2 * 8 * 2
        tiny.decode(model, run, logits, new=4)
        assert run.stored_bytes() == 10 * 4 * 2 * 8 * 2


def test_what_a_prompt_forces_is_told():
    model = tiny.model("llama-gqa")
    with kvlib.method("elastic_cache", budget=3, sinks=9, recent=25)(model) as run:
        tiny.decode(model, run, model(ROWS[0][None]).logits[:, -1], new=2)
        assert {name: x.tolist() for name, x in run.clamped.items()} == {"sinks": [2], "recent": [1]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sinks": -1}, r"sinks=-1: a number of tokens >= 0"),
        ({"recent": 0}, r"recent=0: a number of tokens >= 1"),
        ({"recent": 2.5}, r"recent=2\.5: a number of tokens >= 1"),
    ],
)
def test_settings_that_can_never_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("elastic_cache", budget=0.5, **arguments)
