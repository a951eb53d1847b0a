"""Steps with static shapes decode what eager steps decode, without waiting for a device and without growing."""

import pytest
import throwaway
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvlib
from kvlib.core.capture import Brought

UNIFORM = [
    kvlib.method("full"),
    kvlib.method("int8"),
    kvlib.method("snapkv", budget=0.4, window=4),
    kvlib.method("pyramidkv", budget=0.4, window=4),
    kvlib.method("knorm", budget=9),
    kvlib.method("streaming_llm", budget=0.4),
    kvlib.method("streaming_llm", budget=10, renumber=False),
    kvlib.method("h2o", budget=0.4),
    kvlib.method("scissorhands", budget=14),
    kvlib.method("tova", budget=0.4),
    kvlib.method("vatp", budget=0.4, host="h2o", sinks=2),
    kvlib.method("output_norm", budget=0.4, host="scissorhands"),
    kvlib.method("tidaldecode", budget=0.4),
    kvlib.method("quest", budget=0.4, page=4, dense=0),
    kvlib.method("loki", budget=0.4),
    kvlib.method("tokenselect", budget=0.4, similarity=0.5),
    kvlib.method("keyformer", budget=0.4, growth=2.0),
    kvlib.method("critical_kv", budget=0.4, host="h2o"),
    kvlib.method("elastic_cache", budget=0.4, sinks=2, recent=4),
]
RAGGED = [  # segments of different lengths, by method or by padding
    *(kvlib.method(name, budget=0.4, window=4) for name in ("adakv", "uncomp", "uncomp_pyramidkv")),
    *(kvlib.method(name, budget=0.4) for name in ("uncomp_h2o", "h2o", "streaming_llm", "tidaldecode", "loki")),
    *(kvlib.method(name, budget=9) for name in ("knorm", "tova", "tokenselect")),
    kvlib.method("quest", budget=0.4, page=4, dense=0),
    kvlib.method("full"),
]
GROWING = [kvlib.method(name, budget=45) for name in ("h2o", "streaming_llm", "tova", "uncomp")]  # before they evict


def label(x):
    return f"{x.name}-{getattr(x, 'budget', '')}" if isinstance(x, kvlib.Method) else str(x)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def read(model, device, lengths=(40, 40)):
    """The next ids after prompts of these lengths, in an open block."""
    ids, mask = tiny.pad([tiny.tokens(length, seed=seed) for seed, length in enumerate(lengths)])
    return model(ids.to(device), mask.to(device), logits_to_keep=1).logits[:, -1:].argmax(-1)


@torch.no_grad()
def eager(model, method, device, steps, lengths=(40, 40)):
    with method(model) as run:
        token, made = read(model, device, lengths), []
        for _ in range(steps):
            made.append(model(token, past_key_values=run.cache).logits[:, -1])
            token = made[-1].argmax(-1, keepdim=True)
        return torch.stack(made), tiny.kept(run), run


@torch.no_grad()
def captured(model, method, device, steps, lengths=(40, 40)):
    with method(model) as run:
        token, made = read(model, device, lengths), []
        with run.capture(steps) as step:
            for _ in range(steps):
                made.append(step(token).clone())
                token = made[-1].argmax(-1, keepdim=True)
        return torch.stack(made), tiny.kept(run), run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("method", [*UNIFORM, *GROWING], ids=label)
def test_captured_steps_are_eager_steps(method, architecture, device):
    same(method, architecture, device, 66)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [*RAGGED, *GROWING], ids=label)
def test_captured_steps_of_segments_of_different_lengths(method, device):
    same(method, "llama-gqa", device, 12, (40, 27))


def same(method, architecture, device, steps, lengths=(40, 40)):
    model = tiny.build(architecture, torch.float64 if device == "cpu" else torch.float32).to(device)
    logits, kept, run = eager(model, method, device, steps, lengths)
    again, kept_again, run_again = captured(model, method, device, steps, lengths)
    assert again.argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert kept_again == kept
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-10 if device == "cpu" else 1e-4)
    for report in ("stored_bytes", "full_bytes", "read_bytes"):
        assert getattr(run_again, report)() == getattr(run, report)()
    tokens = [length + steps for length in lengths]
    assert run_again.cache.tokens.tolist() == run.cache.tokens.tolist() == tokens
    assert run_again.cache.ends.flatten().tolist() == tokens
    assert run_again.cache.steps == steps


@pytest.mark.parametrize("name", ["full", "h2o", "adakv"])
def test_after_captured_steps_others_may_follow(name):
    model, method = tiny.model(), kvlib.method(name, budget=1.0 if name == "full" else 0.5)
    more, kept = tiny.tokens(2, 7, seed=9), []
    for decode in (eager, captured):
        run = decode(model, method, "cpu", 9)[2]
        with method(model) as run_again, torch.no_grad():
            model(more, past_key_values=run.cache)
            model(more[:, :1], past_key_values=run.cache)
            kept.append(tiny.kept(run_again))
    assert kept[0] == kept[1]


def test_no_more_than_the_room():
    model = tiny.model()
    with kvlib.method("full")(model) as run, torch.no_grad():
        token = read(model, "cpu")
        with run.capture(2) as step:
            step(token), step(token)
            with pytest.raises(RuntimeError, match="room for no more tokens"):
                step(token)


class InText(type(kvlib.method("streaming_llm"))):
    text_order = True


@pytest.mark.parametrize(
    "method, why",
    [
        (throwaway.TwoBits(4), "layer 0 stores tokens in more than one form"),
        (InText(budget=0.5), "moves what is stored after every token"),
    ],
    ids=["two parts", "text order"],
)
def test_what_differs_from_step_to_step_is_refused(method, why):
    with method(tiny.model()) as run, torch.no_grad():
        read(run.model, "cpu")
        with pytest.raises(ValueError, match=why):
            run.capture(4)


def test_what_a_captured_step_works_out_lasts_as_long_as_it_does():
    model = tiny.model()
    with kvlib.method("adakv", budget=0.4, window=4)(model) as run, torch.no_grad():
        token = read(model, "cpu", (40, 27))
        with run.capture(4) as step:
            step(token)
            known = {key: id(plan) for key, plan in run.cache.memo.items()}
            step(token), step(token)
            assert known and {key: id(plan) for key, plan in run.cache.memo.items()} == known
        assert not run.cache.memo
        model(token, past_key_values=run.cache)
        assert not run.cache.memo


class Counts(torch.Tensor):
    """Stands for what lies on a CPU beside a GPU, with all that is made of it, until it is brought to a device."""

    brought = 0
    device = torch.device("cpu", 0)  # equals no other, not even "cpu"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        made = super().__torch_function__(function, types, args, kwargs)
        if function is not torch.Tensor.to or not any(isinstance(x, torch.device) for x in args):
            return made
        Counts.brought += 1
        return made.as_subclass(torch.Tensor)


def brings(method) -> list[int]:
    """How often each of four captured steps brings numbers to the device that follow from prompts of two lengths."""
    model, found = tiny.model(), []
    ids, mask = tiny.pad([tiny.tokens(40), tiny.tokens(27, seed=1)])
    with method(model) as run, torch.no_grad():
        token = model(ids, mask.as_subclass(Counts)).logits[:, -1:].argmax(-1)
        with run.capture(12) as step:
            while not step.cache.memo.lasting:
                step(token)
            for _ in range(4):
                before = Counts.brought
                with Brought(run.cache.memo):
                    step(token)
                found.append(Counts.brought - before)
    return found


@pytest.mark.parametrize("method", RAGGED, ids=label)
def test_what_follows_from_prompts_is_brought_to_the_device_once(method):
    assert brings(method)[1:] == [0, 0, 0]


def test_what_changes_from_step_to_step_is_brought_each_time():
    class Counting(kvlib.Method):
        def attend(self, view):
            assert (view.tokens.to(view.device) == view.step.ends).all()
            return super().attend(view)

    assert brings(Counting()) == [1] * 4  # for both layers


def test_who_brings_counts_may_change_them():
    with Brought({}):
        for dtype in (torch.int64, torch.int32):
            for count in (torch.tensor([3, 2]), torch.tensor([2, 3]), torch.tensor([[2], [3]])) * 2:
                there = count.to("cpu", dtype)
                assert torch.equal(there, count.type(dtype))
                there += 1


class Shapes(TorchDispatchMode):
    """Notes what runs, with shapes; refuses what has to wait for a device: numbers and sizes taken from tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if any(
            x.is_floating_point() or x.dtype == torch.int32 for x in tensors
        ):  # counts on the CPU are int64 and bool
            assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
            self.calls.append((name, *(tuple(x.shape) for x in tensors)))
        return out


@pytest.mark.parametrize(
    "method, lengths",
    [*((method, (40, 40)) for method in UNIFORM), *((method, (40, 27)) for method in RAGGED)],
    ids=label,
)
def test_every_captured_step_is_the_same(method, lengths):
    model, calls = tiny.model(), []
    with method(model) as run, torch.no_grad():
        token = read(model, "cpu", lengths)
        with run.capture(12) as step:
            for _ in range(4):
                step(token)
            for _ in range(6):
                with Shapes() as seen:
                    step(token)
                calls.append(seen.calls)
    assert all(each == calls[0] for each in calls)


@pytest.mark.parametrize("method", UNIFORM, ids=label)
def test_eager_steps_wait_for_nothing(method):
    model = tiny.model()
    with method(model) as run, torch.no_grad():
        token = read(model, "cpu")
        for _ in range(6):
            with Shapes():
                model(token, past_key_values=run.cache)
