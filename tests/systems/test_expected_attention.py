"""Expected Attention against its formula, one query and one key at a time."""

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.core.rotary import rotaries, rotation
from kvlib.methods.systems.expected_attention import ExpectedAttention, mean_rotation


def turned(x: list[float], angle: float, frequencies: list[float]) -> list[float]:
    """A vector turned by `angle` positions: channels i and i + d / 2 are a pair."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for i, frequency in enumerate(frequencies):
        c, s = math.cos(angle * frequency), math.sin(angle * frequency)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def expected(queries, positions, end, frequencies, sinks, future):
    """Mean and covariance of one head's rotated queries, before rotation, at the next positions."""
    d = len(queries[0])
    plain = [turned(q, -at, frequencies) for q, at in zip(queries, positions) if at >= sinks]
    if not plain:
        return torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    mean = [sum(q[i] for q in plain) / len(plain) for i in range(d)]
    spread = [
        [sum((q[i] - mean[i]) * (q[j] - mean[j]) for q in plain) / len(plain) for j in range(d)] for i in range(d)
    ]
    units = [[float(i == j) for j in range(d)] for i in range(d)]
    turns = [[turned(unit, at, frequencies) for unit in units] for at in range(end, end + future)]
    mean, spread, turn = (torch.tensor(x, dtype=torch.float64) for x in (mean, spread, turns))
    turn = turn.mean(0)  # row i is what becomes of unit i
    return mean @ turn, turn.T @ spread @ turn


def scores(mean, spread, keys, values, protected):
    """`mean`, `spread` of each head of a group; of every key its score, without the first `protected`."""
    d = keys.shape[-1]
    total = [0.0] * len(keys)
    for mu, cov in zip(mean, spread):
        logits = [float(k @ mu / d**0.5 + k @ cov @ k / (2 * d)) for k in keys[protected:]]
        weights = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        for i, weight in enumerate(weights):
            total[protected + i] += weight / len(mean)
    return [score * float(v.norm()) for score, v in zip(total, values)]


class Watched(ExpectedAttention):
    """Notes queries, keys and values of each pass."""

    def attend(self, view):
        SEEN.append((view.query.clone(), view.query_positions, view.key.clone(), view.value.clone()))
        return super().attend(view)


SEEN: list = []


@settings(max_examples=12, deadline=None)
@example("llama-gqa", [22, 15], 5, 3, 9, 0)
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.lists(st.integers(1, 22), min_size=1, max_size=2),
    st.integers(0, 5),
    st.sampled_from([1, 3, 40]),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_keeps_what_the_formula_says(name, sizes, sinks, future, budget, seed):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows, 1)
    frequencies = model.model.rotary_emb.inv_freq.tolist()
    SEEN.clear()
    with Watched(budget, future, sinks)(model) as run:
        model(ids, attention_mask=mask)
        assert not any(layer.rows for layer in run.cache.layers)
    kept = tiny.kept(run)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, (query, at, key, value) in enumerate(SEEN):
        for row, text in enumerate(rows):
            n, protected = len(text), min(sinks, budget - 1)
            for kv in range(key.shape[1]):
                heads = range(kv * groups, (kv + 1) * groups)
                real = [(q, int(t)) for q, t in enumerate(at[row]) if t >= 0]
                mean, spread = zip(
                    *(
                        expected(
                            [query[row, h, q].tolist() for q, _ in real],
                            [t for _, t in real],
                            n,
                            frequencies,
                            sinks,
                            future,
                        )
                        for h in heads
                    )
                )
                score = scores(mean, spread, key[row, kv, :n], value[row, kv, :n], min(protected, n))
                others = sorted(range(min(protected, n), n), key=lambda i: (-score[i], i))
                stays = [*range(min(protected, n)), *others[: budget - protected]]
                assert kept[row][layer][kv] == sorted(stays)


def test_a_second_turn_is_judged_by_its_own_queries():
    model, frequencies = tiny.model("llama-mha"), tiny.model("llama-mha").model.rotary_emb.inv_freq.tolist()
    SEEN.clear()
    with Watched(9, 5, 2)(model) as run:
        for i, length in enumerate((20, 1, 6)):
            model(tiny.tokens(1, length, seed=i), past_key_values=run.cache if i else None)
            if i == 1:
                before = tiny.kept(run)[0]
    for layer, (query, at, key, value) in enumerate(SEEN[-2:]):
        for head in range(4):
            tokens = before[layer][head] + [*range(21, 27)]
            mean, spread = expected(query[0, head].tolist(), at[0].tolist(), 27, frequencies, 2, 5)
            score = scores([mean], [spread], key[0, head], value[0, head], 2)
            best = sorted(range(2, len(tokens)), key=lambda i: (-score[i], i))[:7]
            assert tiny.kept(run)[0][layer][head] == tokens[:2] + sorted(tokens[i] for i in best)


@pytest.mark.parametrize("name, value", [("future", 0), ("future", 2.0), ("sinks", -1), ("sinks", True)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: a number of (positions >= 1|tokens >= 0)"):
        kvlib.method("expected_attention", **{name: value})


def test_the_mean_of_rotations_is_that_of_all_of_them():
    rotary = rotaries(tiny.model("llama-gqa"))[0]
    offset = torch.tensor([[3, 4, 5, 6], [100, 101, 102, 103]])
    expected = rotation(offset, rotary, 8).double().mean(1)
    torch.testing.assert_close(mean_rotation(offset, rotary, 8), expected, rtol=0, atol=1e-6)
