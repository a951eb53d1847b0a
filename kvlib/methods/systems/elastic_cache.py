"""Elastic Cache: tokens that go are merged into their neighbours (Liu et al., 2407.18121)."""

import torch

from kvlib.core.method import Evictor, register, require, strongest, whole


@register("elastic_cache")
class ElasticCache(Evictor):
    """Tokens that got much attention, each with the mean of those nearest to it in the text.

    At the end of the prompt, in every layer, the same set for all heads: the first `sinks` tokens, the last one, and
    those of the rest that got most attention from all queries, summed over heads. Each other token is merged into the
    nearest of the latter, the earlier one of two: the key and the value of a token that stays become the mean of its
    own and all that are merged into it. While decoding, scores no longer count. Each new token drives out the one that
    is then the (`recent` + 1)th from the end, so that the newest `recent` stay beside the oldest of the compressed
    prompt.

    Follows liuzuyan/ElasticCache 860d9f4, `kv_cache.py` (code). Departures, where that code has slips: it compares
    indices of a sort where ranks are meant, and keeps an arbitrary set; it takes what is merged `sinks` tokens too
    early. Further: its evaluation counts decoded tokens in the share, so that the cache grows slowly, here it stays at
    the budget; if nothing but first tokens and the last one stays, these are merged into; the set is per row of the
    batch; a second turn, which it has not, adds up attention since the beginning and merges once more.

    Args:
        sinks: how many of the first tokens stay, at most all but one of the budget.
        recent: how many of the newest tokens stay while decoding, at most what the first ones leave.

    Raises:
        ValueError: for sinks < 0 or recent < 1.
    """

    sinks: int = 4
    recent: int = 25
    evicts_in_decode = True

    def __post_init__(self):
        super().__post_init__()
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")
        require("recent", self.recent, whole(self.recent, 1), "a number of tokens >= 1")

    def observe(self, view):
        if not view.step.after_prompt:
            view.accumulate("attention", view.importance().sum(2))

    def first(self, view):
        return view.clamp("sinks", self.sinks, 0, self.budgets(view) - 1)

    def newest(self, view):
        return view.clamp("recent", self.recent, 1, self.budgets(view) - view.per_prompt("sinks", self.first))

    def score(self, view):
        if view.step.after_prompt:
            newer = view.positions.argsort(dim=-1, descending=True).argsort(dim=-1)
            inside = newer < view.per_row(view.per_prompt("recent", self.newest))
            return (-view.positions.float()).masked_fill(inside, torch.inf)
        attention = view.state["attention"].sum(1, keepdim=True).expand_as(view.positions)
        return view.protect(attention, first=view.per_prompt("sinks", self.first), last=1)

    def compress(self, view):
        lengths = torch.minimum(view.per_prompt("budgets", self.budgets), view.lengths)
        if not (view.step.ends_prompt and self.evicts) or torch.equal(lengths, view.lengths):
            return super().compress(view)
        score, real, tail = self.score(view), view.positions >= 0, view.layer.tail
        stays = strongest(score, view.positions, lengths)
        chosen = stays & ~score.isinf()
        chosen |= stays & ~chosen.any(-1, keepdim=True)
        into = torch.arange(score.shape[-1], device=score.device).where(stays, nearest(view.positions, chosen))
        for name, x in view.fields(tail).items():
            tail.put(tail.fields, name, means(x, into, real))
        view.layer.keep(stays, lengths)


def nearest(at: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """For every slot the `chosen` one nearest in the text, the earlier of two; `(batch, heads, slots)` as both are.

    Args:
        at: positions, ascending, then -1.
    """
    slots = at.shape[-1]
    here, none = torch.arange(slots, device=at.device), 2**31 - 1
    before = here.where(chosen, -1).cummax(-1).values
    after = here.where(chosen, slots).flip(-1).cummin(-1).values.flip(-1)
    back = (at - at.gather(-1, before.clamp(min=0))).masked_fill(before < 0, none)
    ahead = (at.gather(-1, after.clamp(max=slots - 1)) - at).masked_fill(after == slots, none)
    return before.where(back <= ahead, after).clamp(0, slots - 1)


def means(x: torch.Tensor, into: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """For every slot the mean of all `real` entries of `x` `(batch, heads, slots, dim)` that go `into` it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    index = into[..., None].expand_as(x)
    total = torch.zeros_like(x, dtype=dtype).scatter_add_(2, index, x.to(dtype).masked_fill(~real[..., None], 0))
    count = torch.zeros_like(total[..., 0]).scatter_add_(2, into, real.to(dtype))
    return (total / count.clamp(min=1)[..., None]).to(x.dtype)
