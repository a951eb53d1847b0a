"""KIVI against codes written out number by number: what is stored when, what is read, and what it weighs."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.kivi import decoded, encoded

DRAWN = st.integers(0, 2**31 - 1), st.sampled_from([2, 4]), st.sampled_from([1e-3, 1.0, 300.0])


def half(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).half())


def coded(numbers: list[float], bits: int) -> list[float]:
    """What becomes of the numbers of one group."""
    low, step = half(min(numbers)), half((max(numbers) - min(numbers)) / (2**bits - 1))
    found = []
    for number in numbers:
        code = 0 if step == 0 else min(2**bits - 1, max(0, round((number - low) / step)))
        found.append(code * step + low)
    return found


def by_hand(key, value, bits: int, group: int, residual: int):
    """Keys and values `(tokens, head_dim)` of one head, read as they are stored."""
    key, value = key.clone(), value.clone()
    width = math.gcd(group, value.shape[1])
    for token in range(len(key) - len(key) % residual):
        if token % group == 0:
            for channel in range(key.shape[1]):
                key[token : token + group, channel] = torch.tensor(
                    coded(key[token : token + group, channel].tolist(), bits)
                )
        for start in range(0, value.shape[1], width):
            value[token, start : start + width] = torch.tensor(
                coded(value[token, start : start + width].tolist(), bits)
            )
    return key, value


@given(*DRAWN, st.booleans(), st.sampled_from([4, 8]), st.sampled_from([6, 8, 16]))
def test_a_code_is_half_a_step_away_at_most(seed, bits, size, constant, group, dim):
    key, value = size * torch.randn(2, 2, 1, 3, group, dim, generator=torch.Generator().manual_seed(seed)).double()
    if constant:
        key[0, 0, 1], value[0, 0, 1, 2] = size, -size
    stored = encoded(key, value, bits)
    for name, dtype in {"key": torch.uint8, "value": torch.uint8}.items():
        assert stored[name].dtype == dtype and stored[name].shape == (2, 1, 3, group * bits // 8, dim)
    found = decoded(stored, bits)
    width = math.gcd(group, dim)
    for x, y, dim_, cut in (
        (key, found[0], 3, lambda x: x),
        (value, found[1], -1, lambda x: x.unflatten(-1, (-1, width))),
    ):
        x, error = cut(x), (cut(x) - cut(y)).abs()
        step = (x.amax(dim_, keepdim=True) - x.amin(dim_, keepdim=True)) / (2**bits - 1)
        # beside half a step, what rounding the lowest entry and the step to 16 bits can move the ends
        rounding = 2.0**-11 * (x.amin(dim_, keepdim=True).abs() + 2**bits * step) + 2.0**-20
        assert (error <= step / 2 + rounding).all()


@pytest.mark.parametrize(
    ("architecture", "bits", "group", "residual"), [("llama-gqa", 2, 4, 8), ("qwen3", 4, 6, 6), ("mistral", 2, 32, 32)]
)
def test_what_is_read_is_what_codes_say(architecture, bits, group, residual):
    model = tiny.model(architecture)
    lengths, new = ([37, 30], 6) if group == 32 else ([21, 13], 7)
    raw, seen = [], []

    class Watched(kvlib.METHODS["kivi"]):
        def observe(self, view):
            if view.layer_idx == 1:
                raw.append((view.new_key.clone(), view.new_value.clone()))
                seen.append((view.key.clone(), view.value.clone(), view.positions.clone()))

    with Watched(bits=bits, group=group, residual=residual)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(n, seed=n) for n in lengths])).logits[:, -1]
        tiny.decode(model, run, logits, new=new + 1)
    for step in range(new + 1):
        before = [torch.cat(x, dim=2) for x in zip(*raw[:step])] if step else None
        for row, length in enumerate(lengths):
            for head in range(raw[0][0].shape[1]):
                key, value, at = (x[row, head] for x in seen[step])
                order = at[at >= 0].argsort()
                key, value = key[at >= 0][order], value[at >= 0][order]
                now = [x[row, head] for x in raw[step]]
                if not step:  # a prompt is read exactly
                    expected = [x[-length:] for x in now]
                else:
                    past = by_hand(*(x[row, head][-length - step + 1 :] for x in before), bits, group, residual)
                    expected = [torch.cat(x) for x in zip(past, now)]
                torch.testing.assert_close(key, expected[0], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(value, expected[1], rtol=1e-6, atol=1e-6)
    for row, length in enumerate(lengths):
        whole = (length + new) // residual * residual
        assert (run.cache.layers[0].tail.lengths[row] == length + new - whole).all()
        assert (run.cache.layers[0].body.tokens[row] == whole).all()


@pytest.mark.parametrize("chunk", [None, 6])
def test_logits_after_a_prompt_are_those_of_decoded_codes(chunk):
    model, ids, more = tiny.model("llama-gqa"), tiny.tokens(1, 22), tiny.tokens(1, 3, seed=5)
    with kvlib.method("kivi", group=4, residual=8)(model) as run:
        run.read(input_ids=ids, prefill_chunk_size=chunk)
        found = model(more, past_key_values=run.document).logits
    with kvlib.method("full")(model) as run:
        exact = model(ids).logits
        for layer in run.cache.layers:
            key, value = (layer.tail.rectangle(layer.tail.fields[name]) for name in ("key", "value"))
            for head in range(key.shape[1]):
                pair = by_hand(key[0, head], value[0, head], 2, 4, 8)
                for x, y in zip((key, value), pair):
                    x[0, head] = y
        expected = model(more, past_key_values=run.cache).logits
        unchanged = model(torch.cat([ids, more], dim=1)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact, unchanged[:, :22])
    assert (expected - unchanged[:, 22:]).abs().max() > 0.01


@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_are_bits_and_two_numbers_a_group(bits):
    model = tiny.model("llama-gqa", torch.float16, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    token = 2 * 2 * 2 * 32  # layers, keys and values, bytes, channels
    with kvlib.method("kivi", bits=bits, group=32, residual=64)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(130), tiny.tokens(66, seed=1)])).logits[:, -1]
        coded = token * (bits + 1) / 16  # 32 numbers of `bits` and two of 16 bits
        assert run.stored_bytes() == run.allocated_bytes() == 192 * coded + 4 * token
        tiny.decode(model, run, logits, new=63)
        assert run.stored_bytes() == run.read_bytes() == 320 * coded
        assert run.full_bytes() == 320 * token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits=3: 2 or 4"),
        ({"bits": True}, "bits=True: "),
        ({"group": 6}, "group=6: tokens whose codes of 2 bits fill whole bytes"),
        ({"group": 0}, "group=0: "),
        ({"group": 4, "residual": 6}, "residual=6: a multiple of the group, 4 tokens"),
        ({"residual": 0}, "residual=0: "),
        ({"residual": 128.0}, r"residual=128\.0: "),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("kivi", **arguments)
