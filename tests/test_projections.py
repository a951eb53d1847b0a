"""`output_norm` projects values as the model does, whatever its output projection is made of."""

import copy

import pytest
import tiny
import torch
from torch import nn

import kvlib
from kvlib.methods.vatp import output_norms


class Adapted(nn.Module):
    """A projection with a low-rank adapter beside it, as LoRA has it; its own weights stay as they are."""

    def __init__(self, base, down, up):
        super().__init__()
        self.base_layer, self.down, self.up = base, down, up

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.down @ self.up


def adapted(model):
    """The model with an adapter in every layer, and one in which it is part of the weights."""
    merged = copy.deepcopy(model)
    for layer, same in zip(model.model.layers, merged.model.layers):
        random = torch.Generator().manual_seed(layer.self_attn.layer_idx)
        down, up = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((32, 2), (2, 32)))
        same.self_attn.o_proj.weight += (down @ up).T
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj, down, up)
    return model, merged


def offloaded(model):
    """The model with output projections that have their weights during their forward pass only, and a resident one."""
    resident = copy.deepcopy(model)
    for layer in model.model.layers:
        project = layer.self_attn.o_proj
        stored = {name: x.clone() for name, x in project.named_parameters()}

        def load(module, args, stored=stored):
            for name, x in stored.items():
                module._parameters[name] = nn.Parameter(x, requires_grad=False)

        def unload(module, args, output, stored=stored):
            for name, x in stored.items():
                module._parameters[name] = nn.Parameter(x.to("meta"), requires_grad=False)

        project.register_forward_pre_hook(load)
        project.register_forward_hook(unload)
        unload(project, None, None)
    return model, resident


@pytest.mark.parametrize("kind", [adapted, offloaded])
@pytest.mark.parametrize("host", ["h2o", "snapkv"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_are_those_of_the_resident_merged_model(kind, host, bias):
    plain = tiny.build("llama-gqa", attention_bias=bias)
    one, other = kind(tiny.build("llama-gqa", attention_bias=bias))
    method, rows, kept = (
        kvlib.method("output_norm", budget=0.4, host=host),
        [tiny.tokens(40), tiny.tokens(25, seed=1)],
        [],
    )
    for model in (one, other, plain):
        with method(model) as run:
            turn = tiny.generate(model, run, rows, new=5)
            kept.append((turn.tokens.tolist(), turn.kept))
            norms = [tiny.remembered(layer, "norm") for layer in run.cache.layers]
            assert all(x.isfinite().all() and x.device.type == "cpu" for x in norms)
    assert kept[0] == kept[1]
    assert (kept[0] == kept[2]) == (kind is offloaded)  # an adapter tells


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_few_tokens_and_many_have_the_same_norms(dtype):
    """And a bias adds nothing: it is there whatever the token."""
    project = nn.Linear(4 * 8, 32, dtype=dtype)
    value = torch.randn(2, 12, 4, 8, dtype=dtype)
    many = output_norms(project, value)
    by_hand = torch.einsum("bthd,ohd->btho", value.double(), project.weight.double().unflatten(1, (4, 8))).abs().sum(-1)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(many.double(), by_hand, rtol=tolerance, atol=tolerance)
    few = torch.cat([output_norms(project, value[:, start : start + 4]) for start in (0, 4, 8)], dim=1)
    torch.testing.assert_close(few, many, rtol=tolerance, atol=tolerance)
    assert few.dtype == torch.promote_types(dtype, torch.float32)
