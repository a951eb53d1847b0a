"""DefensiveKV against its formula, one head, one query and one key at a time."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corm import weights_of
from test_critical_kv import norms_of, stored_values

import kvlib


def by_hand(weights, norms, budget, window, kernel):
    """What each KV head keeps of a prompt, from attention `(query_heads, tokens, tokens)` and norms `[head][token]`."""
    heads, n, _ = weights.shape
    kv_heads, before, reach = len(norms), n - window, kernel // 2
    groups, lasts = heads // kv_heads, range(n - window, n)
    in_window = sum(float(weights[h, t, k]) for h in range(heads) for t in lasts for k in lasts) / heads / window
    certain, score = [], {}
    for kv in range(kv_heads):
        group = range(kv * groups, (kv + 1) * groups)
        mean = [sum(float(weights[h, t, k]) for h in group for t in lasts) for k in range(before)]
        order, carried, sure = sorted(range(before), key=lambda k: (-mean[k], k)), 0.0, []
        for k in order[: budget - window]:
            carried += mean[k] / sum(mean)
            if carried >= 0.9 - in_window:
                break
            sure.append(k)
        certain.append(sure)
        worst = [0.0] * before
        for h in group:
            for t in lasts:
                row = [float(x) for x in weights[h, t, :before]]
                pooled = [sum(row[max(0, k - reach) : k + reach + 1]) / kernel for k in range(before)]
                for k in range(before):
                    worst[k] = max(worst[k], pooled[k] * sum(row) / sum(pooled))
        low = sum(worst) / before
        for k in range(before):
            share = norms[kv][k] / sum(norms[other][k] for other in range(kv_heads))
            if k not in sure:
                score[k, kv] = max(worst[k], low) * share
    total = kv_heads * (budget - window) - sum(map(len, certain))
    best = sorted(score, key=lambda at: (-score[at], at))[:total]
    return [sorted([*sure, *(k for k, h in best if h == kv), *lasts]) for kv, sure in enumerate(certain)]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.lists(st.integers(2, 32), min_size=1, max_size=2),
    st.integers(2, 24),
    st.integers(1, 8),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 999),
)
def test_keeps_what_the_formula_says(name, sizes, budget, window, kernel, seed):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows, 1)
    values = stored_values(model, ids, mask)
    with kvlib.method("defensive_kv", budget=budget, window=window, kernel=kernel)(model) as run:
        model(ids, attention_mask=mask)
    kept = tiny.kept(run)
    stored = sum(min(budget, len(text)) for text in rows) * 2 * model.config.num_key_value_heads
    assert run.stored_bytes() == run.allocated_bytes() == stored * 2 * 8 * model.config.head_dim
    for row, text in enumerate(rows):
        n = len(text)
        for layer, weights in enumerate(weights_of(model, text)):
            norms = norms_of(model, layer, values[layer][row, :, :n])
            every = [[*range(n)]] * model.config.num_key_value_heads
            expected = by_hand(weights, norms, budget, min(window, budget // 2), kernel) if n > budget else every
            assert kept[row][layer] == expected


def test_heads_keep_different_numbers():
    model = tiny.model("llama-mha")
    with kvlib.method("defensive_kv", budget=0.4, window=4)(model) as run:
        model(tiny.tokens(1, 40))
    assert len({len(head) for layer in tiny.kept(run)[0] for head in layer}) > 2


def test_norms_of_decoded_tokens_are_known_in_the_next_turn():
    model, found = tiny.model("llama-gqa"), []

    class Watched(kvlib.METHODS["defensive_kv"]):
        def choose(self, view):
            norms = norms_of(model, view.layer_idx, view.value[0])
            for kv in range(2):
                found.append((view.positions[0, kv].tolist(), norms[kv], view.state["norm"][0, kv].tolist()))
            return super().choose(view)

    with Watched(12, 4)(model) as run:
        for i, length in enumerate((20, 1, 1, 6)):
            model(tiny.tokens(1, length, seed=i), past_key_values=run.cache if i else None)
    (positions, mine, shares), (others, theirs, _) = found[-4:-2]
    for token in (20, 21, 22, 27):
        here, there = mine[positions.index(token)], theirs[others.index(token)]
        assert shares[positions.index(token)] == pytest.approx(here / (here + there), rel=1e-9)


@pytest.mark.parametrize("name, value", [("window", 0), ("window", 2.0), ("kernel", 4), ("kernel", 0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: (a number of queries >= 1|an odd number of tokens)"):
        kvlib.method("defensive_kv", **{name: value})
