"""An evictor under another storage, or under a reader: who chooses what, what is stored, and what cannot be."""

import pytest
import tiny
import torch

import kvlib
from kvlib.methods.systems.int8 import codes

ROWS = [tiny.tokens(30), tiny.tokens(21, seed=1)]


def combined(**arguments):
    return kvlib.method("combined", **{"budget": 0.4, "evictor": "keydiff"} | arguments)


def after(method, steps=0):
    """The run after two padded prompts and some tokens, and the logits of one more, given token."""
    model = tiny.model("llama-gqa")
    ids, mask = tiny.pad(ROWS)
    with method(model) as run:
        logits = model(ids, attention_mask=mask).logits[:, -1]
        tiny.decode(model, run, logits, new=steps + 1)
        prompt = [{name: flat.clone() for name, flat in layer.tail.fields.items()} for layer in run.cache.layers]
        stored, read = run.stored_bytes(), run.read_bytes()
        found = model(tiny.tokens(2, 1, seed=5), past_key_values=run.cache).logits
    return run, prompt, stored, read, found


@pytest.mark.parametrize("evictor", ["keydiff", "h2o", "adakv", "streaming_llm", "kvzip", "kv_compress"])
def test_the_evictor_chooses_and_the_store_encodes(evictor):
    plain, fields, stored, _, _ = after(kvlib.method(evictor, budget=0.4))
    run, coded, bytes_of_codes, _, _ = after(combined(evictor=evictor, store="int8"))
    for layer in range(2):
        assert torch.equal(run.kept(layer), plain.kept(layer))
        for name, x in codes(fields[layer]["key"], fields[layer]["value"]).items():
            assert torch.equal(coded[layer][name], x), name
    assert bytes_of_codes * 8 * 8 == stored * (8 + 2)  # float64, heads of 8 channels


def test_a_token_attends_to_what_the_codes_stand_for():
    found = after(combined(store="int8"))[-1]
    model, token = tiny.model("llama-gqa"), tiny.tokens(2, 1, seed=5)
    ids, mask = tiny.pad(ROWS)
    with kvlib.method("keydiff", budget=0.4)(model) as plain:
        logits = model(ids, attention_mask=mask).logits[:, -1]
        tiny.decode(model, plain, logits, new=1)
        for layer in plain.cache.layers:
            for x in layer.tail.fields.values():
                scale = (x.abs().amax(-1, keepdim=True) / 127).half().double()
                x.copy_((x / scale).round().clamp(-127, 127) * scale)
        exact = model(token, past_key_values=plain.cache).logits
    # but for the new token itself, which was stored in 8 bits, too
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * float(exact.std()))


def test_a_reader_reads_a_part_of_what_is_left():
    plain, *_ = after(kvlib.method("keydiff", budget=20), steps=2)
    run, _, stored, read, _ = after(combined(budget=20, reader="loki", read=6), steps=2)
    *_, everything, exact = after(combined(budget=20, reader="loki", read=1.0), steps=2)
    assert all(torch.equal(run.kept(layer), plain.kept(layer)) for layer in range(2))
    entry, heads, layers = 2 * 8 * 8, 4, 2  # bytes of a key and a value; query heads
    listed = 2 * layers * heads * 6 * entry
    looked_at = layers * 2 * 2 * 22 * 2 * 8  # two of eight channels of every key
    assert read == listed + looked_at < everything == stored
    assert torch.equal(exact, after(kvlib.method("keydiff", budget=20), steps=2)[-1])


def test_nothing_beside_is_the_evictor_itself():
    assert torch.equal(after(combined())[-1], after(kvlib.method("keydiff", budget=0.4))[-1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"store": "int8", "reader": "loki"}, "reader='loki': a store or a reader, not both"),
        ({"evictor": "full"}, "unknown evictor 'full'"),
        ({"evictor": "uncomp_stage"}, "evictor='uncomp_stage': one that leaves the prompt's hidden states alone"),
        ({"store": "minicache"}, "unknown store 'minicache'"),
        ({"reader": "tidaldecode"}, "unknown reader 'tidaldecode'; known: loki"),
        ({"evictor": "h2o", "reader": "loki"}, "evictor='h2o': one that evicts at the end of the prompt, below loki"),
        ({"reader": "loki", "read": 0.0}, "budget=0.0: a fraction in"),
        ({"budget": 0}, "budget=0: a fraction in"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        combined(**arguments)


def test_a_reader_needs_heads_of_one_length():
    with pytest.raises(ValueError, match="evictor='adakv': heads of one length, below loki"):
        after(combined(evictor="adakv", reader="loki", read=0.2), steps=1)
