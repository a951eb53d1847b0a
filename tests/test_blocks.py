"""Several blocks on one model, threads, copies: right tokens or one clear error, and in the end a stock model."""

import copy
import pickle
import threading
from contextlib import ExitStack

import pytest
import tiny
import torch
from test_run import attributes
from transformers import TextIteratorStreamer

import kvlib

KNORM, H2O = kvlib.method("knorm", budget=0.5), kvlib.method("h2o", budget=0.5)
IDS = tiny.tokens(1, 20)
GREEDY = {"max_new_tokens": 4, "do_sample": False}
ANOTHER = "this call comes out of the block of KNorm.*, but that of H2O.* was opened later on the same model"


@pytest.fixture
def model():
    """A stock model, before and after."""
    model = tiny.build("llama-gqa", attn_implementation="eager")
    before, tokens = attributes(model), model.generate(IDS, **GREEDY)
    yield model
    assert attributes(model) == before
    assert torch.equal(model.generate(IDS, **GREEDY), tokens)


def text(model, method):
    with method(model):
        return model.generate(IDS, **GREEDY).tolist()


def conversation(model, method):
    """A generator that holds a block open between its turns."""
    with ExitStack() as several:
        run = several.enter_context(method(model))
        while True:
            yield model.generate(IDS, **GREEDY).tolist(), run


def test_generators_that_take_turns(model):
    expected = {method: text(model, method) for method in (KNORM, H2O)}
    assert expected[KNORM] != expected[H2O]
    first, second = conversation(model, KNORM), conversation(model, H2O)
    assert next(first)[0] == expected[KNORM]
    assert next(second)[0] == expected[H2O]
    with pytest.raises(RuntimeError, match=ANOTHER):
        next(first)
    assert next(second)[0] == expected[H2O]  # the first block has closed below it
    second.close()


def plain_conversation(model, method):
    with method(model) as run:
        model(IDS)
        while True:
            yield run
            model(IDS[:, :1], past_key_values=run.cache)


def test_passes_of_generators_that_take_turns(model):
    # Of equal methods: neither the cache nor anything else but the caller tells one block from the other.
    first, second = plain_conversation(model, KNORM), plain_conversation(model, KNORM)
    runs = next(first), next(second)
    with pytest.raises(RuntimeError, match="this call comes out of the block of KNorm"):
        next(first)
    next(second)
    assert [run.cache.seen for run in runs] == [20, 21]
    second.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_that_do_not_interleave_calls_close_in_any_order(model, order):
    generators = [conversation(model, KNORM), conversation(model, H2O)]
    for generator in generators:
        next(generator)
    for which in order:
        generators[which].close()


def test_blocks_that_close_out_of_order(model):
    expected = {method: text(model, method) for method in (KNORM, H2O)}
    outer, inner = KNORM(model), H2O(model)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert not outer.active and inner.active
    assert model.generate(IDS, **GREEDY).tolist() == expected[H2O]
    third = KNORM(model)
    with third:
        inner.__exit__(None, None, None)
        assert model.generate(IDS, **GREEDY).tolist() == expected[KNORM]
        with pytest.raises(RuntimeError, match="inside the latest one"), H2O(model):
            third.read(input_ids=IDS)


def test_blocks_that_helpers_have_opened_are_nested_as_ever(model):
    def opened(method):
        run = method(model)
        run.__enter__()
        return run

    expected = text(model, H2O)
    outer, inner = opened(KNORM), opened(H2O)
    assert model.generate(IDS, **GREEDY).tolist() == expected
    for run in (inner, outer):
        run.__exit__(None, None, None)


def in_thread(function):
    """What a function raises in a thread of its own."""
    raised = []

    def work():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return str(raised[0]) if raised else None


def test_two_threads_with_a_block_each(model):
    def other():
        with H2O(model):
            model.generate(IDS, **GREEDY)

    expected = text(model, KNORM)
    with KNORM(model):
        assert "another thread has a block open on this model" in in_thread(other)
        assert model.generate(IDS, **GREEDY).tolist() == expected
    assert in_thread(other) is None


@pytest.mark.parametrize("bare", [True, False], ids=["pass", "generate"])
def test_two_threads_in_one_block(model, bare):
    found = []
    calls = [lambda: model(IDS), lambda: model.generate(IDS, **GREEDY), lambda: H2O(model).__enter__()]

    def meanwhile(*_):
        hook.remove()
        found.extend(map(in_thread, calls))

    expected = text(model, KNORM)
    with KNORM(model) as run:
        hook = model.model.layers[1].register_forward_pre_hook(meanwhile)
        made = model(IDS).logits.argmax(-1)[:, -1:].tolist() if bare else model.generate(IDS, **GREEDY).tolist()
        assert made == ([row[20:21] for row in expected] if bare else expected)
        assert all("another thread" in message for message in found) and len(found) == 3
        assert in_thread(calls[1]) is None  # one after the other they may
        assert run.cache.seen == 23


class Calling:
    """A streamer that calls something between two passes."""

    def __init__(self, function):
        self.function = function

    def put(self, value):
        self.function(value)

    def end(self):
        """Nothing to do."""


def test_two_threads_in_one_block_between_passes(model):
    found = []
    calls = [lambda: model(IDS), lambda: model.generate(IDS, **GREEDY), lambda: H2O(model).__enter__()]
    with KNORM(model) as run:
        model.generate(IDS, streamer=Calling(lambda _: found.extend(map(in_thread, calls))), **GREEDY)
        assert run.cache.seen == 23
    assert len(found) == 5 * 3 and all("another thread" in message for message in found)


def test_no_block_opens_while_another_thread_generates(model):
    expected, made, refused = text(model, KNORM), [], []

    def meanwhile(_):
        reached.set()
        tried.wait()

    reached, tried, streamer = threading.Event(), threading.Event(), Calling(meanwhile)
    with KNORM(model):
        thread = threading.Thread(target=lambda: made.append(model.generate(IDS, streamer=streamer, **GREEDY)))
        thread.start()
        reached.wait()
        try:
            with H2O(model):
                """It does not come so far."""
        except RuntimeError as error:
            refused.append(str(error))
        tried.set()
        thread.join()
    assert "another thread" in refused[0] and made[0].tolist() == expected


class Text:
    """A tokenizer for streamers."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_a_streamer_read_in_its_block(model):
    expected = text(model, KNORM)
    streamer = TextIteratorStreamer(Text())
    with KNORM(model):
        thread = threading.Thread(target=model.generate, args=(IDS,), kwargs={"streamer": streamer, **GREEDY})
        thread.start()
        assert "".join(streamer).split() == [str(i) for i in expected[0]]
        thread.join()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_streamer_read_after_its_block(model, after):
    """It stops between two passes: before the first, after the prompt, after a token."""
    reached, closed, calls, raised = threading.Event(), threading.Event(), [], []

    def wait(value):
        calls.append(value)
        if len(calls) == after + 1:
            reached.set()
            closed.wait()

    def work(generate):
        try:
            generate(IDS, streamer=Calling(wait), **GREEDY)
        except Exception as error:
            raised.append(str(error))

    with KNORM(model):
        thread = threading.Thread(target=work, args=(model.generate,))
        thread.start()
        reached.wait()
        generate = model.generate
    closed.set()
    thread.join()
    assert len(raised) == 1 and "block" in raised[0] and "streamer" in raised[0]
    with pytest.raises(RuntimeError, match="this block has been closed"):
        generate(IDS, **GREEDY)


def test_a_block_closes_after_the_pass_that_is_going_on(model):
    reached, made = threading.Event(), []
    closing = threading.Event()

    def meanwhile(*_):
        reached.set()
        assert not closing.wait(0.2)  # it waits

    with KNORM(model) as run:
        expected = model(IDS).logits
        hook = model.model.layers[1].register_forward_pre_hook(meanwhile)
        thread = threading.Thread(target=lambda: made.append(model(IDS).logits))
        thread.start()
        reached.wait()
    closing.set()
    thread.join()
    hook.remove()
    assert torch.equal(made[0], expected) and run.cache.seen == 20


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_a_model_copied_inside_a_block(model, copied):
    with KNORM(model), pytest.raises(TypeError, match="a model cannot be copied or pickled inside a `with method"):
        copied(model)
    assert torch.equal(copy.deepcopy(model).generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
