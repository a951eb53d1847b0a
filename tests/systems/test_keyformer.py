"""Keyformer against its formula, one query, one head and one key at a time."""

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.keyformer import Keyformer

WORD = 2**64 - 1
TEXTS: list[list] = []


def mixed(x):
    """splitmix64's finaliser."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def gumbel(seed, layer, head, query, key):
    place = mixed(query + (head << 26) + (layer << 35) + (seed << 44) & WORD)
    return -math.log(-math.log(((mixed(place + key & WORD) >> 12) + 0.5) / 2**52))


class Watched(Keyformer):
    """Notes the logits of every pass: (layer, query positions, positions of the keys, logits)."""

    def attend(self, view):
        key = view.key.repeat_interleave(view.groups, 1)
        logits = view.query @ key.mT * view.scaling
        TEXTS.append((view.layer_idx, view.query_positions.tolist(), view.positions.tolist(), logits.tolist()))
        return super().attend(view)


@settings(max_examples=6, deadline=None)
@example("llama-gqa", 0.0, (0.2, 5.0), 3, 5)
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([(1.0, 0.01), (0.5, 2.0)]),
    st.integers(0, 99),
    st.floats(0.2, 0.9) | st.integers(1, 12),
)
def test_equals_the_formula(name, recent, temperatures, seed, budget):
    model, rows = tiny.model(name), [tiny.tokens(13, seed=seed), tiny.tokens(9, seed=seed + 1)]
    first, growth = temperatures
    ids, mask = tiny.pad(rows, 1)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    TEXTS.clear()
    kept = []
    with Watched(budget, recent, first, growth, seed)(model) as run:
        for step in range(5):
            new = tiny.tokens(2, 1, seed=step)
            model(*((new,) if step else (ids, mask)), past_key_values=run.cache if step else None)
            kept.append(tiny.kept(run))
    for layer in range(2):
        for row, text in enumerate(rows):
            size = max(1, int(budget * len(text))) if isinstance(budget, float) else budget
            for kv in range(kv_heads):
                score = {}
                for step, (_, queries, keys, logits) in enumerate(x for x in TEXTS if x[0] == layer):
                    tau = first + growth * step
                    for i, query in enumerate(queries[row]):
                        if query < 0:
                            continue
                        for head in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
                            noisy = {
                                key: (logits[row][head][i][slot] + gumbel(seed, layer, head, query, key)) / tau
                                for slot, key in enumerate(keys[row][kv])
                                if 0 <= key <= query
                            }
                            most = max(noisy.values())
                            mass = sum(math.exp(x - most) for x in noisy.values())
                            for key, x in noisy.items():
                                score[key] = score.get(key, 0) + math.exp(x - most) / mass
                    end = max(score) + 1
                    newest = [key for key in score if key >= end - int(recent * size)]
                    others = sorted((key for key in score if key not in newest), key=lambda key: (-score[key], key))
                    stays = newest + others[: max(0, size - len(newest))]
                    score = {key: score[key] for key in stays}
                    assert kept[step][row][layer][kv] == sorted(stays)


def test_the_noise_is_gumbels_and_differs_everywhere():
    model, noise = tiny.model("llama-gqa"), []

    class Noisy(Keyformer):
        def observe(self, view):
            at = torch.arange(60).expand(1, -1)
            noise.append(self.noise(view, at, at[:, None].expand(1, 2, -1)))

        def compress(self, view):
            pass

    with Noisy(0.5)(model):
        model(tiny.tokens(1, 60))
    both = torch.stack(noise).flatten()
    assert both.unique().numel() == both.numel() == 2 * 4 * 60 * 60
    assert abs(float(both.mean()) - 0.5772) < 0.03 and abs(float(both.var()) - math.pi**2 / 6) < 0.06


def test_sums_of_half_precision_are_in_float32():
    with kvlib.method("keyformer", budget=0.4)(tiny.model("llama-gqa", torch.bfloat16)) as run:
        run.model(tiny.tokens(1, 40))
    assert all(layer.tail.state["attention"].dtype == torch.float32 for layer in run.cache.layers)


def test_another_seed_keeps_others():
    model, sets = tiny.model("llama-gqa"), []
    for seed in (0, 1):
        with kvlib.method("keyformer", budget=0.4, seed=seed)(model) as run:
            model(tiny.tokens(1, 40))
        sets.append(tiny.kept(run))
    assert sets[0] != sets[1]


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("recent", 1.5, r"a share of the budget, in \[0, 1\]"),
        ("recent", "0.3", "a share"),
        ("temperature", 0, "a number > 0"),
        ("growth", -0.1, "a number >= 0"),
        ("seed", 2**19, r"a whole number in \[0, 2\*\*19\)"),
    ],
)
def test_impossible_settings_are_named(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name}={value}|{name}='{value}': {allowed}"):
        kvlib.method("keyformer", **{name: value})
