"""Cache correction, and decoding in which a dense pass checks what was drafted."""

import properties
import pytest
import tiny
import torch
from properties import Conversation

import kvlib

SIX = {"num_hidden_layers": 6}
ARCHITECTURES = ["llama-mha", "llama-gqa", "qwen3"]
everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tidal(budget, **arguments):
    return kvlib.method("tidaldecode", budget=budget, **{"selection_layers": (1, 3)} | arguments)


def keys_and_values(run):
    """Per layer K and V `(batch, kv_heads, slots, head_dim)`."""
    return [
        [layer.tail.rectangle(layer.tail.fields[x]).clone() for x in ("key", "value")] for layer in run.cache.layers
    ]


def apart(one, other, tokens=slice(None)):
    """Per layer the largest difference of keys or values at some tokens."""
    pairs = zip(one, other, strict=True)
    return [max((a - b)[:, :, tokens].abs().max().item() for a, b in zip(x, y)) for x, y in pairs]


def dense(model, ids):
    return [layer[1:3] for layer in kvlib.snapshot(model, ids).layers]


@everywhere
@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_corrected_tokens_are_those_of_a_dense_pass(architecture, period):
    model, prompt = tiny.model(architecture, **SIX), 30
    with tidal(4, correction=period)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(prompt)], new=9)  # the last token is not fed
        stored = keys_and_values(run)
    difference = apart(stored, dense(model, turn.ids[:, :-1]))
    clean = prompt + 8 // period * period
    assert max(apart(stored, dense(model, turn.ids[:, :-1]), slice(clean))) < 1e-9
    assert max(difference[:3]) < 1e-9
    assert clean == prompt + 8 or min(difference[3:]) > 1e-3


def test_the_newest_token_is_decoded_sparsely_from_a_clean_cache():
    """With a period of 1 every step is what it would be behind a dense prefill of all that came before."""
    model, method = tiny.model("llama-gqa", **SIX), tidal(4, correction=1)
    ids = tiny.tokens(1, 36)
    with method(model) as run:
        logits = [model(ids[:, :30]).logits[:, -1]]
        for place in range(30, 36):
            logits.append(model(ids[:, place : place + 1], past_key_values=run.cache).logits[:, -1])
    for place, ours in enumerate(logits[1:], 30):
        with tidal(4)(model) as run:
            model(ids[:, :place])
            theirs = model(ids[:, place : place + 1], past_key_values=run.cache).logits[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(theirs, model(ids[:, : place + 1]).logits[:, -1], rtol=1e-6)


def test_correction_changes_what_follows_and_only_that():
    model, rows = tiny.model("llama-gqa", **SIX), [tiny.tokens(30)]
    plain, corrected = (tiny.once(model, tidal(4, correction=c), rows, new=8) for c in (None, 4))
    torch.testing.assert_close(plain.logits[:, :5], corrected.logits[:, :5], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain.logits[:, 5], corrected.logits[:, 5], rtol=1e-6)


@everywhere
@pytest.mark.parametrize("heads", ["query", "group", "all"])
def test_company_padding_chunks_and_turns_change_nothing(architecture, heads):
    talk = Conversation(first=(21, 14), second=7, chunk=5, new=6)
    properties.same_alone_and_in_company(
        tiny.model(architecture, **SIX), tidal(0.3, heads=heads, correction=2, sinks=1), talk
    )


def test_beams_are_corrected_with_their_own_history():
    rows = [tiny.tokens(19), tiny.tokens(12, seed=1)]
    properties.beams_have_their_own_history(
        tiny.model("llama-gqa"), tidal(5, selection_layers=(0,), correction=2), rows, 3, 6
    )


def test_answers_about_a_document_are_corrected_like_those_to_a_prompt():
    model, method = tiny.model("llama-gqa", **SIX), tidal(5, correction=3)
    document, question = tiny.tokens(2, 24), tiny.tokens(2, 5, seed=4)
    arguments = {"max_new_tokens": 10, "do_sample": False}
    with method(model) as run:
        run.read(input_ids=document)
        first, again = (run.ask(question, **arguments) for _ in range(2))
        whole = model.generate(torch.cat([document, question], dim=1), **arguments)
    with tidal(5)(model):
        polluted = model.generate(torch.cat([document, question], dim=1), **arguments)
    assert torch.equal(first, again) and torch.equal(first, whole[:, 24:]) and not torch.equal(whole, polluted)


def test_the_bytes_of_a_step_include_its_correction():
    model, bytes_of = tiny.model("llama-gqa", **SIX), properties.token_bytes(tiny.model("llama-gqa", **SIX))
    reads = []
    with tidal(6, correction=2, heads="group")(model) as run:
        logits = model(tiny.tokens(1, 20)).logits[:, -1]
        for _ in range(4):
            logits = model(logits.argmax(-1)[:, None], past_key_values=run.cache).logits[:, -1]
            reads.append(run.read_bytes())
            assert run.stored_bytes() == run.full_bytes() == (20 + len(reads)) * bytes_of
    layer = bytes_of // 6
    sparse = [3 * layer * (20 + n) + 3 * layer * 6 for n in range(1, 5)]
    assert reads == [sparse[0], sparse[1] + 22 * bytes_of, sparse[2], sparse[3] + 24 * bytes_of]


def test_reading_again_gives_the_logits_of_a_dense_pass_twice():
    model, rows = tiny.model("qwen3", **SIX), [tiny.tokens(30), tiny.tokens(17, seed=1)]
    with tidal(4)(model) as run:
        turn = tiny.generate(model, run, rows, new=6)
        first, again = run.reread(5), run.reread(5)
    assert torch.equal(first, again)
    for row, prompt in enumerate(rows):
        text = torch.cat([prompt, turn.tokens[row, :-1]])[None]
        torch.testing.assert_close(first[row : row + 1], model(text).logits[:, -5:], rtol=1e-9, atol=1e-9)


def test_budgets_and_counts_survive():
    model = tiny.model("llama-gqa", **SIX)
    with tidal(0.25)(model) as run:
        tiny.generate(model, run, [tiny.tokens(30)], new=6)
        before = run.cache.seen, run.cache.steps, run.cache.tokens.tolist(), run.cache.prompt_tokens.tolist()
        notes, ends = dict(run.cache.notes), run.cache.ends
        run.reread(3)
        assert (run.cache.seen, run.cache.steps, run.cache.tokens.tolist(), run.cache.prompt_tokens.tolist()) == before
        assert run.cache.notes.keys() == notes.keys() and run.cache.ends is ends and int(ends) == 35
        properties.well_formed(run)


def test_a_pass_in_the_middle_of_finishing_does_not_finish():
    calls = []

    class Again(kvlib.METHODS["tidaldecode"]):
        def finish(self, run):
            calls.append(run.step.index)
            if run.step.decoding:
                run.reread(1)

    tiny.once(tiny.model("llama-gqa", **SIX), Again(4, selection_layers=(1, 3)), [tiny.tokens(20)], new=4)
    assert calls == [0, 1, 2, 3]


def test_what_cannot_be_read_again():
    model, ids = tiny.model("llama-gqa", **SIX), tiny.tokens(1, 20)
    with tidal(4)(model) as run:
        with pytest.raises(RuntimeError, match="no cache yet"):
            run.reread(1)
        logits = model(ids).logits[:, -1]
        tiny.decode(model, run, logits, new=3)
        with pytest.raises(ValueError, match=r"count=\[4\]: since the prompt \[2\] tokens have come"):
            run.reread(4)
        run.reread(2)
        model(inputs_embeds=model.get_input_embeddings()(ids[:, :1]), past_key_values=run.cache)
        with pytest.raises(ValueError, match="embeddings were passed in place of ids"):
            run.reread(1)
    with kvlib.method("h2o", budget=0.5)(model) as run:
        tiny.decode(model, run, model(ids).logits[:, -1], new=3)
        with pytest.raises(ValueError, match="layer 0 does not hold all tokens as they came"):
            run.reread(2)
    with tidal(4, correction=2)(model) as run:
        logits = model(ids).logits[:, -1]
        with run.capture(4) as step, pytest.raises(ValueError, match="layer 0 does not hold all tokens as they came"):
            for _ in range(3):
                logits = step(logits.argmax(-1)[:, None])


@pytest.mark.parametrize("period", [0, -1, 1.5, True])
def test_bad_periods(period):
    with pytest.raises(ValueError, match=f"correction={period}: a number of tokens >= 1, or None"):
        tidal(4, correction=period)


# Checked drafts


@everywhere
@pytest.mark.parametrize("draft", [1, 3, 8])
@pytest.mark.parametrize("budget", [2, 12])
def test_verified_text_is_that_of_full_attention(architecture, draft, budget):
    model, rows = tiny.model(architecture, **SIX), [tiny.tokens(21), tiny.tokens(9, seed=1), tiny.tokens(15, seed=2)]
    full = tiny.generate(model, None, rows, new=14)
    ids, mask = tiny.pad(rows)
    made = kvlib.generate_verified(model, tidal(budget), ids, mask, max_new_tokens=14, draft=draft)
    assert torch.equal(made.ids, full.ids)
    assert made.new.tolist() == [14] * 3
    assert (made.tokens_per_check >= 1).all() and (made.tokens_per_check <= draft).all()
    if draft == 1:
        assert made.checks.tolist() == made.drafted.tolist() == [13] * 3


def test_a_draft_that_reads_everything_is_always_right():
    model, ids = tiny.model("llama-gqa", **SIX), tiny.tokens(2, 20)
    made = kvlib.generate_verified(model, tidal(100, heads="group"), ids, max_new_tokens=13, draft=4)
    assert made.checks.tolist() == [3, 3] and made.drafted.tolist() == [12, 12]
    assert made.tokens_per_check.tolist() == [4, 4]
    per_token = properties.token_bytes(model)
    assert made.dense_bytes == 2 * sum(range(21, 33)) * per_token
    assert made.read_bytes == made.dense_bytes + 2 * (24 + 28 + 32) * per_token


def test_drafts_are_kept_up_to_the_first_that_differs():
    """The number of checks, from drafts that are made anew behind a dense prefill of everything before them."""
    model, method, prompt, new, draft = tiny.model("llama-gqa", **SIX), tidal(3), tiny.tokens(30), 16, 5
    text = tiny.generate(model, None, [prompt], new=new).tokens[0]
    sure, checks = 1, 0  # tokens that are written
    while sure < new:
        steps = min(draft, new - sure)
        with method(model) as run:
            model(torch.cat([prompt, text[: sure - 1]])[None])
            token, right = text[sure - 1 : sure][None], 0
            for place in range(sure, sure + steps):
                token = model(token, past_key_values=run.cache).logits[:, -1].argmax(-1)[:, None]
                if int(token) != int(text[place]):
                    break
                right += 1
        sure, checks = sure + min(right + 1, steps), checks + 1
    made = kvlib.generate_verified(model, method, prompt[None], max_new_tokens=new, draft=draft)
    assert int(made.checks) == checks and 4 < checks < new - 1
    assert torch.equal(made.ids[0, 30:], text)


def test_rows_end_at_their_end_tokens():
    model, rows = tiny.build("llama-gqa", **SIX), [tiny.tokens(21), tiny.tokens(9, seed=1), tiny.tokens(15, seed=2)]
    ids, mask = tiny.pad(rows)
    free = tiny.generate(model, None, rows, new=12).tokens
    model.generation_config.eos_token_id = [int(free[0, 4]), int(free[1, 7])]
    full = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    made = kvlib.generate_verified(model, tidal(3), ids, mask, max_new_tokens=12, draft=3)
    assert torch.equal(made.ids, full)
    assert int(made.new.min()) < 12 and made.new.tolist() == [
        next((n + 1 for n, t in enumerate(row) if t in model.generation_config.eos_token_id), 12)
        for row in free.tolist()
    ]


def test_what_cannot_be_verified():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 8)
    with pytest.raises(ValueError, match="is not a reader: what it evicts cannot be checked"):
        kvlib.generate_verified(model, kvlib.method("h2o", budget=0.5), ids, max_new_tokens=4)
    for name in ("max_new_tokens", "draft"):
        with pytest.raises(ValueError, match=f"{name}=0: at least 1"):
            kvlib.generate_verified(model, tidal(2, selection_layers=(0,)), ids, **{"max_new_tokens": 4, name: 0})
