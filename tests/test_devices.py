"""A method keeps the same sets wherever a model's weights and layers are: on a GPU, on two devices, on the disk."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import accelerate
import pytest
import tiny
import torch

import kvlib
from kvlib.core import support
from kvlib.core.method import budgeted
from kvlib.core.part import Part
from kvlib.core.residual import shorten
from kvlib.core.step import Step

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
NEEDED = {
    "uncomp_release": {"spread": 0.0},  # tiny models have no calibration
    "anchorcoder": {"anchor": 7, "per": 2, "source": 0, "beyond": 0, "forced": False},
    "kvsharer": {"pairs": ((1, 0),)},
    "kivi": {"group": 4, "residual": 8},  # of the defaults these prompts have too few tokens
    "think": {"window": 4, "recent": 5},
    "cskv": {"recent": 4},
    "corm": {"window": 4, "recent": 5},
}
ELSEWHERE = torch.device("meta")  # another device, which every machine has
FIRST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
SECOND = ("model.layers.1", "model.norm", "lm_head")


def some(name):
    budget = {"budget": 1.0 if name == "full" else 0.4} if name in budgeted() else {}
    return kvlib.method(name, **budget, **NEEDED.get(name, {}))


EVERY = [some(name) for name in sorted(kvlib.METHODS)]
methods = pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)


def outcome(model, method, device="cpu"):
    """Tokens and keep-sets of a left-padded batch after two turns, and what two beams write."""
    # no token twice: in the first layer its keys would have the same norm up to rounding, and knorm would toss a coin
    orders = [torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    ids = torch.stack(orders).to(device)
    first, mask = ids[:, :48], torch.ones_like(ids[:, :48])
    mask[0, :15] = 0
    with method(model) as run:
        beams = model.generate(first, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        said = model.generate(first, attention_mask=mask, max_new_tokens=8, do_sample=False)
        turns = torch.cat([said, ids[:, 48:53]], dim=1)
        mask = torch.cat([mask, torch.ones_like(turns[:, 48:])], dim=1)
        more = model.generate(turns, attention_mask=mask, past_key_values=run.cache, max_new_tokens=4, do_sample=False)
    return beams.tolist(), more.tolist(), [run.kept(layer).tolist() for layer in range(len(run.cache.layers))]


def build():
    return tiny.build("llama-gqa", torch.float32)


def spread(first, second, **arguments):
    """The model, dispatched by accelerate as `device_map` does."""
    return accelerate.dispatch_model(build(), dict.fromkeys(FIRST, first) | dict.fromkeys(SECOND, second), **arguments)


def on_disk(model, folder):
    """The model, its last layer in files of this folder while it does not compute."""
    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(model.config.num_hidden_layers)} | {last: "disk"}
    model = accelerate.dispatch_model(model, places, offload_dir=folder)
    assert all(parameter.is_meta for parameter in model.get_submodule(last).parameters())
    return model


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def one_step() -> Step:
    counts = torch.tensor([3, 2])
    return Step(0, True, 3, torch.tensor([[0, 1, 2], [-1, 0, 1]]), counts, counts, counts, complete=False)


def test_layers_on_another_device_see_the_same_step_there():
    step = one_step()
    assert step.on(torch.device("cpu")) is step
    there = step.on(ELSEWHERE)
    assert there is step.on(ELSEWHERE) and there.positions.device == there.ends.device == ELSEWHERE
    assert there.tokens is step.tokens and there.sums is step.sums and there.starts is step.starts
    assert step.positions.device.type == "cpu" and step.ends.tolist() == [3, 2]


def test_what_a_layer_leaves_comes_to_the_device_of_the_one_that_asks():
    step, left = one_step(), torch.arange(2)
    there = step.on(ELSEWHERE)
    step.shared["slots"] = left
    step.shared["several"] = (left, Pair(left, 7), [left], "word")
    assert step.shared["slots"] is left and {**there.shared}.keys() == {"slots", "several"}
    assert there.shared["slots"].device == ELSEWHERE and there.shared["slots"] is there.shared["slots"]
    moved, pair, kept, word = there.shared["several"]
    assert moved.device == pair.first.device == ELSEWHERE and (type(pair), pair.second) == (Pair, 7)
    assert kept[0] is left and word == "word"
    there.shared["lengths"] = left  # on the CPU on purpose: it was no tensor of the layer's device
    assert all(each.shared["lengths"] is left for each in (step, there, step.on(torch.device("meta", 1))))
    del there.shared["slots"]
    assert step.shared.get("slots") is None and len(step.shared) == 2


def test_a_layer_asks_for_the_step_of_its_device(monkeypatch):
    made, seen = [], []

    def on(step, device):
        made.append(replace(step, positions=step.positions.clone()))
        return made[-1]

    def with_one(part, key, value, positions):
        seen.append(positions is made[-1].positions)
        return append(part, key, value, positions)

    class Looking(kvlib.Method):
        def observe(self, view):
            seen.append(view.step is made[-1] and view.query_positions is made[-1].positions)

    append = Part.with_one
    monkeypatch.setattr(Step, "on", on)
    monkeypatch.setattr(Part, "with_one", with_one)
    for method in (Looking(), kvlib.method("full")):  # one has views, the other leaves decoded tokens alone
        with method(build()) as run, torch.no_grad():
            run.model(tiny.tokens(2, 9))
            run.model(tiny.tokens(2, 1), past_key_values=run.cache)
    assert len(seen) == 6 and all(seen)


def test_a_shortened_pass_is_shortened_on_all_devices():
    step = one_step()
    before, keep = step.on(ELSEWHERE), torch.tensor([[0, 2], [1, 2]])
    run = SimpleNamespace(active=True, step=step, method=SimpleNamespace(before_layer=lambda run, layer: keep))
    rotary = tuple(torch.zeros(1, 3, 4) for _ in range(2))
    shorten(run, 1)(None, (torch.zeros(2, 3, 8),), {"position_embeddings": rotary})
    assert before.positions.shape == (2, 3) and step.on(ELSEWHERE).positions.shape == (2, 2)


def test_another_layers_entries_come_to_the_device_of_the_one_that_reads_them():
    found = []

    class Reading(kvlib.Method):
        def attend(self, view):
            if view.layer_idx:
                far = copy.copy(view)
                far.new_key = view.new_key.to(ELSEWHERE)  # as if this layer lay elsewhere
                there = far.other(0)
                found.append({x.device for x in (there.positions, there.key, there.value, *there.state.values())})
                assert view.other(0).stored and not there.stored
            return super().attend(view)

        def observe(self, view):
            view.remember("index", torch.zeros_like(view.new_key[..., 0]))

    with Reading()(build()) as run, torch.no_grad():
        run.model(tiny.tokens(2, 30))
    assert found == [{ELSEWHERE}]


@pytest.fixture
def current(monkeypatch):
    """The tensors whose device is the current one: Triton launches there."""
    inside = []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return inside


def test_kernels_are_launched_on_the_device_of_their_tensors(current, monkeypatch):
    pytest.importorskip("triton")
    from kvlib.kernels import decode, newest, rows, weakest

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self.name, *map(id, current)))

    launched = []
    for module, name in (
        (decode, "_split"),
        (decode, "_combine"),
        (newest, "_write"),
        (rows, "_take"),
        (weakest, "_retire"),
    ):
        monkeypatch.setattr(module, name, Kernel(name))
    flat, at, counts = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int32), torch.tensor([[3]])
    query, new, starts = torch.zeros(1, 2, 4), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    rows.take(flat, counts[0])
    weakest.retire(score := torch.zeros(1, 1, 3), at, 6)
    newest.write({"key": flat, "value": flat}, at, {"key": new, "value": new}, counts, starts, counts, None)
    decode.attend(query, flat, flat, starts, counts, 3)
    expected = {"_take": flat, "_retire": score, "_write": at, "_split": query, "_combine": query}
    assert launched == [(name, id(tensor)) for name, tensor in expected.items()]


def test_sums_over_queries_are_made_on_their_device(current):
    found = []

    def sums(query, key, *more):
        found.append([x is query for x in current])
        return key[:, :, None, :, 0]

    class Summing(kvlib.Method):
        window = 2

        def observe(self, view):
            view.over_queries(sums)
            view.over_queries(sums, last=2)

    with Summing()(build()) as run, torch.no_grad():
        run.model(tiny.tokens(2, 9))
    assert found == [[True]] * 4


def test_a_step_over_several_devices_is_not_captured():
    with kvlib.method("snapkv", budget=0.4, window=4)(build()) as run, torch.no_grad():
        run.model(tiny.tokens(2, 30))
        tail = run.cache.layers[1].tail
        tail.positions = tail.positions.to(ELSEWHERE)
        with pytest.raises(ValueError, match="layers lie on cpu and meta: a graph is of one device"):
            run.capture(4)


@pytest.mark.parametrize("method", [m for m in EVERY if m.hooks("prepare")], ids=lambda m: m.name)
def test_a_layer_on_the_disk(method, tmp_path):
    assert outcome(on_disk(build(), tmp_path), method) == outcome(build(), method)


@pytest.mark.parametrize("name", ["uncomp", "tidaldecode", "snapkv", "lorc"])
def test_weights_are_brought_to_methods_that_read_them(name, tmp_path, monkeypatch):
    """All layers' attention may not fit at once where a model does not."""
    brought, weights_in_place = [], support.weights_in_place
    monkeypatch.setattr(support, "weights_in_place", lambda modules: brought.append(name) or weights_in_place(modules))
    for model, needed in ((on_disk(build(), tmp_path), ["lorc"]), (build(), [])):
        brought.clear()
        outcome(model, some(name))
        assert brought == [x for x in needed if x == name]
        assert name != "lorc" or all(p.is_meta == bool(needed) for p in model.model.layers[1].self_attn.parameters())


def test_what_a_method_refuses_is_refused(tmp_path):
    class Refusing(kvlib.Method):
        def prepare(self, model):
            raise RuntimeError("not today")

    for model in (build(), on_disk(build(), tmp_path)):
        with pytest.raises(RuntimeError, match="not today"), Refusing()(model):
            pass


@pytest.mark.parametrize("name", ["cskv", "eigen_attention"])
def test_a_calibration_knows_a_model_on_the_disk(name, tmp_path):
    method, model = kvlib.method(name, calibration="minilm"), kvlib.load("minilm")[0]
    assert outcome(model, method) == outcome(on_disk(model, tmp_path), method)


@on_gpu
@methods
def test_methods_choose_on_a_gpu_what_they_choose_on_a_cpu(method):
    assert outcome(build().cuda(), method, "cuda") == outcome(build(), method)


@on_gpu
@methods
def test_a_layer_whose_weights_wait_in_host_memory(method):
    assert outcome(spread(0, "cpu"), method, "cuda") == outcome(build(), method)


@on_gpu
@methods
def test_a_layer_that_a_cpu_computes(method):
    assert outcome(spread(0, "cpu", main_device="cpu"), method) == outcome(build(), method)


@on_two
@methods
def test_a_model_spread_over_two_gpus(method):
    assert outcome(spread(0, 1), method, "cuda:0") == outcome(build(), method)
