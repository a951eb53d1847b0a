"""Eigen Attention: keys and values live in few directions (Saxena et al., 2408.05646)."""

from pathlib import Path

import torch

from kvlib.core.method import Method, register, require, whole
from kvlib.core.rotary import rotaries
from kvlib.core.support import attention_modules
from kvlib.methods.systems.lowrank import calibrated, exact, require_source, turned

FILE = "eigen_attention.safetensors"
NOTHING = 1e-8  # of the largest square: less may be rounding of float32


@register("eigen_attention")
class EigenAttention(Method):
    """Keys and values as coordinates in the directions in which those of other texts are largest.

    Each layer has one basis for the keys of all its KV heads, as they were before rotary embedding, and one for the
    values of each head: singular vectors of what the layer has made of calibration texts, not centred. As many of them
    are kept as the layer's output on these texts needs (`kvlib.calibration.eigen_directions`). Keys are brought back to
    `head_dim` and rotated when they are read. With a calibration everything is stored so from the moment it arrives,
    and prompts are read in that form too.

    Follows UtkarshSaxena1/EigenAttn 067df77, `decompose/` (code), in its form for Llama. Departures: nothing is merged
    into the model's weights, which changes speed only; on models that normalise keys (Qwen3) keys are those after the
    norm; texts of calibration are ours, and tokens at the same place in several texts are not averaged. Without a
    calibration, which is ours, bases are those of the prompt itself, taken at its end: the prompt is read exactly, and
    the bases, a state of each row that is no part of the bytes of keys and values, serve for all later tokens.

    Args:
        rank: directions of each head, a share of `head_dim` or a number; None: as many as the calibration has found,
            and half of `head_dim` without one.
        calibration: where bases are from: a model whose calibration is shipped, or a folder that has one; None: the
            prompt.

    Raises:
        ValueError: for a rank that is neither a share in (0, 1] nor a whole number >= 1, a calibration that is no name
            or path; in a block, for the calibration of another model or none at all, and for more directions than there
            are.
    """

    rank: float | int | None = None
    calibration: str | Path | None = None

    def __post_init__(self):
        fits = self.rank is None or whole(self.rank, 1) or (isinstance(self.rank, float) and 0 < self.rank <= 1)
        require("rank", self.rank, fits, "a share of head_dim in (0, 1], directions >= 1, or None")
        require_source(self.calibration)

    @property
    def own_prefill(self):
        """Prompts are read exactly where they have to tell the bases."""
        return self.calibration is not None

    def prepare(self, model):
        """Each layer's rotation and, of a calibration, its bases of keys and values; else None."""
        stored, found = calibrated(self.calibration, FILE, model), []
        for i, module in enumerate(attention_modules(model)):
            device = next(module.parameters()).device
            pair = [stored[f"{kind}.{i}"].to(device, torch.float32) for kind in ("keys", "values")] if stored else []
            # the file is in float16, which does not leave columns orthonormal
            found.append([first(torch.linalg.qr(basis).Q, self.rank) for basis in pair] or None)
        return [*zip(rotaries(model), found, strict=True)]

    def bases(self, run, layer):
        """Bases of keys `(batch or 1, 1, head_dim, rank)` and values `(batch or 1, kv_heads, head_dim, rank)`.

        None before the end of a prompt that has to tell them.
        """
        if "key_basis" in layer.rows:
            return layer.rows["key_basis"], layer.rows["value_basis"]
        return run.prepared[layer.index][1]

    def encode(self, run, layer, key, value, positions):
        bases = self.bases(run, layer)
        if bases is None:
            return super().encode(run, layer, key, value, positions)
        return coded(turned(exact(key), -positions[:, None], run.prepared[layer.index][0]), value, bases)

    def decode(self, view, part):
        stored, bases, dtype = view.fields(part), self.bases(view.run, view.layer), view.new_key.dtype
        if bases is None:
            return stored["key"], stored["value"]
        key, value = (exact(stored[name]) @ exact(basis).mT for name, basis in zip(("key", "value"), bases))
        return turned(key, view.positions, view.run.prepared[view.layer_idx][0]).to(dtype), value.to(dtype)

    def compress(self, view):
        if self.bases(view.run, view.layer) is not None:
            return
        tail, empty = view.layer.tail, (view.positions < 0)[..., None]
        straight = turned(exact(view.key), -view.positions, view.run.prepared[view.layer_idx][0])
        keys = straight.masked_fill(empty, 0).flatten(1, 2)[:, None]  # of all heads, one basis
        values = exact(view.value).masked_fill(empty, 0)
        rank = 0.5 if self.rank is None else self.rank
        bases = [first(directions(x)[0], rank) for x in (keys, values)]
        view.layer.rows |= dict(zip(("key_basis", "value_basis"), bases))
        for name, code in coded(straight, view.value, bases).items():
            tail.put(tail.fields, name, code)


def coded(straight: torch.Tensor, value: torch.Tensor, bases) -> dict[str, torch.Tensor]:
    """What is stored of keys as before rotary embedding and of values `(batch, kv_heads, tokens, head_dim)`."""
    pairs = zip(("key", "value"), (straight, exact(value)), bases)
    return {name: (x @ exact(basis)).to(value.dtype) for name, x, basis in pairs}


def directions(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Right singular vectors of `x` `(..., tokens, dim)` in columns, and the singular values, largest first.

    Directions in which there is nothing are 0, since rounding alone would tell them apart.
    """
    squares, vectors = torch.linalg.eigh(x.double().mT @ x.double())
    nothing = squares <= NOTHING * squares[..., -1:]
    found = vectors.masked_fill(nothing[..., None, :], 0), squares.masked_fill(nothing, 0).sqrt()
    return tuple(each.flip(-1).to(x.dtype) for each in found)


def first(basis: torch.Tensor, rank: float | int | None) -> torch.Tensor:
    """The first `rank` columns of bases `(..., head_dim, columns)`, None: all. Raises ValueError if there are fewer."""
    size, columns = basis.shape[-2:]
    count = columns if rank is None else rank if isinstance(rank, int) else max(1, int(rank * size))
    require("rank", rank, count <= columns, f"{count} directions, but there are {columns}")
    return basis[..., :count]
