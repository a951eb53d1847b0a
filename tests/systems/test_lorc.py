"""LoRC against models whose weights are cut, its ranks against products of condition numbers, and its bytes."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import kvlib
from kvlib.core.rotary import rotaries
from kvlib.methods.systems import lowrank
from kvlib.methods.systems.lorc import log_condition

FOUR = {"num_hidden_layers": 4}


def by_hand(model, most, least):
    """Rank of each layer: condition numbers multiplied from the last layer to the first."""
    size, logs, product = model.model.layers[0].self_attn.head_dim, [], 1.0
    for layer in reversed(model.model.layers):
        for name in ("k", "v"):
            weight = getattr(layer.self_attn, f"{name}_proj").weight
            norm = getattr(layer.self_attn, f"{name}_norm", None)
            if norm is not None:
                weight = torch.cat([torch.diag(norm.weight) @ head for head in weight.split(size)])
            product *= np.linalg.cond(weight.numpy())
        logs.insert(0, math.log(product))
    top, bottom = max(logs), min(logs)
    return [
        max(1, round(most * size * (1 - (top - log) / (top - bottom) * (1 - least / most)))) if top > bottom else
        max(1, round(most * size))
        for log in logs
    ]  # fmt: skip


def cut(model, ranks):
    """The model with each head's projections cut to their largest singular values."""
    for layer, rank in zip(model.model.layers, ranks):
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = []
            for head in linear.weight.split(layer.self_attn.head_dim):
                u, s, v = np.linalg.svd(head.double().numpy())
                kept = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(rank))
                heads.append(torch.from_numpy(kept).to(head.dtype))
            linear.weight.copy_(torch.cat(heads))
    return model


def built(name):
    """A model as transformers makes it, with layers of other condition numbers than their neighbours'."""
    model = tiny.build(name, torch.float32, **FOUR)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.weight[i] *= 0.2 + 0.1 * i
        layer.self_attn.v_proj.weight[i] *= (1.0, 0.01, 0.3, 0.2)[i]  # in one layer those of W_v are the larger ones
    return model


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "mistral", "qwen2"])
def test_answers_are_those_of_a_model_with_cut_weights(name):
    """Biases are left as they are; second turns and decoded tokens too."""
    model, method = built(name), kvlib.method("lorc", most=0.9, least=0.3)
    ranks = by_hand(model, 0.9, 0.3)
    assert len(set(ranks)) > 2
    passes, cache = [tiny.tokens(1, 20), tiny.tokens(1, 1, seed=1), tiny.tokens(1, 5, seed=2)], DynamicCache()
    with method(model) as run:
        found = [model(ids, past_key_values=run.cache if i else None).logits for i, ids in enumerate(passes)]
        assert [layer.tail.fields["key"].shape[-1] for layer in run.cache.layers] == ranks
    exact = model(passes[0]).logits
    other = cut(built(name), ranks)
    for ids, logits in zip(passes, found):
        torch.testing.assert_close(logits, other(ids, past_key_values=cache).logits, rtol=1e-3, atol=1e-3)
    assert (found[0] - exact).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3"])
def test_what_is_stored(name):
    """Token by token: coordinates of the key turned back, and what they come to when they are read."""
    model = tiny.build(name, torch.float32, **FOUR)
    ids, mask = tiny.pad([tiny.tokens(9), tiny.tokens(6, seed=1)])
    with kvlib.method("full")(model) as run:
        model(ids, attention_mask=mask)
        exact = [[layer.tail.rectangle(layer.tail.fields[x]).clone() for x in ("key", "value")]
                 for layer in run.cache.layers[:1]]  # fmt: skip
        at = run.cache.layers[0].position_rectangle()
    seen = []

    class Watched(kvlib.METHODS["lorc"]):
        def observe(self, view):
            seen.append((view.key, view.value))

    with Watched()(model) as run:
        model(ids, attention_mask=mask)
        layer, (rotary, *_), read = run.cache.layers[0], rotaries(model), seen[0]
        stored = [layer.tail.rectangle(layer.tail.fields[x]) for x in ("key", "value")]
        rank, attention = stored[0].shape[-1], model.model.layers[0].self_attn
        assert rank == by_hand(model, 0.75, 0.35)[0] == round(0.75 * attention.head_dim)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for which, kind in enumerate("kv"):
            weight = getattr(attention, f"{kind}_proj").weight.split(attention.head_dim)[head].double()
            if kind == "k" and name == "qwen3":
                weight = torch.diag(attention.k_norm.weight.double()) @ weight
            basis = torch.linalg.svd(weight).U[:, :rank].float()
            for slot in range(9 if row == 0 else 6):
                place = at[row, head, slot : slot + 1]
                x = exact[0][which][row, head, slot : slot + 1]
                straight = lowrank.turned(x[None, None], -place[None, None], rotary)[0, 0] if kind == "k" else x
                code = straight @ basis
                kept = code @ basis.T
                if kind == "k":
                    kept = lowrank.turned(kept[None, None], place[None, None], rotary)[0, 0]
                torch.testing.assert_close(read[which][row, head, slot], kept[0], rtol=1e-3, atol=1e-3)
                norms = stored[which][row, head, slot].norm(), code.norm()
                torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-3)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=6), st.floats(0.05, 1), st.floats(0.01, 1), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_early_layers_keep_more(logs, most, share, size):
    method = kvlib.method("lorc", most=most, least=most * share)
    ranks = method.ranks(logs, size)
    assert ranks == sorted(ranks, reverse=True) and len(ranks) == len(logs)
    assert ranks[0] == max(1, round(most * size))
    if sum(logs[:-1]) > 0:
        assert ranks[-1] == max(1, round(method.least * size))


def test_bytes_are_counted_as_they_are_stored():
    model = tiny.model("llama-gqa", torch.bfloat16, **FOUR)
    ranks = by_hand(tiny.build("llama-gqa", torch.bfloat16, **FOUR).double(), 0.75, 0.35)
    assert ranks[0] == 6 and ranks[-1] == 3
    with kvlib.method("lorc")(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        assert logits.isfinite().all()
        assert run.stored_bytes() == run.allocated_bytes() == 30 * 2 * 2 * sum(ranks) * 2
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == run.read_bytes() == 34 * 2 * 2 * sum(ranks) * 2
        assert run.full_bytes() == 34 * 2 * 2 * 4 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_limits_condition_numbers(dtype):
    weight = torch.randn(2, 8, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert log_condition(weight) == pytest.approx(math.log(np.linalg.cond(weight.flatten(0, 1).numpy())), rel=1e-5)
    weight[1, 3] = 0
    assert log_condition(weight) == pytest.approx(-math.log(torch.finfo(dtype).eps), rel=1e-6)


@pytest.mark.parametrize("shares", [(1.1, 0.5), (0.5, 0.6), (0.5, 0.0), (1, 0.5), (0.5, True)])
def test_shares_that_are_refused(shares):
    with pytest.raises(ValueError, match=r"\(least, most\)=\(.*\): shares of head_dim, 0 < least <= most <= 1"):
        kvlib.method("lorc", most=shares[0], least=shares[1])


def test_models_without_projections_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="GPT2Attention has no k_proj"), kvlib.method("lorc")(model):
        pass
