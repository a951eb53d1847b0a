"""Expected Attention: what queries to come would look at, if they are like those of the prompt (Devoto et al.,
2510.00636)."""

import torch

from kvlib.core.method import Evictor, register, require, whole
from kvlib.core.rotary import Rotary, rotaries, rotate


@register("expected_attention")
class ExpectedAttention(Evictor):
    """The tokens that a normal distribution of later queries is expected to attend to, times the norm of their values.

    Mean mu and covariance S of the prompt's queries are taken before rotation, without the first `sinks` of the text,
    and rotated by the mean rotation of the next `future` positions. A query head's score is the softmax over keys of
    k mu / sqrt(d) + k S k / (2 d), the logarithm of the expected exp(q k / sqrt(d)). Scores are averaged over the
    heads of a group and multiplied by ||v||_2. The first `sinks` tokens stay and take no part in the softmax.

    Follows kvpress 0.5.5 (code), which the authors have written. Queries are rotated back to get those before rotation.
    Departures: mean and covariance in float64, scores in float32 at least; the sinks leave one token of the budget to
    the score; later turns are judged by their own queries, of which kvpress has none.

    Args:
        future: how many positions the rotation is averaged over. sinks: first tokens.

    Raises:
        ValueError: for future < 1 or sinks < 0; on models whose rotation is not known (`kvlib.core.rotary`).
    """

    future: int = 512
    sinks: int = 4

    def __post_init__(self):
        super().__post_init__()
        require("future", self.future, whole(self.future, 1), "a number of positions >= 1")
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")

    def prepare(self, model):
        return rotaries(model) if self.evicts else None

    def observe(self, view):
        if not self.evicts or view.step.after_prompt or view.step.aside:
            return
        at, rotary, rows = view.query_positions, view.run.prepared[view.layer_idx], view.layer.rows
        counted = (at >= self.sinks)[:, None, :, None]
        query = view.query.to(torch.promote_types(view.query.dtype, torch.float32))
        query = query if rotary is None else rotate(query, -at[:, None].expand(query.shape[:3]), rotary)
        query = query.double().masked_fill(~counted, 0)
        found = {"queries": counted.sum((1, 2, 3)).double(), "sum": query.sum(2), "products": query.mT @ query}
        for name, x in found.items():
            rows[name] = rows[name] + x if name in rows else x

    def expected(self, view) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(batch, query_heads, head_dim)` and covariance `(..., head_dim, head_dim)` of queries to come."""
        rows, rotary = view.layer.rows, view.run.prepared[view.layer_idx]
        count = rows["queries"].clamp(min=1)[:, None, None]
        mean = rows["sum"] / count
        spread = rows["products"] / count[..., None] - mean[..., None] * mean[..., None, :]
        if rotary is not None:
            ahead = torch.arange(self.future, device=view.device)
            turns = mean_rotation(view.step.ends.to(view.device)[:, None] + ahead, rotary, mean.shape[-1])
            mean, spread = mean @ turns, turns.mT[:, None] @ spread @ turns[:, None]
        return mean, spread

    def first(self, view):
        return view.clamp("sinks", self.sinks, 0, self.budgets(view) - 1)

    def score(self, view):
        first = view.per_prompt("first", self.first)
        dtype = torch.promote_types(view.key.dtype, torch.float32)
        mean, spread = (x.to(dtype).unflatten(1, (-1, view.groups)) * view.scaling for x in self.expected(view))
        key = view.key.to(dtype)[:, :, None]
        logits = (key @ mean[..., None]).squeeze(-1) + ((key @ spread) * key).sum(-1) * (view.scaling / 2)
        outside = (view.positions < 0) | view.protect(torch.zeros_like(logits[:, :, 0]), first=first).isinf()
        weights = logits.masked_fill(outside[:, :, None], -torch.inf).softmax(-1).mean(2)
        norms = torch.linalg.vector_norm(view.value, dim=-1, dtype=dtype)
        return view.protect(weights.nan_to_num(0.0) * norms, first=first)

    def compress(self, view):
        super().compress(view)
        for name in ("queries", "sum", "products"):  # the next prompt begins anew
            view.layer.rows.pop(name, None)


def mean_rotation(offset: torch.Tensor, rotary: Rotary, dim: int) -> torch.Tensor:
    """The mean of `kvlib.core.rotary.rotation` over the offsets `(batch, offsets)`, `(batch, dim, dim)` in float64."""
    channels = rotary.channels.to(offset.device)
    angle = offset[..., None].double() * rotary.frequencies.to(offset.device).double()
    cos, sin = angle.cos().mean(1)[:, None], angle.sin().mean(1)[:, None]
    eye = torch.eye(dim, dtype=torch.float64, device=offset.device).repeat(len(offset), 1, 1)
    first, second = eye.index_select(-1, channels).chunk(2, dim=-1)
    return eye.index_copy(-1, channels, torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
