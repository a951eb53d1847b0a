"""CSKV: fewer channels for all but the newest tokens (Wang et al., 2409.10593)."""

from pathlib import Path

import torch

from kvlib.core.method import Method, register, require, whole
from kvlib.core.rotary import rotaries
from kvlib.core.support import attention_modules, kv_heads
from kvlib.methods.systems import body
from kvlib.methods.systems.lowrank import calibrated, exact, left_directions, projection, require_source, turned

FILE = "cskv.safetensors"


@register("cskv")
class CSKV(Method):
    """Two branches: the newest tokens as they are, older ones as x A in place of x W, read as x A B.

    A and B are of low rank, one pair for the keys and one for the values of all heads of a layer. They begin as the SVD
    of W with each input channel multiplied by the root of its mean activation (ASVD), and are then fitted to the keys
    and values of texts (`kvlib.calibration.cskv_projections`). Keys are those before rotary embedding, and rotated when
    they are read. A prompt is read exactly. The text is cut into windows of `recent` tokens: whole ones are stored as
    x A, tokens of the one that has begun as they are.

    Follows wln20/CSKV cd79226, 9ea2fd0 and 108720a, `modeling_llama.py`, `cache_utils.py` and `training_utils.py`
    (code). Departures: a cache sees keys and not x, so that A is W D, and x A is the key times D. The SVD has this
    form, and so has the best fit; gradient steps on A itself would leave it on the way. D and B begin as the transposes
    of each other, where the code gives both the root of the singular values: products are the same. Biases are stored
    nowhere and added when read, which the code refuses; on models that normalise keys (Qwen3) keys are those after the
    norm. No quantisation, which the code only simulates.

    Args:
        keys, values: channels that x A has for each head, shares of `head_dim`.
        recent: tokens of a window.
        calibration: where activations and, if they were fitted, A and B are from: a model whose calibration is shipped
            (minilm's activations, without a fit), or a folder that has one. None: the SVD of W alone, as in the code
            without ASVD.

    Raises:
        ValueError: for shares outside (0, 1], fewer than one recent token, a calibration that is no name or path; in a
            block, for the calibration of another model, none at all or one of other shares, and on models without
            `k_proj` and `v_proj`.
    """

    evicts_in_decode = True
    keys: float = 0.5
    values: float = 0.5
    recent: int = 32
    calibration: str | Path | None = None

    def __post_init__(self):
        for name in ("keys", "values"):
            share = getattr(self, name)
            require(name, share, isinstance(share, float) and 0 < share <= 1, "a share of head_dim in (0, 1]")
        require("recent", self.recent, whole(self.recent, 1), "a number of tokens >= 1")
        require_source(self.calibration)

    def prepare(self, model):
        """For each layer D, B and the bias of its keys and its values, and its rotation."""
        known, heads, found = calibrated(self.calibration, FILE, model), kv_heads(model), []
        for i, module in enumerate(attention_modules(model)):
            pair = [projection(module, kind, heads) for kind in "kv"]
            maps = [
                (*self.maps(name, weight.flatten(0, 1), heads, {x: known[x][i].to(weight) for x in known}), bias)
                for name, (weight, bias) in zip(("keys", "values"), pair)
            ]
            found.append(maps)
        return [*zip(found, rotaries(model), strict=True)]

    def maps(self, name: str, weight: torch.Tensor, heads: int, known: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """D and B of one layer's keys or values, from what is known of the layer."""
        rank = heads * max(1, int(getattr(self, name) * (len(weight) // heads)))
        if f"{name}.down" not in known:
            return first_maps(weight, known.get("activations"), rank)
        down = known[f"{name}.down"]
        fits = down.shape[-1] == rank
        require(name, getattr(self, name), fits, f"the calibration is fitted to {down.shape[-1] / len(weight):.3g}")
        return down, known[f"{name}.up"]

    def decode(self, view, part):
        stored = view.fields(part)
        if part is view.layer.tail:
            return stored["key"], stored["value"]
        (keys, values), rotary = view.run.prepared[view.layer_idx]
        dtype, heads = view.new_key.dtype, part.shape[1]
        key, value = (
            split(together(exact(stored[name])) @ up, heads) + bias
            for name, (_, up, bias) in zip(("key", "value"), (keys, values))
        )
        return turned(key, part.position_rectangle(), rotary).to(dtype), value.to(dtype)

    def compress(self, view):
        layer, tail = view.layer, view.layer.tail
        moved = tail.lengths // self.recent * self.recent
        if not (most := int(moved.max())):
            return
        at, stored = tail.position_rectangle(), view.fields(tail)
        maps, rotary = view.run.prepared[view.layer_idx]
        old = {name: exact(x[:, :, :most]) for name, x in stored.items()}
        old["key"] = turned(old["key"], -at[:, :, :most], rotary)
        chunk = {
            name: split(together(old[name] - bias) @ down, tail.shape[1]).to(view.new_key.dtype)
            for name, (down, _, bias) in zip(("key", "value"), maps)
        }
        body.move(layer, chunk, moved)


def together(x: torch.Tensor) -> torch.Tensor:
    """`(batch, kv_heads, tokens, size)` with all heads of a token side by side, `(batch, tokens, kv_heads x size)`."""
    return x.transpose(1, 2).flatten(2)


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """What `together` has put side by side, as it was."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def first_maps(weight: torch.Tensor, activations: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D `(width, rank)` and B `(rank, width)` from the SVD of W, with `activations` `(hidden_size,)` that of ASVD.

    Args:
        weight: `(width, hidden_size)`, as torch stores W.
    """
    scaled = weight if activations is None else weight * (activations + 1e-6) ** 0.5
    down = left_directions(scaled)[:, :rank]
    return down, down.mT
