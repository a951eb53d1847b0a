"""Training computes what decoding does, and its gradients reach what they have to."""

import pytest
import tiny
import torch
from anchored import Anchored
from test_anchorcoder import ANCHOR, SETTINGS, method, text

from kvlib.methods.anchor_training import training


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_inference(name, kernel):
    model = tiny.build(["qwen3", "llama-gqa"][len(name) % 2], num_hidden_layers=5)
    ids, before = torch.stack([text(41), text(41, seed=1)]), model.config._attn_implementation
    with training(model, method(name), kernel):
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, Anchored(model, ids, ANCHOR, **SETTINGS[name]).logits, rtol=0, atol=1e-10)
    with method(name)(model):
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-10)
    assert model.config._attn_implementation == before


def test_gradients_are_those_of_the_masks():
    """By differences, of what one weight of the second layer's keys does to the loss of a later line."""
    model, ids = tiny.build("llama-gqa", num_hidden_layers=4), text(30)[None]
    weight = model.model.layers[2].self_attn.k_proj.weight.requires_grad_()

    def loss():
        logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, 20:-1], ids[0, 21:])

    with training(model, method("whole")):
        loss().backward()
        gradient, step = weight.grad[0, 0].item(), 1e-5
        with torch.no_grad():
            weight[0, 0] += step
            above = loss()
            weight[0, 0] -= 2 * step
            below = loss()
    assert gradient == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5) and gradient != 0


def test_what_cannot_be_trained_on():
    model = tiny.model("llama-gqa")
    with pytest.raises(ValueError, match="kernel='eager': 'sdpa' or 'flex'"), training(model, method("TAA"), "eager"):
        pass
    with training(model, method("TAA")):
        with pytest.raises(ValueError, match="the model was given embeddings"):
            model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
        with pytest.raises(ValueError, match="padding: texts are packed"):
            model(*tiny.pad([text(5), text(3)]), use_cache=False)
