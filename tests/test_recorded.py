"""What is recorded of a layer's steps and replayed is what eager steps do.

Without a GPU the graph is `Replayed`: it notes torch's operations with the very tensors they had, and repeats them on
the same memory. So it does what a CUDA graph does, and python's numbers stay what they were when it was recorded.
"""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvlib
from kvlib import kernels
from kvlib.core import recorded
from kvlib.core.method import METHODS

STEADY = [
    kvlib.method("streaming_llm", budget=0.4),
    kvlib.method("streaming_llm", budget=10, renumber=False),
    kvlib.method("h2o", budget=0.4),
    kvlib.method("scissorhands", budget=14),
    kvlib.method("tova", budget=0.4),
    kvlib.method("forced_sinks", budget=0.4, host="h2o", sinks=3),
    kvlib.method("vatp", budget=0.4, host="h2o", sinks=2),
    kvlib.method("exact_error", budget=0.4, host="h2o"),
    kvlib.method("output_norm", budget=0.4, host="scissorhands"),
]
IDLE = [  # they leave decoded tokens alone
    kvlib.method("snapkv", budget=0.4, window=4),
    kvlib.method("pyramidkv", budget=0.5, window=4, beta=4),
    kvlib.method("knorm", budget=0.4),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Replayed(TorchDispatchMode):
    """Inside the block operations are noted, and in the end what they have written is as before, as if none had run.

    `replay()` repeats them; what they return goes where it went.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        for argument, x in zip(function._schema.arguments, arguments):
            if argument.is_write:
                self.note(x)
        given = places((arguments, options))
        result = function(*arguments, **(options or {}))
        new = [place not in given for place in places(result)]
        self.made |= set(places(result)) - set(given)
        self.calls.append((function, arguments, options or {}, result, new))
        return result

    def note(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.made:
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self):
        for function, arguments, options, result, new in self.calls:
            again = function(*arguments, **options)
            for x, y, fresh in zip(tensors(result), tensors(again), new, strict=True):
                if fresh:
                    x.copy_(y)


def tensors(x) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(x) if torch.is_tensor(leaf)]


def places(x) -> list[int]:
    return [leaf.untyped_storage().data_ptr() for leaf in tensors(x)]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded, without a GPU; kernels are left to torch, whose operations can be noted."""
    made = []

    def record(work, device, first):
        with Replayed() as graph:
            output = work()
        made.append(graph)
        return graph, output

    if not torch.cuda.is_available():
        monkeypatch.setattr(recorded, "record", record)
        monkeypatch.setattr(recorded, "DEVICES", {"cpu"})
        monkeypatch.setattr(kernels, "decoding", False)
    return made


@torch.no_grad()
def decoded(model, method, steps=24, ids=None, mask=None):
    """Logits of each step, positions kept, and the run, which is closed."""
    ids = tiny.tokens(2, 30) if ids is None else ids
    device = model.device
    mask = None if mask is None else mask.to(device)
    with method(model) as run:
        token, made = model(ids.to(device), mask).logits[:, -1:].argmax(-1), []
        for _ in range(steps):
            made.append(model(token, past_key_values=run.cache).logits[:, -1])
            token = made[-1].argmax(-1, keepdim=True)
        return torch.stack(made), tiny.kept(run), run


@contextmanager
def unrecorded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "replays", lambda *_: False)
        patch.setattr(recorded, "extends", lambda *_: False)
        yield


def eagerly(model, method, **options):
    with unrecorded():
        return decoded(model, method, **options)


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if DEVICE == "cpu" else 1e-4)


def same_reports(run, other):
    for report in ("stored_bytes", "allocated_bytes", "full_bytes", "read_bytes"):
        assert getattr(run, report)() == getattr(other, report)()


def recordings(run) -> list:
    return [layer.tail.recorded for layer in run.cache.layers]


def label(method):
    return f"{method.name}-{method.budget}"


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("method", STEADY, ids=label)
def test_what_is_replayed_is_what_eager_steps_do(method, architecture, graphs):
    model = tiny.build(architecture, torch.float64 if DEVICE == "cpu" else torch.float32).to(DEVICE)
    logits, kept, run = eagerly(model, method)
    assert recordings(run) == [None] * len(run.cache.layers)
    again, kept_again, run_again = decoded(model, method)
    assert all(recordings(run_again)) and len(graphs) in (0, len(run.cache.layers))
    assert kept_again == kept
    agree(again, logits)
    same_reports(run_again, run)


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("method", IDLE, ids=label)
def test_tokens_that_stay_are_replayed_from_room_to_room(method, architecture, graphs):
    model = tiny.build(architecture, torch.float64 if DEVICE == "cpu" else torch.float32).to(DEVICE)
    rooms = [1, 4, 16, 64, 64]
    for steps, times in ((sum(rooms[:3]), 0), (sum(rooms[:3]) + 1, 1), (sum(rooms[:4]), 1), (sum(rooms[:4]) + 20, 2)):
        graphs.clear()
        logits, kept, run = eagerly(model, method, steps=steps)
        assert not any(recordings(run))
        again, kept_again, run_again = decoded(model, method, steps=steps)
        layers = len(run.cache.layers)
        assert [x is not None for x in recordings(run_again)] == [times > 0] * layers
        assert len(graphs) == (times * layers if DEVICE == "cpu" else 0)
        assert kept_again == kept
        agree(again, logits)
        same_reports(run_again, run)


def test_rows_that_were_padded_are_replayed_where_they_hold_as_much(graphs):
    model = tiny.build("llama-gqa", torch.float64 if DEVICE == "cpu" else torch.float32).to(DEVICE)
    ids, mask = tiny.pad([tiny.tokens(30), tiny.tokens(20, seed=1)])
    method, options = kvlib.method("snapkv", budget=12, window=4), {"steps": 40, "ids": ids, "mask": mask}
    logits, kept, run = eagerly(model, method, **options)
    again, kept_again, run_again = decoded(model, method, **options)
    assert all(recordings(run_again)) and kept_again == kept
    agree(again, logits)
    same_reports(run_again, run)


@pytest.mark.parametrize("method", [kvlib.method("full"), kvlib.method("snapkv", budget=1.0)], ids=label)
def test_a_cache_that_holds_everything_is_left_to_sdpa(method, graphs):
    assert not any(recordings(decoded(tiny.build("llama-gqa").to(DEVICE), method, steps=30)[2]))


@pytest.mark.parametrize("method", IDLE, ids=label)
def test_a_step_that_is_not_replayed_is_seen_by_later_ones(method, graphs):
    model = tiny.build("llama-gqa", torch.float64).to(DEVICE).requires_grad_(False)
    ids = tiny.tokens(2, 30).to(DEVICE)

    def said() -> torch.Tensor:
        with method(model) as run:
            made, token = [], tiny.tokens(2, 1).to(DEVICE)
            for step in range(60):
                with torch.set_grad_enabled(step == 30):
                    made.append(
                        model(token if step else ids, past_key_values=run.cache if step else None).logits[:, -1]
                    )
                if step == 29:
                    before = recordings(run)
            assert run.cache.layers[0].tail.ends.tolist() == run.cache.layers[0].lengths.tolist()
        return torch.stack(made).detach(), before

    with unrecorded():
        expected, none = said()
    found, some = said()
    assert all(some) and not any(none)
    agree(found, expected)


def test_caches_that_decode_in_turn(graphs):
    """Graphs of all caches work in the same memory."""
    model = tiny.build("llama-gqa").to(DEVICE)
    methods = (
        kvlib.method("h2o", budget=0.4),
        kvlib.method("vatp", budget=0.3, sinks=2),
        IDLE[0],
        kvlib.method("tova", budget=9),
    )

    @torch.no_grad()
    def said():
        caches, tokens = [None] * len(methods), [tiny.tokens(2, 30).to(DEVICE)] * len(methods)
        made = [[] for _ in methods]
        for _ in range(40):
            for i, method in enumerate(methods):
                with method(model) as run:
                    output = model(tokens[i], past_key_values=caches[i], use_cache=True)
                caches[i], tokens[i] = output.past_key_values, output.logits[:, -1:].argmax(-1)
                made[i].append(output.logits[:, -1].clone())
                there = all(layer.tail.recorded is not None for layer in run.cache.layers)
        return torch.stack([torch.stack(x) for x in made]), there

    with unrecorded():
        expected, none = said()
    found, some = said()
    assert some and not none
    agree(found, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", [STEADY[0], IDLE[0]], ids=lambda m: m.name)
def test_caches_that_come_and_go_take_no_more_memory(method):
    model, reserved = tiny.build("llama-gqa").to(DEVICE), []
    for _ in range(6):
        assert all(x is not None for x in recordings(decoded(model, method, steps=60)[2]))
        gc.collect()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[-1]


def test_nothing_is_recorded_beside_threads_that_could_wait_for_the_device(graphs):
    model, over = tiny.build("llama-gqa").to(DEVICE), threading.Event()
    methods = kvlib.method("h2o", budget=0.4), kvlib.method("snapkv", budget=0.4, window=4)

    def work():
        while not over.wait(1e-4):
            if DEVICE == "cuda":
                torch.cuda.synchronize()

    for method in methods:
        kept = eagerly(model, method, steps=30)[1]
        with ThreadPoolExecutor(1) as threads:
            run_there, kept_there = threads.submit(decoded, model, method, steps=30).result()[:0:-1]
        assert not any(recordings(run_there)) and kept_there == kept
        for daemon, recorded_too in ((True, DEVICE == "cpu"), (False, False)):
            if DEVICE == "cuda" and daemon:
                continue  # it would be refused to wait, which is what a daemon is trusted not to do
            over.clear()
            thread = threading.Thread(target=work, daemon=daemon)
            thread.start()
            try:
                kept_beside, run_beside = decoded(model, method, steps=30)[1:]
            finally:
                over.set()
                thread.join()
            assert all(x is not None for x in recordings(run_beside)) == recorded_too and kept_beside == kept


def test_every_method_that_says_so_is_tried():
    assert recorded.STEADY == {type(method) for method in STEADY} <= {*METHODS.values()}


def test_a_subclass_has_to_say_it_for_itself(graphs):
    asked = []

    class Asking(type(kvlib.method("h2o"))):
        def score(self, view):
            asked.append(view.layer_idx)
            return super().score(view)

    run = decoded(tiny.build("llama-gqa").to(DEVICE), Asking(budget=0.4), steps=9)[2]
    assert not any(recordings(run)) and asked == 10 * list(range(len(run.cache.layers)))


def test_nothing_is_recorded_before_a_token_goes_for_each_that_comes(graphs):
    model = tiny.build("llama-gqa").to(DEVICE)
    for steps, found in ((12 + recorded.WARM, False), (13 + recorded.WARM, True)):
        run = decoded(model, kvlib.method("tova", budget=30 + 12), steps=steps)[2]
        assert [x is not None for x in recordings(run)] == [found] * len(run.cache.layers)
    padded, mask = tiny.pad([tiny.tokens(30), tiny.tokens(20, seed=1)])
    with kvlib.method("tova", budget=0.4)(model) as run, torch.no_grad():  # segments of different lengths
        token = model(padded.to(DEVICE), mask.to(DEVICE)).logits[:, -1:].argmax(-1)
        for _ in range(9):
            model(token, past_key_values=run.cache)
        assert not any(recordings(run))


def go_on(model, method, cache) -> list:
    """What is kept and said in another block: steps, with rows in another order, after a second turn, of one row."""
    found, token = [], tiny.tokens(2, 1).to(DEVICE)
    changes = [
        lambda: None,
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: model(tiny.tokens(2, 5, seed=3).to(DEVICE), past_key_values=cache),
        lambda: cache.batch_select_indices(torch.tensor([1])),
    ]
    with method(model) as run, torch.no_grad():
        for change in changes:
            change()
            for _ in range(7):
                logits = model(token[: len(cache.tokens)], past_key_values=cache).logits
                found.append((tiny.kept(run), logits))
    return found


@pytest.mark.parametrize("method", [*STEADY, *IDLE], ids=label)
def test_what_is_recorded_ends_when_memory_moves(method, graphs):
    model, steps = tiny.build("llama-gqa", torch.float64).to(DEVICE), 30 if method in IDLE else 12
    cache = decoded(model, method, steps=steps)[2].cache
    assert all(layer.tail.recorded for layer in cache.layers)
    twin, thawed = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    assert not any(layer.tail.recorded for layer in (*twin.layers, *thawed.layers))
    found = [go_on(model, method, x) for x in (cache, twin, thawed)]
    with unrecorded():
        expected = go_on(model, method, decoded(model, method, steps=steps)[2].cache)
    for each in found:
        for (kept, logits), (kept_again, logits_again) in zip(expected, each, strict=True):
            assert kept_again == kept
            agree(logits_again, logits)


@pytest.mark.parametrize("name", ["streaming_llm", "vatp"])
def test_a_layer_needs_no_other_to_be_replayed(name, graphs):
    model, method = tiny.build("llama-gqa").to(DEVICE), kvlib.method(name, budget=0.4)
    logits, kept = eagerly(model, method, steps=18)[:2]
    with method(model) as run, torch.no_grad():
        token = model(tiny.tokens(2, 30).to(DEVICE)).logits[:, -1:].argmax(-1)
        for step in range(18):
            if step in (8, 14):  # one layer is left to python for a while, then the other
                tail = run.cache.layers[step == 14].tail
                tail.still, tail.recorded = 0, None
            output = model(token, past_key_values=run.cache).logits[:, -1]
            agree(output, logits[step])
            token = output.argmax(-1, keepdim=True)
        assert tiny.kept(run) == kept


def test_another_block_prepares_anew_and_so_records_anew(graphs):
    model, method = tiny.build("llama-gqa").to(DEVICE), kvlib.method("streaming_llm", budget=0.4)
    run = decoded(model, method, steps=9)[2]
    before = recordings(run)
    with method(model) as again, torch.no_grad():
        model(tiny.tokens(2, 1).to(DEVICE), past_key_values=run.cache)
        after = recordings(again)
        assert all(one.others[2] is again.prepared and one is not other for one, other in zip(after, before))
        model(tiny.tokens(2, 1).to(DEVICE), past_key_values=run.cache)
        assert all(one is other for one, other in zip(recordings(again), after))


def test_memory_of_another_form_ends_what_is_recorded(graphs):
    run = decoded(tiny.build("llama-gqa").to(DEVICE), kvlib.method("h2o", budget=0.4), steps=9)[2]
    tail = run.cache.layers[0].tail
    rectangle = tail.rectangle(tail.state["attention"])
    tail.put(tail.state, "attention", rectangle)
    assert tail.recorded is not None
    tail.put(tail.state, "attention", rectangle.half())
    assert tail.recorded is None and tail.still == 0


def test_gradients_and_captured_steps_are_not_recorded(graphs):
    model, method = tiny.build("llama-gqa").to(DEVICE), kvlib.method("h2o", budget=0.4)
    with method(model) as run:
        token = model(tiny.tokens(2, 30).to(DEVICE)).logits[:, -1:].argmax(-1)
        for _ in range(8):
            model(token, past_key_values=run.cache)
        assert not any(recordings(run))
    with method(model) as run, torch.no_grad():
        model(tiny.tokens(2, 30).to(DEVICE))
        with run.capture(9) as step:
            for _ in range(9):
                step(token)
        assert not any(recordings(run))


@pytest.mark.parametrize("method", [STEADY[2], IDLE[0]], ids=label)
def test_dropout_is_not_recorded(method, graphs):
    model = tiny.build("llama-gqa", attention_dropout=0.5).train().to(DEVICE)
    assert not any(recordings(decoded(model, method, steps=30)[2]))


def test_what_is_recorded_counts_as_held(graphs):
    run = decoded(tiny.build("llama-gqa").to(DEVICE), kvlib.method("h2o", budget=0.4), steps=9)[2]
    for layer in run.cache.layers:
        held = {id(x) for x in layer.tensors()}
        assert {id(x) for x in (*layer.tail.recorded.inputs, layer.tail.recorded.output)} <= held
