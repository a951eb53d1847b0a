"""The 8-bit cache: how far a code is from what it stands for, what it weighs, and when it begins."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.int8 import codes


@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-9, 1e-4, 1.0, 1e4]), st.booleans())
def test_a_code_is_half_a_step_away_at_most(seed, size, zeros):
    x = size * torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if zeros:
        x[:, :, 2] = 0
    stored = codes(x, -x)
    assert stored["key"].dtype == torch.int8
    assert torch.equal(stored["key"], -stored["value"])
    scale = stored["key_scale"].double()
    exact = x.abs().amax(-1, keepdim=True) / 127
    # beside half a step, what rounding the scale to 16 bits cuts off the largest entry
    error = (stored["key"] * scale - x).abs()
    assert (error <= scale / 2 + 127 * (exact - scale).clamp(min=0) + 1e-12 * size).all()
    tiny_scale = 2.0**-24  # the least step of float16
    assert ((scale - exact).abs() <= exact * 2**-11 + tiny_scale / 2).all()


def test_bytes_are_counted_as_they_are_stored():
    model = tiny.model("llama-gqa", torch.bfloat16)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.head_dim + 2)
    with kvlib.method("int8")(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        assert run.stored_bytes() == run.allocated_bytes() == 30 * per_token
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == run.read_bytes() == 34 * per_token
        assert run.full_bytes() == 34 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


@pytest.mark.parametrize("chunk", [None, 6])
def test_a_prompt_is_read_exactly_and_the_next_token_from_codes(chunk):
    model = tiny.model("llama-gqa")
    ids = tiny.tokens(1, 20)
    with kvlib.method("full")(model) as run:
        exact = model(ids).logits
        keys = [layer.tail.rectangle(layer.tail.fields["key"]).clone() for layer in run.cache.layers]
        values = [layer.tail.rectangle(layer.tail.fields["value"]).clone() for layer in run.cache.layers]
    with kvlib.method("int8")(model) as run:
        run.read(input_ids=ids, prefill_chunk_size=chunk)
        for layer, key, value in zip(run.cache.layers, keys, values):
            fields = {name: layer.tail.rectangle(flat) for name, flat in layer.tail.fields.items()}
            for name, x in codes(key, value).items():
                assert torch.equal(fields[name], x)
        new = model(tiny.tokens(1, 1, seed=5), past_key_values=run.cache).logits
    with kvlib.method("full")(model) as run:
        assert torch.equal(model(ids).logits, exact)
        for layer, key, value in zip(run.cache.layers, keys, values):
            for name, x in zip(("key", "value"), (key, value)):
                scale = (x.abs().amax(-1, keepdim=True) / 127).half().double()
                layer.tail.rectangle(layer.tail.fields[name]).copy_((x / scale).round().clamp(-127, 127) * scale)
        # all but the new token itself, which is stored in 8 bits here and exact there
        expected = model(tiny.tokens(1, 1, seed=5), past_key_values=run.cache).logits
    assert not torch.equal(new, expected)
    torch.testing.assert_close(new, expected, rtol=0, atol=0.05 * float(expected.std()))
