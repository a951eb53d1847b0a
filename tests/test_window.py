"""What a model's window limits: the text or, for methods that renumber, what is stored; caches that a model drops."""

import pytest
import tiny
import torch
from properties import frequencies, masked_logits
from transformers import Phi3Config, Phi3ForCausalLM

import kvlib

STREAMING = kvlib.method("streaming_llm", budget=40)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def visible(length: int, passes: list[tuple[int, list[int]]]) -> torch.Tensor:
    """Who sees whom: from each of these positions on a query sees these tokens and all since, `(1, length, length)`."""
    seen = torch.ones(length, length).tril().bool()
    for start, kept in passes:
        seen[start:, :start] = False
        seen[start:, kept] = True
    return seen[None].expand(2, -1, -1)


def test_a_turn_may_bring_the_text_past_the_window():
    """40 of 240 tokens stored and 100 new ones are 140 to be read: fewer than the window of 256."""
    model, first, second = tiny.model("llama-gqa"), tiny.tokens(1, 240), tiny.tokens(1, 100, seed=1)
    with STREAMING(model) as run:
        model(first)
        logits = model(second, past_key_values=run.cache).logits
        assert not run.streamed
    seen = visible(340, [(240, [*range(4), *range(204, 240)])])
    want = masked_logits(model, torch.cat([first, second], dim=1), [seen, seen], frequencies(model, STREAMING))
    torch.testing.assert_close(logits, want[:, 240:], rtol=0, atol=1e-10)
    with STREAMING(model) as run:
        run.read(input_ids=first)
        made = run.ask(second, **GREEDY)
    assert made[0, 100] == want[0, -1].argmax()


@pytest.mark.parametrize(
    "method", [kvlib.method("knorm", budget=40), kvlib.method("streaming_llm", budget=40, renumber=False)]
)
def test_other_methods_are_limited_by_the_text(method):
    model = tiny.model("llama-gqa")
    with method(model) as run:
        model(tiny.tokens(1, 240))
        with pytest.raises(ValueError, match="the prompt has 340 tokens, the model's window is 256"):
            model(tiny.tokens(1, 100), past_key_values=run.cache)
        assert run.cache.seen == 240


READ = {
    "generate": lambda model, run, ids, chunk: model.generate(ids, prefill_chunk_size=chunk, max_new_tokens=1),
    "read": lambda model, run, ids, chunk: run.read(input_ids=ids, prefill_chunk_size=chunk),
    "more": lambda model, run, ids, chunk: [
        run.read(input_ids=part, more=i < (ids.shape[1] - 1) // chunk) for i, part in enumerate(ids.split(chunk, dim=1))
    ],
}


@pytest.mark.parametrize("way", READ)
def test_a_prompt_longer_than_the_window_is_compressed_between_its_chunks(way):
    """A chunk of 60 fits with 180 tokens and not with 240: at 240 and, from 40 on, after every third chunk."""
    model, ids, token = tiny.model("llama-gqa"), tiny.tokens(1, 600), tiny.tokens(1, 1, seed=1)
    with STREAMING(model) as run:
        READ[way](model, run, ids, 60)
        assert run.streamed and run.kept(0).tolist() == [[[*range(4), *range(564, 600)]] * 2]
        assert run.cache.prompt_tokens.tolist() == [600]
        logits = model(token, past_key_values=run.cache).logits
        READ[way](model, run, ids[:, :200], 60)
        assert not run.streamed
    cuts = [240, 420]  # 40 and 180 are stored after 420, and another 60 would not fit
    passes = [(cut, [*range(4), *range(cut - 36, cut)]) for cut in [*cuts, 600]]
    seen = visible(601, passes)
    wide = tiny.model("llama-gqa", max_position_embeddings=1024)
    want = masked_logits(wide, torch.cat([ids, token], dim=1), [seen, seen], frequencies(model, STREAMING))
    torch.testing.assert_close(logits, want[:, -1:], rtol=0, atol=1e-10)


def test_padded_rows_are_compressed_together():
    model, rows = tiny.model("llama-gqa"), [tiny.tokens(400), tiny.tokens(390, seed=1)]
    ids, mask = tiny.pad(rows)
    with STREAMING(model) as run:
        run.read(input_ids=ids, attention_mask=mask, prefill_chunk_size=50)
        assert run.streamed
        for row, length in enumerate((400, 390)):
            assert run.kept(1)[row].tolist() == [[*range(4), *range(length - 36, length)]] * 2


def test_below_the_window_chunks_change_nothing():
    model, method, ids = tiny.model("llama-gqa"), kvlib.method("streaming_llm", budget=0.2), tiny.tokens(1, 256)
    kept = []
    for arguments in ({}, {"prefill_chunk_size": 50}):
        with method(model) as run:
            run.read(input_ids=ids, **arguments)
            kept.append((tiny.kept(run), run.ask(ids[:, :9], **GREEDY).tolist(), run.streamed))
    assert kept[0] == kept[1] and not kept[0][2]


def test_what_does_not_fit_even_so():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 400)
    with STREAMING(model) as run:
        for arguments, numbers in (
            ({}, "400 new tokens and 0"),
            ({"prefill_chunk_size": 220}, "180 new tokens and 220"),
        ):
            if not arguments:
                with pytest.raises(
                    ValueError, match=f"{numbers} that are stored exceed the model's window of 256: read"
                ):
                    run.read(input_ids=ids)
            else:
                run.read(input_ids=ids, **arguments)  # 180 and the 40 that are left
        with pytest.raises(
            ValueError, match="230 new tokens and 40 that are stored exceed .* or ask a shorter question"
        ):
            run.ask(ids[:, :230], **GREEDY)
        if tiny.CHUNKS_CONTINUE:  # of a question nothing gives way to its end
            with pytest.raises(ValueError, match="30 new tokens and 240 that are stored exceed"):
                run.ask(ids[:, :230], prefill_chunk_size=100, **GREEDY)
        run.ask(ids[:, :200], **GREEDY)
    with (
        kvlib.method("streaming_llm", budget=0.9)(model) as run,
        pytest.raises(ValueError, match="100 new tokens and 180 that are stored exceed the model's window"),
    ):
        run.read(input_ids=ids, prefill_chunk_size=100)


# A model that drops its cache in the middle of `generate`


def phi3():
    """Longrope: beyond 32 tokens all keys are turned by other angles, so that the model reads everything anew."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=32, initializer_range=0.3,
        rope_parameters={**rope, "factor": 8.0, "original_max_position_embeddings": 32},
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Phi3ForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    "method",
    [
        kvlib.method("full"),
        kvlib.method("snapkv", budget=0.5, window=4),
        kvlib.method("h2o", budget=0.5),
        kvlib.method("tova", budget=12),
    ],
    ids=lambda m: m.name,
)
def test_a_cache_that_the_model_drops_is_read_again(method):
    """With 28 tokens the switch comes with the 33rd; from there on all is as if these had been the prompt."""
    model, ids, passes = phi3(), tiny.tokens(1, 28), []
    hook = model.register_forward_pre_hook(lambda *x: passes.append(x[2]["input_ids"].shape[1]), with_kwargs=True)
    with method(model) as run:
        made = model.generate(ids, max_new_tokens=10, do_sample=False)
        kept, sizes = tiny.kept(run), (run.stored_bytes(), run.full_bytes())
    assert passes == [28, 1, 1, 1, 1, 33, 1, 1, 1, 1]
    hook.remove()
    with method(model) as run:
        tokens, expected = tiny.decode(model, run, model(made[:, :33]).logits[:, -1], new=5)
        assert (kept, sizes) == (expected, (run.stored_bytes(), run.full_bytes()))
    assert made[:, 33:].tolist() == tokens.tolist()
    if method.name == "full":
        assert made.tolist() == model.generate(ids, max_new_tokens=10, do_sample=False).tolist()
    with method(model) as run:
        assert torch.equal(model.generate(ids[:, :20], max_new_tokens=4, do_sample=False)[:, :20], ids[:, :20])
        assert run.cache.prompt_tokens.tolist() == [20]


def test_questions_that_turn_the_document_s_keys_anew_are_refused():
    model, ids = phi3(), tiny.tokens(1, 40)
    message = "the model turns all keys anew beyond 32 tokens"
    with kvlib.method("full")(model) as run:
        run.read(input_ids=ids[:, :20])
        made = run.ask(ids[:, 20:28], max_new_tokens=4, do_sample=False)
        assert made.tolist() == model.generate(ids[:, :28], max_new_tokens=4, do_sample=False)[:, 20:].tolist()
        for length, new in ((33, 1), (28, 8)):  # with the question, with its answer
            with pytest.raises(ValueError, match=message):
                run.ask(ids[:, 20:length], max_new_tokens=new, do_sample=False)
        run.read(input_ids=ids[:, :34])
        made = run.ask(ids[:, 34:], **GREEDY)
    assert made.tolist() == model.generate(ids, **GREEDY)[:, 34:].tolist()
