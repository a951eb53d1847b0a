"""CriticalKV against its two halves, one head, one query and one key at a time."""

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_corm import weights_of

import kvlib
from kvlib.methods.systems import critical_kv


def rounded(x: float) -> float:
    part, power = math.frexp(x)
    return round(part * 2**20) / 2**20 * 2**power


def norms_of(model, layer: int, value: torch.Tensor) -> list[list[float]]:
    """||W_O v||_1 of values `(kv_heads, tokens, head_dim)`, a mean over each group: `[kv_head][token]`."""
    # to 20 binary digits, which are alike for repetitions of a word
    weight, groups = model.model.layers[layer].self_attn.o_proj.weight, model.config.num_attention_heads // len(value)
    dim, found = value.shape[-1], []
    for kv, tokens in enumerate(value):
        heads = [weight[:, h * dim : (h + 1) * dim] for h in range(kv * groups, (kv + 1) * groups)]
        found.append([rounded(sum(float((part @ v).abs().sum()) for part in heads) / groups) for v in tokens])
    return found


def stored_values(model, ids, mask):
    with kvlib.method("full")(model) as run:
        model(ids, attention_mask=mask)
        return [layer.tail.rectangle(layer.tail.fields["value"]).clone() for layer in run.cache.layers]


def pooled_attention(weights: torch.Tensor, group: range, window: int) -> list[float]:
    """SnapKV's score before the window: mean over it and the group, the maximum of 7 neighbours."""
    n = weights.shape[-1]
    mean = [sum(float(weights[h, t, k]) for h in group for t in range(n - window, n)) for k in range(n - window)]
    mean = [x / len(group) / window for x in mean]
    return [max(mean[max(0, k - 3) : k + 4]) for k in range(n - window)]


@settings(max_examples=20, deadline=None)
@example("llama-gqa", [90], 80, 0, 1)  # where the first half is more than the window
@example("llama-gqa", [40], 24, 0, 73)  # where 1e-4 decides
@given(
    st.sampled_from(["llama-mha", "llama-gqa"]),
    st.lists(st.integers(2, 40), min_size=1, max_size=2),
    st.integers(1, 30) | st.floats(0.1, 0.9),
    st.integers(0, 3),
    st.integers(0, 999),
)
def test_snapkv_s_halves(name, sizes, budget, sinks, seed):
    model = tiny.model(name)
    rows = [tiny.tokens(size, seed=seed + i) for i, size in enumerate(sizes)]
    ids, mask = tiny.pad(rows, 1)
    values = stored_values(model, ids, mask)
    with kvlib.method("critical_kv", budget=budget, sinks=sinks)(model) as run:
        model(ids, attention_mask=mask)
    kept, kv_heads = tiny.kept(run), model.config.num_key_value_heads
    for row, text in enumerate(rows):
        n = len(text)
        size = min(n, budget if isinstance(budget, int) else max(1, int(budget * n)))
        share = budget if isinstance(budget, int) else size  # which may exceed the prompt
        window = max(1, min(32, share // 2))
        for layer, weights in enumerate(weights_of(model, text)):
            norms = norms_of(model, layer, values[layer][row, :, :n])
            for kv in range(kv_heads):
                groups = len(weights) // kv_heads
                score = pooled_attention(weights, range(kv * groups, (kv + 1) * groups), min(window, n))
                order = sorted(range(len(score)), key=lambda k: (-score[k], k))
                first = [*range(n - min(window, n), n), *order[: max(0, max(1, share // 2) - window)]]
                forced = [k for k in range(min(sinks, max(0, share - window - 1), n)) if k not in first]
                product = {k: (score[k] + 1e-4) * norms[kv][k] for k in range(len(score))}
                rest = sorted((k for k in product if k not in first + forced), key=lambda k: (-product[k], k))
                stays = sorted((first + forced + rest)[:size]) if size < n else [*range(n)]
                assert kept[row][layer][kv] == stays


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa"])
def test_h2o_s_halves_while_decoding(name):
    model, lengths = tiny.model(name), [24, 1, 1, 1]
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    seen, kept = [], []

    class Watched(kvlib.METHODS["critical_kv"]):
        def attend(self, view):
            key = view.key.repeat_interleave(view.groups, 1)
            hidden = view.positions[:, :, None] > view.query_positions[:, None, :, None]
            logits = (view.query @ key.mT * view.scaling).masked_fill(
                hidden.repeat_interleave(view.groups, 1), -torch.inf
            )
            seen.append((view.positions[0].tolist(), logits.softmax(-1)[0], view.value[0].clone()))
            return super().attend(view)

    with Watched(10, "h2o")(model) as run:
        for i, length in enumerate(lengths):
            model(tiny.tokens(1, length, seed=i), past_key_values=run.cache if i else None)
            kept.append(tiny.kept(run)[0])
    for layer in range(2):
        received = [{} for _ in range(model.config.num_key_value_heads)]
        for step, (positions, weights, value) in enumerate(seen[layer::2]):
            norms, end = norms_of(model, layer, value), 24 + step
            for kv, total in enumerate(received):
                for slot, key in enumerate(positions[kv]):
                    new = float(weights[kv * groups : (kv + 1) * groups, :, slot].sum())
                    total[key] = total.get(key, 0) + new
                norm = dict(zip(positions[kv], norms[kv]))
                recent = [k for k in total if k >= end - 5]
                others = [k for k in total if k < end - 5]
                product = {k: (total[k] / (end * groups) + 1e-4) * norm[k] for k in others}
                stays = recent + sorted(others, key=lambda k: (-product[k], k))[:5]
                assert kept[step][layer][kv] == sorted(stays)
                received[kv] = {k: total[k] for k in stays}


def test_what_the_host_protects_stays_even_if_its_values_are_0(monkeypatch):
    monkeypatch.setattr(critical_kv, "mean_norms", lambda view, name: torch.zeros_like(view.new_value[..., 0]))
    with kvlib.method("critical_kv", host="scissorhands", budget=12)(tiny.model("llama-gqa")) as run:
        run.model(tiny.tokens(1, 30))
        run.model(tiny.tokens(1, 1), past_key_values=run.cache)
    assert tiny.kept(run) == [[[[0, 1, *range(21, 31)]] * 2] * 2]  # the last 10 are not of the first half alone


def test_terms_of_each_host():
    model, found = tiny.model("llama-gqa"), {}

    class Watched(kvlib.METHODS["critical_kv"]):
        def score(self, view):
            found.setdefault(self.host, []).append(self.terms(view).flatten().tolist())
            return super().score(view)

    for host in ("h2o", "scissorhands", "snapkv", "pyramidkv"):
        with Watched(12, host)(model) as run:
            model(*tiny.pad([tiny.tokens(30), tiny.tokens(20)]))
            model(tiny.tokens(2, 1), past_key_values=run.cache)
    assert found["h2o"] == [[60, 40]] * 2 + [[62, 42]] * 2
    assert found["scissorhands"] == [[2, 2]] * 2 + [[4, 4]] * 2
    assert found["snapkv"] == found["pyramidkv"] == [[6, 6]] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"host": "knorm"}, "unknown host 'knorm'"),
        ({"sinks": -1}, "sinks=-1"),
        ({"budget": 1, "host": "h2o"}, "budget=1"),
    ],
)
def test_impossible_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("critical_kv", **arguments)
