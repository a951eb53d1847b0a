"""ZipVL's rule against its formula, one query and one key at a time."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corm import weights_of

import kvlib


def by_hand(weights: torch.Tensor, first: int, tau: float, keys: list[int]) -> list[int]:
    """The tokens that stay, from attention `(query_heads, queries, keys)`; queries stand at `first` and on."""
    heads, queries, _ = weights.shape
    received = {
        key: sum(float(weights[h, q, i]) for h in range(heads) for q in range(queries)) / heads
        for i, key in enumerate(keys)
    }
    count, mass = 0, 0.0
    for most in sorted(received.values(), reverse=True):
        count, mass = count + 1, mass + most
        if mass >= tau * queries:
            break
    seen_by = {key: sum(first + q >= key for q in range(queries)) for key in keys}
    return sorted(sorted(keys, key=lambda key: (-received[key] / seen_by[key], key))[:count])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama-mha", "llama-gqa", "mistral"]),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.floats(0.05, 0.99),
    st.integers(0, 999),
    st.none() | st.integers(1, 9),
)
def test_keeps_of_a_prompt_what_the_formula_says(name, sizes, tau, seed, chunk):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows)
    with kvlib.method("zipvl", tau=tau)(model) as run:
        run.read(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk)
        assert not any(layer.tail.state for layer in run.cache.layers)
    kept = tiny.kept(run)
    for row, text in enumerate(rows):
        for layer, weights in enumerate(weights_of(model, text)):
            expected = by_hand(weights, 0, tau, [*range(len(text))])
            assert kept[row][layer] == [expected] * model.config.num_key_value_heads


class Watched(kvlib.METHODS["zipvl"]):
    """Notes the attention of every pass."""

    def attend(self, view):
        key = view.key.repeat_interleave(view.groups, 1)
        hidden = view.positions[:, :1, None] > view.query_positions[:, None, :, None]
        logits = (view.query @ key.mT * view.scaling).masked_fill(hidden, -torch.inf)
        PASSES.append((view.positions[0, 0].tolist(), logits.softmax(-1)[0]))
        return super().attend(view)


PASSES: list = []


def test_a_second_turn_is_judged_by_its_own_queries():
    model, kept = tiny.model("llama-gqa"), []
    PASSES.clear()
    with Watched(tau=0.7)(model) as run:
        for i, length in enumerate((24, 1, 1, 8)):
            model(tiny.tokens(1, length, seed=i), past_key_values=run.cache if i else None)
            kept.append(tiny.kept(run)[0])
    for layer, (positions, weights) in enumerate(PASSES[-2:]):
        assert len(positions) < 34
        assert kept[-1][layer] == [by_hand(weights, 26, 0.7, positions)] * 2
        assert [at for at in positions if at < 26] == kept[2][layer][0]
        assert kept[2][layer][0] == kept[0][layer][0] + [24, 25]


def test_what_goes_is_freed_and_layers_differ():
    model = tiny.model("llama-gqa")
    with kvlib.method("zipvl", tau=0.9)(model) as run:
        model(tiny.tokens(1, 40))
    sizes = [len(layer[0]) for layer in tiny.kept(run)[0]]
    assert len(set(sizes)) == 2
    assert run.stored_bytes() == run.allocated_bytes() == sum(sizes) * 2 * 2 * 8 * model.config.head_dim


def test_a_tau_of_one_keeps_everything():
    model = tiny.model("llama-gqa")
    with kvlib.method("zipvl", tau=1.0)(model) as run:
        model(tiny.tokens(1, 30))
        assert run.stored_bytes() == run.full_bytes() and not run.method.evicts


@pytest.mark.parametrize("tau", [0, 1.5, "0.9", None])
def test_impossible_settings_are_named(tau):
    with pytest.raises(ValueError, match=r"tau=.*: a part of all attention, in \(0, 1\]"):
        kvlib.method("zipvl", tau=tau)
