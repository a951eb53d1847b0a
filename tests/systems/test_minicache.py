"""MiniCache against its formulas, token by token: what is merged, into what, and what both layers read."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.minicache import distance, merged

FIVE = {"num_hidden_layers": 5}


def angle(one, two) -> float:
    """As a part of half a turn."""
    cosine = sum(float(a) * float(b) for a, b in zip(one, two)) / float(one.norm() * two.norm())
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def too_far(one, two, gamma: float) -> list[int]:
    """Which tokens of one head stay, keys `(tokens, head_dim)`."""
    apart = [round(angle(a, b), 6) for a, b in zip(one, two)]
    return [i for i, d in enumerate(apart) if d > max(apart) - gamma * (max(apart) - min(apart))]


def restored(one, two, t: float):
    """What each layer reads of one token, by SLERP."""
    theta = math.pi * angle(one, two)
    left, right = (math.sin(part * theta) / math.sin(theta) for part in (1 - t, t))
    direction = left * one / one.norm() + right * two / two.norm()
    return direction * one.norm(), direction * two.norm()


def stored(part, row: int, head: int, own: int) -> dict[int, tuple]:
    """Position -> key and value of a part's tokens as one layer reads them, the first or the second of its pair."""
    at, found = part.position_rectangle()[row, head], {}
    fields = {name: part.rectangle(flat)[row, head] for name, flat in part.fields.items()}
    for slot in (at >= 0).nonzero().flatten().tolist():
        norms = [fields[f"{name}_norms"][slot, own] if "key_norms" in fields else 1 for name in ("key", "value")]
        found[int(at[slot])] = fields["key"][slot] * norms[0], fields["value"][slot] * norms[1]
    return found


def assert_equal(found: tuple, expected: tuple) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(
    ("architecture", "arguments", "pairs"),
    [
        ("llama-gqa", {}, [(2, 3)]),
        ("llama-mha", {"start": 0.2, "gamma": 0.5, "t": 0.25}, [(1, 2), (3, 4)]),
        ("qwen3", {"start": 0.0, "gamma": 0.3}, [(0, 1), (2, 3)]),
    ],
)
def test_pairs_hold_what_the_formulas_say(architecture, arguments, pairs, chunk):
    model, rows = tiny.model(architecture, **FIVE), [tiny.tokens(n, seed=n) for n in (21, 13, 1)]
    method = kvlib.method("minicache", **arguments)
    with method(model) as run:
        ids, mask = tiny.pad(rows)
        run.read(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk)
    layers = run.cache.layers
    assert [
        (i, i + 1) for i in range(4) if layers[i].body is not None and layers[i].body is layers[i + 1].body
    ] == pairs
    stayed = 0
    for row, ids in enumerate(rows):
        full = kvlib.snapshot(model, ids[None]).layers
        for i in {*range(5)} - {i for pair in pairs for i in pair}:
            assert layers[i].body is None and (layers[i].tail.lengths[row] == len(ids)).all()
        for pair in pairs:
            for head in range(full[0][1].shape[1]):
                key, value = ([full[i][kind][0, head] for i in pair] for kind in (1, 2))
                stay = too_far(*key, method.gamma)
                stayed += len(stay)
                for own, i in enumerate(pair):
                    body, tail = (stored(part, row, head, own) for part in layers[i].parts)
                    assert sorted(tail) == stay and sorted({*body, *tail}) == list(range(len(ids)))
                    for token, found in tail.items():
                        assert_equal(found, (key[own][token], value[own][token]))
                    for token, found in body.items():
                        both = (restored(x[0][token], x[1][token], method.t)[own] for x in (key, value))
                        assert_equal(found, tuple(both))
    assert 2 * len(pairs) * full[0][1].shape[1] <= stayed < 20 * len(pairs) * full[0][1].shape[1]


def test_logits_are_those_of_what_was_merged():
    model, ids, more = tiny.model("llama-gqa", **FIVE), tiny.tokens(1, 22), tiny.tokens(1, 4, seed=5)
    with kvlib.method("minicache", start=0.2)(model) as run:
        found = model(ids).logits, model(more, past_key_values=run.cache).logits
    full = kvlib.snapshot(model, ids).layers
    with kvlib.method("full")(model) as run:
        exact = model(torch.cat([ids, more], dim=1)).logits
        model(ids)
        for pair in ((1, 2), (3, 4)):
            for head in range(2):
                key, value = ([full[i][kind][0, head] for i in pair] for kind in (1, 2))
                stay = too_far(*key, 0.05)
                for own, i in enumerate(pair):
                    tail = run.cache.layers[i].tail
                    for name, x in (("key", key), ("value", value)):
                        for token in {*range(22)} - {*stay}:
                            both = restored(x[0][token], x[1][token], 0.6)
                            tail.rectangle(tail.fields[name])[0, head, token] = both[own]
        expected = model(more, past_key_values=run.cache).logits
    torch.testing.assert_close(found[0], exact[:, :22])
    torch.testing.assert_close(found[1], expected)
    assert (expected - exact[:, 22:]).abs().max() > 0.01


def test_a_later_prompt_compares_what_stayed_with_what_has_come():
    model, before = tiny.model("llama-gqa"), []

    class Watched(kvlib.METHODS["minicache"]):
        def finish(self, run):
            if run.step.ends_prompt:
                layers = run.cache.layers
                before.append(
                    ([stored(x.tail, 0, 0, 0) for x in layers], layers[0].body and stored(layers[0].body, 0, 0, 0))
                )
            super().finish(run)

    with Watched(start=0.0, gamma=0.2)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(19)], new=4)
        tiny.generate(model, run, [tiny.tokens(6, seed=1)], new=3, before=turn)
    (one, two), merged_before = before[1]
    tokens = sorted(one)
    assert 1 < len({*tokens} & {*range(19)}) < 18 and {*tokens} >= {*range(19, 29)}
    stay = too_far(*(torch.stack([x[i][0] for i in tokens]) for x in (one, two)), 0.2)
    layers = run.cache.layers
    assert sorted(stored(layers[0].tail, 0, 0, 0)) == [*(tokens[i] for i in stay), 29, 30]
    body = stored(layers[0].body, 0, 0, 0)
    assert sorted(body) == [i for i in range(29) if i not in {tokens[i] for i in stay}]
    for token, pair in merged_before.items():
        assert_equal(body[token], pair)


@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_direction_lies_on_the_arc(seed, t, size):
    one, two = size * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction, norms = merged(one, two, t)
    for a, b, found, lengths in zip(one, two, direction, norms):
        assert found.norm() == pytest.approx(1)
        assert lengths.tolist() == pytest.approx([float(a.norm()), float(b.norm())])
        assert angle(a, found) == pytest.approx(t * angle(a, b), abs=1e-7)
        assert angle(b, found) == pytest.approx((1 - t) * angle(a, b), abs=1e-7)


def test_vectors_that_have_no_arc():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    direction, norms = merged(x, 2 * x, 0.6)
    torch.testing.assert_close(direction * norms[:, :1], x)
    torch.testing.assert_close(norms[:, 1], 2 * norms[:, 0])
    assert merged(x, -x, 0.6)[0].isfinite().all()
    nothing, norms = merged(0 * x, 0 * x, 0.6)
    assert (nothing == 0).all() and (norms == 0).all()
    near = x + 1e-5 * x.flip(-1)
    exact = distance(x.double(), near.double())
    torch.testing.assert_close(distance(x, near).double(), exact, rtol=0.05, atol=0)


def test_large_keys_in_half_precision():
    vectors = 500 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).half()  # squares are infinite
    direction, norms = merged(*vectors, 0.6)
    assert direction.dtype == norms.dtype == torch.float16
    assert_equal((norms.float(),), (vectors.float().norm(dim=-1).T.half().float(),))
    torch.testing.assert_close(direction.float().norm(dim=-1), torch.ones(5), rtol=0, atol=2e-3)


def test_a_word_that_repeats_leaves_no_choice_to_rounding():
    model = tiny.model("llama-gqa")
    with kvlib.method("minicache", start=0.0, gamma=0.5)(model) as run:
        model(torch.full((1, 30), 7))
    stays = [stored(run.cache.layers[0].tail, 0, head, 0) for head in range(2)]
    assert stays == [{}, {}]  # in both layers all tokens are alike but for rotation


def test_bytes_are_a_direction_and_two_norms_for_both_layers():
    model = tiny.model("llama-gqa", torch.bfloat16, **FIVE)
    with kvlib.method("minicache", gamma=0.0)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        heads, whole = 2 * 2, 16  # two heads, two bytes; keys and values
        assert run.stored_bytes() == run.allocated_bytes() == heads * 30 * (3 * whole + 2 * (8 + 2))
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == heads * (30 * (3 * whole + 2 * (8 + 2)) + 4 * 5 * whole)
        assert run.read_bytes() == run.stored_bytes() + heads * 30 * 2 * (8 + 2)  # both read what they share
        assert run.full_bytes() == heads * 34 * 5 * whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": 1.5}, r"t=1\.5: a part in \[0, 1\]"),
        ({"t": "half"}, "t='half': "),
        ({"gamma": -0.1}, r"gamma=-0\.1: "),
        ({"start": 1.0}, r"start=1\.0: a share of the layers in \[0, 1\)"),
        ({"start": None}, "start=None: "),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("minicache", **arguments)
