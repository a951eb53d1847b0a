"""ThinK against its formula, channel by channel, and against the channels that kvpress zeroes."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import kvlib

PARITY = Path(__file__).parent.parent / "parity"


def by_hand(query, key, ratio: float, window: int) -> list[list[int]]:
    """Channels that stay, of each KV head; query and key `(heads, tokens, head_dim)`."""
    found, groups = [], len(query) // len(key)
    for head, keys in enumerate(key):
        score = []
        for channel in range(keys.shape[1]):
            asked = [float(q[channel]) ** 2 for h in range(groups) for q in query[head * groups + h][-window:]]
            score.append(sum(asked) / len(asked) * sum(float(k[channel]) ** 2 for k in keys) / len(keys))
        lost = sorted(range(len(score)), key=lambda c: score[c])[: int(len(score) * ratio)]
        found.append([c for c in range(len(score)) if c not in lost])
    return found


def stored(run, layer: int, row: int, head: int):
    """Positions, keys and values of the body and of the tail."""
    found = []
    for part in run.cache.layers[layer].parts:
        at = part.position_rectangle()[row, head]
        fields = (part.rectangle(part.fields[name])[row, head][at >= 0] for name in ("key", "value"))
        found.append((at[at >= 0].tolist(), *fields))
    return found


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("architecture", "ratio"), [("llama-gqa", 0.4), ("llama-mha", 0.8), ("qwen3", 0.4)])
def test_older_keys_have_the_channels_of_the_formula(architecture, ratio, chunk):
    model = tiny.model(architecture)
    rows, window, recent = [tiny.tokens(n, seed=n) for n in (21, 7, 3)], 9, 5
    method = kvlib.method("think", ratio=ratio, window=window, recent=recent)
    with method(model) as run:
        ids, mask = tiny.pad(rows)
        run.read(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, ids in enumerate(rows):
        older = max(0, len(ids) - recent)
        for layer, (query, key, value, _) in enumerate(kvlib.snapshot(model, ids[None]).layers):
            for head, channels in enumerate(by_hand(query[0], key[0], ratio, window)):
                (body, narrow, few), (tail, whole, rest) = stored(run, layer, row, head)
                assert body == list(range(older)) and tail == list(range(older, len(ids)))
                if older:
                    torch.testing.assert_close(narrow, key[0, head, :older][:, channels])
                torch.testing.assert_close(whole, key[0, head, older:])
                torch.testing.assert_close(torch.cat([few, rest]), value[0, head])


def test_logits_are_those_of_the_channels_that_are_left():
    model, ids, more = tiny.model("llama-gqa"), tiny.tokens(1, 22), tiny.tokens(1, 4, seed=5)
    with kvlib.method("think", window=6, recent=5)(model) as run:
        found = model(ids).logits, model(more, past_key_values=run.cache).logits
    layers = kvlib.snapshot(model, ids).layers
    with kvlib.method("full")(model) as run:
        exact = model(ids).logits
        unchanged = model(torch.cat([ids, more], dim=1)).logits[:, 22:]
        model(ids)
        for layer, (query, key, _, _) in zip(run.cache.layers, layers):
            keys = layer.tail.rectangle(layer.tail.fields["key"])
            for head, channels in enumerate(by_hand(query[0], key[0], 0.4, 6)):
                lost = [c for c in range(key.shape[-1]) if c not in channels]
                keys[0, head, :17, lost] = 0
        expected = model(more, past_key_values=run.cache).logits
    assert torch.equal(found[0], exact)
    torch.testing.assert_close(found[1], expected)
    assert (expected - unchanged).abs().max() > 1e-3


def test_a_later_turn_keeps_the_channels_of_the_first():
    model, rows = tiny.model("llama-gqa"), [tiny.tokens(n, seed=n) for n in (21, 3)]
    later = [tiny.tokens(9, seed=n) for n in (7, 8)]
    with kvlib.method("think", window=6, recent=5)(model) as run:
        turn = tiny.generate(model, run, rows, new=3)
        first = run.cache.layers[1].rows["channels"].clone()
        tiny.generate(model, run, later, new=2, before=turn)
    kept = run.cache.layers[1].rows["channels"]
    assert torch.equal(kept[0], first[0])
    # a row of 3 tokens had nothing to lose before: all its tokens and the queries of the second turn choose
    text = torch.cat([rows[1], turn.tokens[1], later[1]])
    query, key, *_ = kvlib.snapshot(model, text[None]).layers[1]
    assert kept[1].tolist() == by_hand(query[0], key[0], 0.4, 6)
    for row, total in enumerate((33, 15)):
        (body, narrow, _), (tail, whole, _) = stored(run, 1, row, 0)
        assert body == list(range(total - 5)) and tail == list(range(total - 5, total + 1))
        assert narrow.shape[1] == 5 and whole.shape[1] == 8


@pytest.mark.parametrize(("ratio", "kept"), [(0.4, 5), (0.0, 8), (0.95, 1)])
def test_bytes_fall_by_the_channels_that_go(ratio, kept):
    model = tiny.model("llama-gqa", torch.bfloat16)
    heads = 2 * 2 * 2  # of two layers, two bytes a number
    with kvlib.method("think", ratio=ratio, recent=4)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        assert run.stored_bytes() == run.allocated_bytes() == heads * (22 * (kept + 8) + 8 * 16)
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == run.read_bytes() == heads * (22 * (kept + 8) + 12 * 16)
        assert run.full_bytes() == heads * 34 * 16


def test_squares_do_not_overflow_in_float16():
    found = []
    for factor in (1, 256, 2**-9):  # of powers of two, so that all products stay as they are
        model = tiny.build("llama-gqa", torch.float16)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= factor
            layer.self_attn.q_proj.weight /= factor
        with kvlib.method("think", window=6, recent=5)(model) as run:
            assert model(tiny.tokens(2, 20)).logits.isfinite().all()
        found.append([layer.rows["channels"].tolist() for layer in run.cache.layers])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_the_channels_that_kvpress_zeroes(kind):
    model = AutoModelForCausalLM.from_pretrained(PARITY / "kvpress" / f"model_{kind}", dtype=torch.float32).eval()
    prompts, recorded = (np.load(PARITY / name) for name in ("kvpress/kept.npz", "kvpress_think/zeroed.npz"))
    names = [name for name in recorded.files if name.startswith(kind)]
    assert len(names) == 18
    for name in names:
        prompt, ratio, window = name.split("_")[1:]
        ids = torch.from_numpy(prompts[f"{kind}_{prompt}_ids"].astype(np.int64))[None]
        with torch.no_grad(), kvlib.method("think", ratio=float(ratio[1:]), window=int(window[1:]))(model) as run:
            model(ids, logits_to_keep=1)
        zeroed = np.unpackbits(recorded[name], axis=-1).astype(bool)
        for layer, theirs in zip(run.cache.layers, zeroed, strict=True):
            ours = torch.ones(theirs.shape, dtype=torch.bool).scatter_(-1, layer.rows["channels"][0], False)
            assert (ours.numpy() == theirs).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1\.0: the share of channels that keys lose, in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio=-0\.1: "),
        ({"ratio": "half"}, "ratio='half': "),
        ({"window": 0}, "window=0: a number of queries >= 1"),
        ({"recent": -1}, "recent=-1: a number of tokens >= 0"),
        ({"recent": 0.5}, r"recent=0\.5: "),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("think", **arguments)
