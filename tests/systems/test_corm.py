"""CORM against its definitions, one query and one key at a time."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import eager

import kvlib


def weights_of(model, ids):
    """Attention `(layers, query_heads, tokens, tokens)` of an uncompressed pass."""
    with eager(model), torch.no_grad():
        return torch.stack([x[0] for x in model(ids[None], output_attentions=True, use_cache=False).attentions])


def by_hand(weights: torch.Tensor, kv_heads: int, window: int, recent: int) -> list[list[int]]:
    """What each KV head of a layer keeps of a prompt, from the attention `(query_heads, tokens, tokens)` in it."""
    heads, n, _ = weights.shape
    kept = []
    for kv in range(kv_heads):
        group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
        stays = []
        for key in range(n):
            askers = [t for t in range(n - window, n) if t >= key]
            all_minor = all(float(weights[h, t, key]) < 1 / (t + 1) for t in askers for h in group)
            if n - key <= recent or len(askers) < window or min(askers) < 0 or not all_minor:
                stays.append(key)
        kept.append(stays)
    return kept


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_keeps_of_a_prompt_what_the_definition_says(name, sizes, window, recent, seed):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows)
    with kvlib.method("corm", window=window, recent=recent)(model) as run:
        model(ids, attention_mask=mask)
    kept = tiny.kept(run)
    for row, text in enumerate(rows):
        for layer, weights in enumerate(weights_of(model, text)):
            assert kept[row][layer] == by_hand(weights, model.config.num_key_value_heads, window, recent)


class Watched(kvlib.METHODS["corm"]):
    """Notes what each query sees: (layer, keys' positions, queries' weights)."""

    def attend(self, view):
        key = view.key.repeat_interleave(view.groups, 1)
        at = view.positions[:, :, None]
        hidden = ((at < 0) | (at > view.query_positions[:, None, :, None])).repeat_interleave(view.groups, 1)
        logits = (view.query @ key.mT * view.scaling).masked_fill(hidden, -torch.inf)
        SEEN[view.layer_idx].append(
            (view.query_positions[0].tolist(), view.positions[0].clone(), logits.softmax(-1)[0])
        )
        return super().attend(view)


SEEN: list[list] = [[], []]


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("second, window, recent", [(3, 5, 4), (9, 5, 6), (2, 3, 1)])
def test_decoded_tokens_and_second_turns_go_on_counting(name, second, window, recent):
    model = tiny.model(name)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    lengths = [20, 1, 1, 1, 1, 1, 1, second, 1, 1, 1]
    for seen in SEEN:
        seen.clear()
    kept = []
    with Watched(window=window, recent=recent)(model) as run:
        for i, length in enumerate(lengths):
            model(tiny.tokens(1, length, seed=i), past_key_values=run.cache if i else None)
            kept.append([[[*map(int, s[s >= 0])] for s in run.kept(layer)[0]] for layer in range(2)])
    fewer = 0
    for layer in range(2):
        streak = [{} for _ in range(kv_heads)]  # of each key: minor to so many queries in a row
        for (queries, positions, weights), stored in zip(SEEN[layer], kept):
            for i, t in enumerate(queries):
                for kv in range(kv_heads):
                    for slot, key in enumerate(positions[kv].tolist()):
                        if 0 <= key <= t:
                            group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
                            most = max(float(weights[h, i, slot]) for h in group)
                            streak[kv][key] = streak[kv].get(key, 0) + 1 if most < 1 / (t + 1) else 0
            for kv in range(kv_heads):
                there, end = sorted(streak[kv]), queries[-1] + 1
                streak[kv] = {k: streak[kv][k] for k in there if streak[kv][k] < window or k >= end - recent}
                assert stored[layer][kv] == sorted(streak[kv])
                fewer += len(streak[kv]) < len(there)
    assert fewer > 8


def test_what_goes_is_freed_and_heads_differ():
    model = tiny.model("llama-gqa")
    with kvlib.method("corm", window=4, recent=4)(model) as run:
        logits = model(tiny.tokens(1, 40)).logits[:, -1]
        for _ in range(2):
            kept = sum(len(head) for layer in tiny.kept(run)[0] for head in layer)
            assert run.stored_bytes() == kept * 2 * model.config.head_dim * 8 < 0.9 * run.full_bytes()
            logits = model(logits.argmax(-1)[:, None], past_key_values=run.cache).logits[:, -1]
    assert len({len(head) for layer in tiny.kept(run)[0] for head in layer}) > 1


def test_a_question_is_judged_too_and_the_document_stays():
    model = tiny.model("llama-gqa")
    with kvlib.method("corm", window=4, recent=3)(model) as run:
        run.read(input_ids=tiny.tokens(1, 25))
        document = tiny.kept(run)
        run.ask(tiny.tokens(1, 6, seed=3), max_new_tokens=1, do_sample=False)
        after = tiny.kept(run)
        run.ask(tiny.tokens(1, 6, seed=3), max_new_tokens=1, do_sample=False)
        assert tiny.kept(run) == after
    of_document = [[[i for i in head if i < 25] for head in layer] for layer in after[0]]
    assert all(set(a) <= set(b) for x, y in zip(of_document, document[0]) for a, b in zip(x, y))
    assert of_document != document[0]


def test_padding_of_a_question_does_not_count():
    model, questions = tiny.model("llama-gqa"), [tiny.tokens(size, seed=size) for size in (2, 5, 7)]
    with kvlib.method("corm", window=8, recent=1)(model) as run:
        run.read(input_ids=tiny.tokens(1, 25))
        document = tiny.kept(run)[0]
        ids, mask = tiny.pad(questions)
        run.ask(ids, mask, max_new_tokens=7, do_sample=False)
        together = tiny.kept(run)
        for row, question in enumerate(questions):
            run.ask(question[None], max_new_tokens=7, do_sample=False)
            assert tiny.kept(run)[0] == together[row]
    assert any(not set(d) <= set(a) for x, y in zip(document, together[0]) for d, a in zip(x, y))


@pytest.mark.parametrize("arguments", [{"window": 0}, {"window": 2.0}, {"recent": 0}, {"recent": True}])
def test_impossible_settings_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.*: a number of (queries|tokens) >= 1"):
        kvlib.method("corm", **arguments)
