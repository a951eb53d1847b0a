"""LoRC: the projections of keys and values have few directions that matter (Zhang et al., 2410.03111)."""

from itertools import accumulate

import torch

from kvlib.core.method import Method, register, require
from kvlib.core.rotary import rotaries
from kvlib.core.support import attention_modules, kv_heads
from kvlib.methods.systems.lowrank import exact, left_directions, projection, turned


@register("lorc")
class LoRC(Method):
    """Keys and values as a model would make them whose projections are cut to their largest singular values.

    Each KV head's rows of W_k and W_v have a truncated SVD, W ~ U S V, and x (S V) is stored: `rank` numbers in place
    of `head_dim`. Keys are stored as before rotary embedding; when they are read they are multiplied by U and rotated.
    Nothing is calibrated. Early layers keep more: a layer's share of `head_dim` falls from `most` to `least` with the
    logarithm of its cumulative condition number, the product of those of W_k and W_v of this and all later layers.
    Everything is stored so from the moment it arrives; prompts are read in that form too.

    No code of the authors is known. That weights are cut by SVD is from the paper's abstract; the criterion of layers
    is second hand; its formula, an SVD for each head and the whole W_k and W_v in condition numbers are our reading.
    Departures: nothing is merged into W_q and W_o, which changes speed only; biases are stored nowhere and added when
    read; on models that normalise keys (Qwen3) the SVD is that of W_k with the norm's weights, and keys are cut after
    the norm instead of before it. `most` and `least` are ours: where the logarithm falls evenly they free 45 %, as in
    the paper's example of 27.5 GB in place of 50 (second hand).

    Args:
        most, least: shares of `head_dim` that the first and the last layer keep, 0 < least <= most <= 1.

    Raises:
        ValueError: for other shares; in a block, on models without `k_proj` and `v_proj`.
    """

    own_prefill = True
    most: float = 0.75
    least: float = 0.35

    def __post_init__(self):
        fits = all(isinstance(x, float) for x in (self.least, self.most)) and 0 < self.least <= self.most <= 1
        require("(least, most)", (self.least, self.most), fits, "shares of head_dim, 0 < least <= most <= 1")

    def prepare(self, model):
        """Bases `(kv_heads, head_dim, rank)` and biases of each layer's keys and values, and its rotation."""
        heads = kv_heads(model)
        pairs = [[projection(module, kind, heads) for kind in "kv"] for module in attention_modules(model)]
        conditions = [sum(log_condition(weight) for weight, _ in pair) for pair in pairs]
        ranks = self.ranks(conditions, pairs[0][0][0].shape[1])
        bases = [
            [(left_directions(weight)[..., :rank], bias) for weight, bias in pair] for pair, rank in zip(pairs, ranks)
        ]
        return [(*pair, rotary) for pair, rotary in zip(bases, rotaries(model), strict=True)]

    def ranks(self, conditions: list[float], size: int) -> list[int]:
        """Directions of each layer from the logarithms of condition numbers; at least one of `size`."""
        rest = [*accumulate(reversed(conditions))][::-1]  # from this layer on: falls, because none is below 0
        span = rest[0] - rest[-1] or 1.0
        shares = [self.most - (rest[0] - each) / span * (self.most - self.least) for each in rest]
        return [max(1, round(share * size)) for share in shares]

    def encode(self, run, layer, key, value, positions):
        (keys, key_bias), (values, value_bias), rotary = run.prepared[layer.index]
        straight = turned(exact(key), -positions[:, None], rotary)
        codes = {"key": (straight - key_bias) @ keys, "value": (exact(value) - value_bias) @ values}
        return {name: code.to(key.dtype) for name, code in codes.items()}

    def decode(self, view, part):
        (keys, key_bias), (values, value_bias), rotary = view.run.prepared[view.layer_idx]
        code, dtype = {name: exact(x) for name, x in view.fields(part).items()}, view.new_key.dtype
        key = turned(code["key"] @ keys.mT + key_bias, part.position_rectangle(), rotary)
        return key.to(dtype), (code["value"] @ values.mT + value_bias).to(dtype)


def log_condition(weight: torch.Tensor) -> float:
    """ln of the condition number of a matrix `(kv_heads, head_dim, hidden_size)` of all heads; rounding limits it."""
    found = torch.linalg.svdvals(weight.flatten(0, 1))
    return float((found[0] / found[-1].clamp(min=found[0] * torch.finfo(found.dtype).eps)).log())
