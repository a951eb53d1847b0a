"""A method keeps the same sets wherever a model's weights and layers are: on a GPU, on two devices, on the disk."""

import accelerate
import pytest
import tiny
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks

import kvlib
from kvlib.core.method import budgeted

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
FIRST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
SECOND = ("model.layers.1", "model.norm", "lm_head")


def some(name):
    budget = {"budget": 1.0 if name == "full" else 0.4} if name in budgeted() else {}
    return kvlib.method(name, **budget, **NEEDED.get(name, {}))


EVERY = [some(name) for name in sorted(kvlib.METHODS)]
methods = pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)


def outcome(model, method, device="cpu"):
    """Tokens and keep-sets of a left-padded batch."""
    # no token twice: in the first layer its keys would have the same norm up to rounding, and knorm would toss a coin
    orders = [torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    ids = torch.stack(orders)[:, :48].to(device)
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    with method(model) as run:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return out.tolist(), [run.kept(layer).tolist() for layer in range(len(run.cache.layers))]


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


@pytest.mark.parametrize("method", [m for m in EVERY if m.hooks("prepare")], ids=lambda m: m.name)
def test_a_layer_on_the_disk(method, tmp_path):
    assert outcome(on_disk(build(), tmp_path), method) == outcome(build(), method)


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
    model, places = build(), {"": 0} | dict.fromkeys(FIRST, 0) | dict.fromkeys(SECOND, "cpu")
    attach_align_device_hook_on_blocks(model, execution_device=places, offload=dict.fromkeys(places, False))
    assert outcome(model, method, "cuda") == outcome(build(), method)


@on_two
@methods
def test_a_model_spread_over_two_gpus(method):
    assert outcome(spread(0, 1), method, "cuda:0") == outcome(build(), method)
