"""DefensiveKV: what the worst case over queries would miss (Feng et al., 2510.13334)."""

from functools import partial

import torch
import torch.nn.functional as F

from kvlib.core.attention import blocks
from kvlib.core.method import Evictor, register, require, strongest, whole
from kvlib.methods.adakv import wanted
from kvlib.methods.systems.critical_kv import mean_norms

MASS = 0.9  # of attention, which tokens of most attention carry that stay whatever their values


@register("defensive_kv")
class DefensiveKV(Evictor):
    """The largest attention from any of the last queries, not the mean, times ||W_O v||_1; heads share a budget.

    Attention of each of the last `window` queries is averaged over `kernel` neighbours, what the edges cut off given
    back; its maximum over queries and over the heads of a group, raised to at least its mean over the tokens of the
    head, is multiplied by the norm of the value after the output projection, as a share of that of all KV heads. First
    of all stay the window and, in each head, the tokens of most mean attention that carry MASS of it, the window's part
    included; then the highest scores of all heads of the layer, `kv_heads x budget` tokens in all.

    Follows FFY0/DefensiveKV 9251b95, `efficient_defensivekv_press.py` (code), which judges and evicts once. Departures:
    the window's part of attention is that of the window, in each row (the code, having cut the window off, takes that
    of the tokens before it, a mean over all rows); norms to 20 binary digits, and tokens of one score by position; the
    window takes at most half of the budget; later turns go by what each head has stored. Knowing how many tokens a head
    keeps costs one wait for the device.

    Args:
        window: queries. kernel: neighbours.

    Raises:
        ValueError: for a window < 1 or an even kernel; on models whose attention has no `o_proj`.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        require("window", self.window, whole(self.window, 1), "a number of queries >= 1")
        require("kernel", self.kernel, whole(self.kernel, 1) and self.kernel % 2 == 1, "an odd number of tokens")

    def observe(self, view):
        if not self.evicts:
            return
        norms = mean_norms(view, self.name)
        view.remember("norm", norms / norms.sum(1, keepdim=True))

    def recent(self, view):
        return view.clamp("window", self.window, 1, self.tokens(view, self.budget) // 2)

    def choose(self, view):
        window = self.recent(view)
        inside = view.protect(torch.zeros_like(view.state["norm"]), last=window).isinf()
        before = (view.positions >= 0) & ~inside
        room = torch.minimum(self.budgets(view), view.lengths) - torch.minimum(window[:, None], view.lengths)
        certain = inside | self.carrying(view, window, before, room)
        function = partial(peaks, before=before, kernel=self.kernel)
        worst = view.over_queries(function, window)
        for place in [x for x in view.step.sums if x[0] is function]:  # kept for those who ask again, and nobody can
            del view.step.sums[place]
        mean = worst.sum(-1, keepdim=True) / before.sum(-1, keepdim=True).clamp(min=1)
        score = (torch.maximum(worst, mean) * view.state["norm"]).masked_fill(certain, torch.inf)
        fixed = (certain & (view.positions >= 0)).sum(-1).cpu()
        total = torch.minimum(self.budgets(view), view.lengths).sum(1) - fixed.sum(1)
        lengths = fixed + wanted(score, view.positions, total)
        return strongest(score, view.positions, lengths), lengths

    def carrying(self, view, window, before, room) -> torch.Tensor:
        """Tokens of most mean attention, up to MASS of it and at most `room` in a head, `(batch, kv_heads, slots)`."""
        attention = view.column_sums(last=window).mean(2) * before
        mass = attention.sum(-1, keepdim=True)
        outside = mass.mean(1, keepdim=True) / view.per_row(window)
        share = attention.sort(dim=-1, descending=True).values.cumsum(-1) / mass
        count = (share < MASS - (1 - outside)).sum(-1)
        return strongest(attention, view.positions, torch.minimum(count, view.on_device(room)))


def peaks(query, key, query_positions=None, key_positions=None, scaling=None, *, before, kernel) -> torch.Tensor:
    """The largest pooled attention of each key from any query and head of its group, `(batch, kv_heads, slots)`.

    Args:
        before: `(batch, kv_heads, slots)` bool, keys that take part; the others as in `kvlib.core.attention.blocks`.
    """
    most = torch.zeros(before.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for logits in blocks(query, key, query_positions, key_positions, scaling, None):
        slots = logits.shape[-1]
        taking = before[:, :, None, None, :slots]
        weights = logits.softmax(-1).nan_to_num(0.0) * taking  # queries of padding see nothing
        pooled = F.avg_pool1d(weights.flatten(0, 2), kernel, stride=1, padding=kernel // 2).view_as(weights) * taking
        pooled *= (weights.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True)).nan_to_num(0.0)
        most[..., :slots] = torch.maximum(most[..., :slots], pooled.amax((2, 3)))
    return most
