"""MiniCache: neighbouring layers share the directions of keys and values (Liu et al., 2405.14366)."""

import torch
import torch.nn.functional as F

from kvlib.core.method import Method, register, require
from kvlib.core.part import Part

FIELDS = ("key", "value")


@register("minicache")
class MiniCache(Method):
    """Layers in pairs, from the middle on: one direction of each token for both, and a norm for each.

    The direction lies on the arc between those of the two layers, `t` of the way towards the later one (SLERP); a layer
    reads it times its own norm. Tokens whose keys point too far apart stay as they are in both layers: those whose
    angle exceeds d_max - `gamma` (d_max - d_min), the least and the largest angle of the row in each head. Prompts are
    read exactly and merged at their end; decoded tokens wait for the end of the next prompt.

    Second hand: the authors have released no code. Pairs and norms are those of the abstract, t and gamma those of the
    paper as quoted elsewhere. SLERP for each KV head, and keys that decide for values too, are those of
    Zefan-Cai/KVCache-Factory c97f9d7, `pyramidkv/minicache.py` (code) and `docs/algorithm_backlog.md`, where a
    twentieth of the tokens stays instead. Our reading: limits of each KV head, and the inequality, since the one that
    is quoted keeps the tokens that are most alike. Departures: at the end of a later prompt the tokens that stayed are
    compared again, with those that have come since; both layers of a pair have to lie on one device.

    Args:
        t: in [0, 1], how far from the earlier layer's direction to the later one's.
        gamma: in [0, 1], the part of the range of angles in which tokens stay; 0 merges all, 1 all but the closest.
        start: in [0, 1), the share of layers before the first pair; of an odd number behind it the last has no pair.

    Raises:
        ValueError: for numbers outside these ranges.
    """

    t: float = 0.6
    gamma: float = 0.05
    start: float = 0.5

    def __post_init__(self):
        for name in ("t", "gamma"):
            value = getattr(self, name)
            require(name, value, isinstance(value, int | float) and 0 <= value <= 1, "a part in [0, 1]")
        fits = isinstance(self.start, int | float) and 0 <= self.start < 1
        require("start", self.start, fits, "a share of the layers in [0, 1)")

    def finish(self, run):
        if run.step.ends_prompt:
            layers = run.cache.layers
            for first in range(int(self.start * len(layers)), len(layers) - 1, 2):
                self.merge(run, *layers[first : first + 2])

    def merge(self, run, one, two):
        """Move what two layers' tails have in common into a body of both."""
        at = one.tail.position_rectangle()
        pair = [run.view(layer.index).fields(layer.tail) for layer in (one, two)]
        stays = self.stays(pair[0]["key"], pair[1]["key"], at >= 0)
        counts = ((at >= 0) & ~stays).sum(-1).cpu()
        if not (most := int(counts.max())):
            return
        chunk, order = {}, stays.long().sort(dim=-1, stable=True).indices[..., :most]
        for name in FIELDS:
            chunk[name], chunk[f"{name}_norms"] = merged(*(fields[name] for fields in pair), self.t)
        chunk = {name: x.gather(2, order[..., None].expand(*order.shape, x.shape[-1])) for name, x in chunk.items()}
        body = one.body or Part(*at.shape[:2], at.device, memo=one.memo)
        body.append(chunk, at.gather(2, order), counts, torch.zeros_like(counts))
        for layer in (one, two):
            layer.body = body
            layer.keep(stays, layer.tail.lengths - counts)

    def stays(self, one: torch.Tensor, two: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Which tokens are too far apart to be merged, `(batch, kv_heads, slots)` bool, anything for empty slots.

        Args:
            one, two: keys `(batch, kv_heads, slots, head_dim)`. real: `(batch, kv_heads, slots)`, slots in use.
        """
        apart = distance(one, two)[..., 0].round(decimals=6)  # tokens that occur twice may differ by rounding
        low = apart.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
        high = apart.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
        return apart > high - self.gamma * (high - low)

    def decode(self, view, part):
        stored = view.fields(part)
        if part is view.layer.tail:
            return stored["key"], stored["value"]
        own = (view.layer_idx - int(self.start * len(view.run.cache.layers))) % 2
        return tuple(stored[name] * stored[f"{name}_norms"][..., own, None] for name in FIELDS)


def merged(one: torch.Tensor, two: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The common direction of vectors `(..., dim)`, of length 1, and the norm of each, `(..., 2)`, in their dtype."""
    dtype, both = one.dtype, [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (one, two)]
    norms = torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in both], dim=-1)
    apart, (one, two) = distance(*both), (F.normalize(x, dim=-1) for x in both)
    # sin((1 - t) angle) and sin(t angle), both divided by the angle, which may be 0
    arc = (1 - t) * torch.sinc((1 - t) * apart) * one + t * torch.sinc(t * apart) * two
    return F.normalize(arc, dim=-1).to(dtype), norms.to(dtype)


def distance(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The angle between vectors `(..., dim)` as a part of half a turn, `(..., 1)`, in float32 or better."""
    one, two = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (one, two))
    less, more = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (one - two, one + two))
    return 2 * torch.atan2(less, more) / torch.pi  # of nearly parallel vectors the arc cosine has half of the digits
