"""What methods share that store keys and values in few numbers: keys as they were before rotary embedding."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from kvlib import calibration
from kvlib.core.method import require
from kvlib.core.rotary import Rotary, rotate


def exact(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def turned(key: torch.Tensor, offset: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """Keys `(batch, kv_heads, tokens, head_dim)` moved by `offset` positions `(batch, 1 or kv_heads, tokens)`."""
    return key if rotary is None else rotate(key, offset, rotary)


def left_directions(weight: torch.Tensor) -> torch.Tensor:
    """Left singular vectors `(..., width, width)` of `(..., width, hidden_size)`, those of the largest values first.

    From the product with its transpose, which of wide matrices takes a small part of the time of an SVD.
    """
    wide = weight.double()
    return torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(-1).to(weight.dtype)


def require_source(source) -> None:
    """Raise ValueError unless `source` can say where a calibration is."""
    named = source is None or isinstance(source, str | Path)
    require("calibration", source, named, "the name of a model, a folder, or None")


def calibrated(source: str | Path | None, name: str, model) -> dict[str, torch.Tensor]:
    """What the file `name` of a calibration has, nothing without one.

    Raises:
        ValueError: if there is none, or if it is another model's.
    """
    if source is None:
        return {}
    file = calibration.find(source, name)
    with safe_open(file, "pt") as stored:
        calibration.require_same(model, json.loads(stored.metadata()["fingerprint"]), file)
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no dictionary


def projection(module, kind: str, heads: int) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What an attention module makes keys ("k") or values ("v") of, before rotary embedding.

    Where keys are normalised after it, the norm's weights are counted as part of the matrix, and there is no bias.

    Returns:
        the matrix `(kv_heads, head_dim, hidden_size)` and the bias `(kv_heads, 1, head_dim)`, or 0; float32 or better.

    Raises:
        ValueError: if it has no projection of its own for them.
    """
    linear = getattr(module, f"{kind}_proj", None)
    if linear is None:
        raise ValueError(f"{type(module).__name__} has no {kind}_proj, whose weights are needed")
    weight, bias = exact(linear.weight.detach()).unflatten(0, (heads, -1)), getattr(linear, "bias", None)
    norm = getattr(module, f"{kind}_norm", None)
    if norm is not None:
        return weight * exact(norm.weight.detach()).view(-1, weight.shape[1], 1), 0.0
    return weight, 0.0 if bias is None else exact(bias.detach()).unflatten(0, (heads, 1, -1))
