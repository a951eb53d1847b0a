"""A document is compressed once and asked many questions: each as if it were the first, whoever else is asked."""

from dataclasses import fields

import properties
import pytest
import throwaway
import tiny
import torch
from test_generic import MASKING, METHODS, on, spread

import kvlib
from kvlib.methods.uncomp import UNCompStage

GREEDY = {"do_sample": False, "max_new_tokens": 5}
IN_DECODE = [m for m in METHODS if isinstance(m, kvlib.Evictor) and m.evicts and m.evicts_in_decode]
DOCUMENTS = [tiny.tokens(40), tiny.tokens(33, seed=1)]
QUESTIONS = [tiny.tokens(4, seed=2), tiny.tokens(9, seed=3)]
every = pytest.mark.parametrize("method", [*METHODS, *throwaway.METHODS], ids=repr)


def read(run, rows, chunks=(), extra=0, **arguments):
    """The document of each row, padded, in chunks that end at these columns."""
    ids, mask = tiny.pad(rows, extra)
    ends = [*chunks, ids.shape[1]]
    for start, end in zip([0, *chunks], ends, strict=True):
        more = {} if end == ids.shape[1] else {"more": True}
        run.read(input_ids=ids[:, start:end], attention_mask=mask[:, start:end], **more, **arguments)


def ask(run, rows, extra=0, **arguments):
    """Ids of the answers, and what is stored then."""
    ids, mask = tiny.pad(rows, extra)
    out = run.ask(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY | arguments)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids) and out.past_key_values is run.cache
    return out.sequences[:, ids.shape[1] :].tolist(), tiny.kept(run)


def tensors(thing, found=None) -> list:
    """Every tensor that is reachable from a cache."""
    found = {} if found is None else found
    if id(thing) not in found:
        found[id(thing)] = thing
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
        for part in [*parts, *getattr(thing, "__dict__", {}).values()]:
            tensors(part, found)
    return [x for x in found.values() if torch.is_tensor(x)]


@every
def test_no_question_knows_of_another(method):
    model, answers = tiny.model("llama-gqa"), []
    with method(model) as run:
        read(run, DOCUMENTS)
        assert run.cache is run.document and run.document.copy().method is method  # its tensors are not copied
        before = [x.clone() for x in tensors(run.document)]
        for question in (0, 1, 0):
            answers.append(ask(run, [QUESTIONS[question]] * 2))
            properties.well_formed(run)
            held = tensors(run.document)
            assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
            memory = [
                {x.untyped_storage().data_ptr() for x in tensors(c) if x.numel()} for c in (run.cache, run.document)
            ]
            assert not memory[0] & memory[1]
    for question in (0, 1):
        with method(model) as run:
            read(run, DOCUMENTS)
            assert ask(run, [QUESTIONS[question]] * 2) == answers[question]
    assert answers[0] == answers[2]


@spread("chunks", [(), (10, 11, 30)], [*METHODS, *throwaway.METHODS], each=1)
def test_padding_chunks_and_company_change_nothing(chunks, method):
    model = tiny.model("llama-gqa")
    chunks = () if isinstance(method, UNCompStage) else chunks  # it drops tokens of one pass at a time
    with method(model) as run:
        read(run, DOCUMENTS, chunks, extra=2)
        document = tiny.kept(run)
        made, kept = ask(run, QUESTIONS, extra=3, prefill_chunk_size=4 if chunks and tiny.CHUNKS_CONTINUE else None)
    for row in (0, 1):
        with method(model) as run:
            run.read(input_ids=DOCUMENTS[row][None])
            assert tiny.kept(run) == [document[row]]
            assert ask(run, [QUESTIONS[row]]) == ([made[row]], [kept[row]])


@every
def test_following_reads_a_question_as_asking_does(method):
    """In the document itself: what is decoded then is the answer, and the same is kept."""
    model, answer = tiny.model("llama-gqa"), []
    with method(model) as run:
        read(run, DOCUMENTS)
        made, kept = ask(run, QUESTIONS, extra=3)
        read(run, DOCUMENTS)
        logits = run.follow(*tiny.pad(QUESTIONS, 3)).logits[:, -1]
        assert run.cache is run.document
        with torch.no_grad():
            for _ in range(len(made[0]) - 1):
                answer.append(logits.argmax(-1))
                logits = model(answer[-1][:, None], past_key_values=run.cache).logits[:, -1]
        answer.append(logits.argmax(-1))
        assert torch.stack(answer, dim=1).tolist() == made and tiny.kept(run) == kept
    with pytest.raises(RuntimeError, match="inside the block"):
        run.follow(QUESTIONS[0][None])


@on([kvlib.method("snapkv", budget=0.4, window=4), kvlib.method("h2o", budget=0.4)])
def test_a_document_may_be_read_a_few_columns_at_a_time(method):
    model, kept = tiny.model("llama-gqa"), []
    for arguments in (
        {},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 40},
        {"chunks": (12,), "prefill_chunk_size": 5},
    ):
        passes = []
        hook = model.register_forward_pre_hook(
            lambda *x, seen=passes: seen.append(x[2]["input_ids"].shape[1]), with_kwargs=True
        )
        with method(model) as run:
            read(run, DOCUMENTS, **arguments)
        hook.remove()
        assert max(passes) <= arguments.get("prefill_chunk_size", 40) and sum(passes) == 40
        kept.append(tiny.kept(run))
    assert kept == [kept[0]] * 4


# Right answers


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2},
                                       {"do_sample": True, "num_return_sequences": 3}], ids=str)  # fmt: skip
def test_the_full_cache_answers_like_the_stock_model(architecture, arguments):
    model = tiny.model(architecture)
    (documents, mask), (questions, more) = tiny.pad(DOCUMENTS, 1), tiny.pad(QUESTIONS)
    options = GREEDY | arguments
    torch.manual_seed(0)
    whole, seen = torch.cat([documents, questions], dim=1), torch.cat([mask, more], dim=1)
    # the stock model reads a question's padding as part of the text if it is not told where it is
    stock = model.generate(whole, attention_mask=seen, **options)
    with kvlib.method("full")(model) as run:
        run.read(input_ids=documents, attention_mask=mask)
        torch.manual_seed(0)
        made = run.ask(input_ids=questions, attention_mask=more, **options)
    assert torch.equal(made, stock[:, documents.shape[1] :])
    assert run.stored_bytes() == run.full_bytes()


@spread("architecture", ["llama-gqa", "qwen3"], MASKING, each=1)
def test_answers_are_those_of_a_model_that_does_not_see_what_was_evicted(architecture, method):
    """The oracle is one pass of the stock model under a mask: who asks sees the kept tokens and the text since."""
    model, document, question = tiny.model(architecture), DOCUMENTS[0], QUESTIONS[1]
    with method(model) as run:
        run.read(input_ids=document[None])
        seen = [(len(document), tiny.kept(run)[0])]
        for new in range(1, 5):  # what is stored before the next token is read
            logits = []
            hook = model.register_forward_hook(lambda *x: logits.append(x[2].logits[:, -1]))  # noqa: B023
            made, kept = ask(run, [question], max_new_tokens=new)
            hook.remove()
            seen.append((len(document) + len(question) + new - 1, kept[0]))
    text = torch.cat([document, question, torch.tensor(made[0][:-1])])
    visible = [
        torch.ones(len(text), len(text)).tril().bool().repeat(model.config.num_key_value_heads, 1, 1) for _ in kept[0]
    ]
    for start, sets in seen:
        for layer, heads in zip(visible, sets, strict=True):
            for head, indices in enumerate(heads):
                layer[head, start:, :start] = False
                layer[head, start:, indices] = True
    hidden = properties.masked_logits(model, text[None], visible, properties.frequencies(model, method))
    torch.testing.assert_close(torch.stack(logits, dim=1), hidden[:, -4:], rtol=0, atol=1e-10)
    assert hidden[0, -4:].argmax(-1).tolist() == made[0]


@on(IN_DECODE)
def test_methods_that_evict_while_decoding_return_to_the_document_s_budget(method):
    model, sizes = tiny.model("llama-gqa"), []

    class Watching(type(method)):
        def compress(self, view):
            before = view.layer.lengths.clone()
            super().compress(view)
            if view.layer_idx == 0:
                sizes.append((view.step.question, before.tolist(), view.layer.lengths.tolist()))

    with Watching(**{field.name: getattr(method, field.name) for field in fields(method)})(model) as run:
        read(run, DOCUMENTS)
        (_, _, budget), stored = sizes.pop(), run.stored_bytes()
        read(run, DOCUMENTS)
        sizes.clear()
        ask(run, [QUESTIONS[1]] * 2, prefill_chunk_size=4 if tiny.CHUNKS_CONTINUE else None)
        assert run.stored_bytes() == stored
    plus = [[[n + more for n in row] for row in budget] for more in (len(QUESTIONS[1]), 1)]
    assert sizes == [(True, plus[0], budget)] + [(False, plus[1], budget)] * 4


@on([m for m in METHODS if not m.evicts_in_decode])
def test_other_methods_keep_the_question_and_its_answer(method):
    model = tiny.model("llama-gqa")
    with method(model) as run:
        read(run, DOCUMENTS)
        stored, held = run.stored_bytes(), sum(layer.lengths for layer in run.document.layers)
        ask(run, [QUESTIONS[1]] * 2)
    new = len(QUESTIONS[1]) + 4
    assert torch.equal(sum(layer.lengths for layer in run.cache.layers), held + 2 * new)  # of two layers
    if not method.hooks("encode"):
        assert run.stored_bytes() == stored + 2 * new * properties.token_bytes(model)


@pytest.mark.parametrize("name", ["h2o", "scissorhands"])
def test_what_a_question_looks_at_counts(name):
    """The sets after it are those of attention summed by hand, over the document and over the question's queries."""
    model, method = tiny.model("llama-gqa"), kvlib.method(name, budget=24)
    document, question = DOCUMENTS[0], QUESTIONS[1]
    with method(model) as run:
        run.read(input_ids=document[None])
        before = tiny.kept(run)[0]
        after = ask(run, [question], max_new_tokens=1)[1][0]
    start, end = len(document), len(document) + len(question)
    sums = []

    def watched(module, query, key, value, attention_mask, scaling=None, **arguments):
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        seen = torch.ones(end, end).tril().bool().repeat(2, 1, 1)
        for head, indices in enumerate(before[module.layer_idx]):
            seen[head, start:, :start] = False
            seen[head, start:, indices] = True
        logits = (query @ key.mT * scaling).masked_fill(~seen.repeat_interleave(2, dim=0), -torch.inf)
        weights = logits.softmax(-1)
        share = 1 / 400 if name == "scissorhands" else 1
        total = share * weights[0, :, :start].sum(1) + weights[0, :, start:].sum(1)
        sums.append(total.unflatten(0, (2, 2)).sum(1))
        return (weights @ value).transpose(1, 2), None

    with properties.attending_with(model, watched):
        model(torch.cat([document, question])[None])
    recent = 10 if name == "scissorhands" else 12
    for layer, total in enumerate(sums):
        for head in range(2):
            candidates = [i for i in (*before[layer][head], *range(start, end)) if i < end - recent]
            heavy = sorted(candidates, key=lambda i: -total[head, i].item())[: 24 - recent]
            assert after[layer][head] == [*sorted(heavy), *range(end - recent, end)]


def test_several_questions_about_one_document():
    model, method = tiny.model("llama-gqa"), kvlib.method("h2o", budget=0.4)
    with method(model) as run:
        run.read(input_ids=DOCUMENTS[0][None])
        together = ask(run, [*QUESTIONS, QUESTIONS[0]])
        assert len(run.document.tokens) == 1
        for row, question in enumerate([*QUESTIONS, QUESTIONS[0]]):
            made, kept = ask(run, [question])
            assert (together[0][row], together[1][row]) == (made[0], kept[0])


def test_answers_may_follow_each_other_as_turns():
    """The copy that answered is the latest cache, and goes on like any other; the document stays."""
    model = tiny.model("llama-gqa")
    with kvlib.method("full")(model) as run:
        run.read(input_ids=DOCUMENTS[0][None])
        made = run.ask(QUESTIONS[0][None], **GREEDY)
        whole = torch.cat([DOCUMENTS[0][None], made, QUESTIONS[1][None]], dim=1)
        mask = torch.ones_like(whole)
        again = model.generate(whole, attention_mask=mask, past_key_values=run.cache, **GREEDY)
        assert run.document.seen == len(DOCUMENTS[0])
    assert torch.equal(again, model.generate(whole, attention_mask=mask, **GREEDY))


def test_a_question_of_one_token_is_read_and_not_decoded():
    model = tiny.model("llama-gqa")
    for method in (kvlib.method("full"), kvlib.method("tova", budget=12)):
        with method(model) as run:
            run.read(input_ids=DOCUMENTS[0][None])
            made, _ = ask(run, [QUESTIONS[0][:1]])
            run.read(input_ids=DOCUMENTS[0][None])
            expected = tiny.decode(
                model, run, model(QUESTIONS[0][None, :1], past_key_values=run.cache).logits[:, -1], 5
            )
        assert made == expected[0].tolist()


# What cannot work


def refused(error, message, function, *args, **arguments):
    with pytest.raises(error, match=message):
        function(*args, **arguments)


def test_questions_that_cannot_be_asked():
    model, ids = tiny.model("llama-gqa"), torch.stack([DOCUMENTS[0]] * 2)
    question = QUESTIONS[0][None]
    with kvlib.method("knorm", budget=0.5)(model) as run:
        refused(RuntimeError, "no document to ask about: call `run.read` first", run.ask, question)
        refused(RuntimeError, "nothing to follow: read something first", run.follow, question)
        run.read(input_ids=ids, more=True)
        refused(RuntimeError, "no document .*: call `run.read` without `more` for its end", run.ask, question)
        run.read(input_ids=ids)
        assert run.document.seen == 80
        refused(ValueError, "3 questions about 2 documents: repeat rows", run.ask, question.expand(3, -1))
        refused(ValueError, "a question of no tokens", run.ask, question[:, :0])
        mask = torch.ones(1, 84)
        refused(ValueError, r"attention_mask of shape \(1, 84\): the question has \(1, 4\)", run.ask, question, mask)
        refused(ValueError, "padding after a real token", run.ask, ids[:, :2], torch.tensor([[1, 0]] * 2))
        refused(ValueError, "use_cache=False", run.ask, ids[:, :2], use_cache=False)
        run.ask(ids[:, :3], **GREEDY)
    refused(RuntimeError, "inside the block", run.ask, question)
    refused(RuntimeError, "inside the block", run.read, input_ids=ids)


def test_documents_that_cannot_be_read():
    model, ids = tiny.model("llama-gqa"), torch.stack([DOCUMENTS[0]] * 2)
    with kvlib.method("knorm", budget=0.5)(model) as run:
        run.read(input_ids=ids)
        refused(ValueError, "a document of no tokens", run.read, input_ids=ids[:, :0])
        refused(RuntimeError, "no document", run.ask, ids[:, :3])  # nor is the one before answered about by mistake
        refused(
            ValueError, "prefill_chunk_size=0: a number of columns >= 1", run.read, input_ids=ids, prefill_chunk_size=0
        )
        mask = torch.ones(2, 41)
        refused(
            ValueError, r"shape \(2, 41\): the document has \(2, 40\)", run.read, input_ids=ids, attention_mask=mask
        )
        refused(
            ValueError, "the prompt has 280 tokens, the model's window is 256", run.read, input_ids=ids.repeat(1, 7)
        )


def test_a_model_that_drops_the_document_is_refused():
    model = tiny.build("llama-gqa")
    prepare = type(model).prepare_inputs_for_generation

    def forgetful(ids, past_key_values=None, attention_mask=None, **arguments):
        cache = None if ids.shape[1] > 6 else past_key_values
        return prepare(model, ids, past_key_values=cache, attention_mask=attention_mask, **arguments)

    model.prepare_inputs_for_generation = forgetful
    with kvlib.method("knorm", budget=0.5)(model) as run:
        run.read(input_ids=DOCUMENTS[0][None])
        refused(RuntimeError, "has dropped the document's cache", run.ask, QUESTIONS[0][None], **GREEDY)


def test_embeddings_may_take_the_place_of_a_document_s_ids():
    model, method = tiny.model("llama-gqa"), kvlib.method("h2o", budget=0.5)
    with method(model) as run:
        read(run, DOCUMENTS)
        expected = ask(run, [QUESTIONS[0]] * 2)
        ids, mask = tiny.pad(DOCUMENTS)
        run.read(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
        assert ask(run, [QUESTIONS[0]] * 2) == expected
