"""Loki: keys have few directions that matter, and these tell which tokens to read (Singhania et al., 2406.02542)."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from kvlib import calibration
from kvlib.core.method import Reader, highest, register, require, whole

FILE = "loki.safetensors"


@register("loki")
class Loki(Reader):
    """The tokens of the highest logits in few directions. Nothing is evicted: a decoded token reads less.

    Directions are the principal components of keys, for every layer and KV head. Each query head ranks tokens by the
    logits that are left in the first `rank` of them, keys not centred, and attends to the best by exact logits.
    Prompts, later turns and questions are dense. Loki stores keys rotated by the components, so that their first
    entries can be read alone; here they are stored as they are, and choosing counts as reading `rank` of `head_dim`
    entries of each.

    Followed: hpcgroup/loki 005913b, `methods/pca_topk`. Departures: the newest token is always read and counts as one
    of the budget, where theirs competes; a share is one of the prompt, theirs of all tokens so far; their ranks by
    explained variance are not there.

    Args:
        rank: directions, a share of `head_dim` or a number.
        calibration: where components are from: a model whose calibration is shipped, or a folder that has one
            (`kvlib.calibration.key_directions`), as in the paper; they are applied to rotated keys, whichever keys they
            were made of, as in the authors' code. None, which is ours: from the keys of the prompt itself, at its end.

    Raises:
        ValueError: for a rank that is neither a share in (0, 1] nor a whole number >= 1, a calibration that is no name
            or path; in a block, for the calibration of another model or none at all, and for more directions than there
            are.
    """

    rank: float | int = 0.25
    calibration: str | Path | None = None

    def __post_init__(self):
        super().__post_init__()
        share = isinstance(self.rank, float) and 0 < self.rank <= 1
        require("rank", self.rank, share or whole(self.rank, 1), "a share of head_dim in (0, 1] or directions >= 1")
        named = self.calibration is None or isinstance(self.calibration, str | Path)
        require("calibration", self.calibration, named, "the name of a model, a folder, or None")

    def prepare(self, model):
        """Components of this model, `(layers, kv_heads, head_dim, columns)`; None if they are the prompt's."""
        return None if self.calibration is None else load(calibration.find(self.calibration, FILE), model)

    def observe(self, view):
        if view.step.ends_prompt and not self.everything:
            view.layer.rows["directions"] = self.directions(view)

    def directions(self, view) -> torch.Tensor:
        """`(batch, kv_heads, head_dim, rank)`."""
        known = view.run.prepared
        if known is None:
            found = principal(view.key, view.positions >= 0)
        else:
            found = known[view.layer_idx].to(view.device).expand(len(view.tokens), -1, -1, -1)
        size, columns = found.shape[-2:]
        rank = self.rank if isinstance(self.rank, int) else max(1, int(self.rank * size))
        require("rank", self.rank, rank <= columns, f"{rank} directions, but there are {columns}")
        return found[..., :rank]

    def select(self, view):
        directions, key = view.layer.rows["directions"], view.key
        key = key.to(torch.promote_types(key.dtype, directions.dtype))
        query = view.query.to(key.dtype).unflatten(1, (-1, view.groups)).squeeze(3)
        directions = directions.to(key.dtype)
        score = (query @ directions @ directions.mT @ key.mT).flatten(1, 2)  # (q P) (k P)ᵀ, the keys left as they are
        held = (view.positions >= 0).sum((1, 2))
        view.note_read(held * (view.key.element_size() * directions.shape[-1]))
        positions = view.positions[:, :1]  # all heads hold as many tokens, the newest in the same slot
        score = score.masked_fill(positions == view.per_row(view.step.ends) - 1, torch.inf)
        return highest(score, positions, view.per_prompt("tokens", lambda view: self.tokens(view, self.budget)))


def principal(key: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Principal components of `key` `(..., tokens, head_dim)` where `real` `(..., tokens)`: columns, first ones first.

    Directions in which keys do not vary are 0, since rounding alone would tell them apart.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    key, hidden = key.to(dtype), ~real[..., None]
    mean = key.masked_fill(hidden, 0).sum(-2, keepdim=True) / real.sum(-1)[..., None, None]
    centred = (key - mean).masked_fill(hidden, 0)
    variance, vectors = torch.linalg.eigh(centred.mT @ centred)
    nothing = variance <= 1000 * torch.finfo(dtype).eps * variance[..., -1:]
    return vectors.masked_fill(nothing[..., None, :], 0).flip(-1)


def load(file: Path, model) -> torch.Tensor:
    """Components of a file, in float32. Raises ValueError if they are another model's."""
    with safe_open(file, "pt") as stored:
        calibration.require_same(model, json.loads(stored.metadata()["fingerprint"]), file)
        return stored.get_tensor("directions").float()
