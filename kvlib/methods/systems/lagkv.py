"""LagKV: tokens that stand out from those that follow them (Liang et al., 2504.04704)."""

import torch

from kvlib.core.method import Evictor, register, require, whole


@register("lagkv")
class LagKV(Evictor):
    """In every block of `lag` tokens those whose channels spread most on the scale of the next block.

    Behind the first `sinks` tokens the prompt is cut into blocks. Each channel of a block, of keys and of values, is
    scaled by the least and the largest entry of that channel in the next block; the standard deviation over channels
    goes through a softmax over the block, and the two of keys and values are averaged. A token's score is its rank in
    its block, so that all blocks keep about as many. The last whole block and what is left behind it stay, and so do
    the sinks. No query is looked at. Prompts of fewer than two blocks keep their sinks and their newest tokens.

    Follows kvpress 0.5.5 (code). Departures: of equal ranks in different blocks the earlier token stays, where theirs
    are told apart arbitrarily; a budget below what always stays keeps the sinks, all but one token at most, and the
    newest; a channel that does not vary in the next block is left out (theirs divides by 0); later turns cut what is
    stored into blocks.

    Args:
        sinks: first tokens. lag: tokens in a block.

    Raises:
        ValueError: for sinks < 0 or a lag < 2.
    """

    sinks: int = 4
    lag: int = 128

    def __post_init__(self):
        super().__post_init__()
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")
        require("lag", self.lag, whole(self.lag, 2), "a number of tokens >= 2")

    def score(self, view):
        slots, budget = view.positions.shape[-1], self.budgets(view)
        blocks = max(0, slots - self.sinks) // self.lag
        behind = (view.lengths - self.sinks).clamp(min=0)  # what is stored is in text order, without gaps
        first = view.clamp("sinks", self.sinks, 0, budget - 1)
        last = view.clamp("last", behind - self.lag * (behind // self.lag - 1).clamp(min=0), 0, budget - first)
        score = torch.zeros(view.positions.shape, device=view.device)
        if blocks > 1:
            start, end = self.sinks, self.sinks + blocks * self.lag
            cut = (x[:, :, start:end].unflatten(2, (blocks, self.lag)) for x in (view.key, view.value))
            total = sum(standing_out(x.to(torch.promote_types(x.dtype, torch.float32))) for x in cut)
            rank = total.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
            score[:, :, start : end - self.lag] = -rank.flatten(2).to(score.dtype)
        at, first, ends = torch.arange(slots, device=view.device), view.per_row(first), view.per_row(view.lengths)
        return score.masked_fill((at < first) | (at >= ends - view.per_row(last)), torch.inf)


def standing_out(x: torch.Tensor) -> torch.Tensor:
    """How far each token of a block spreads on the scale of the next block, `(..., blocks - 1, lag)`; sums to 1.

    Args:
        x: `(..., blocks, lag, head_dim)`.
    """
    low, high = x[..., 1:, :, :].amin(-2, keepdim=True), x[..., 1:, :, :].amax(-2, keepdim=True)
    width, size = high - low, torch.maximum(high.abs(), low.abs())
    width = width.masked_fill(width <= 1e-5 * size, torch.inf)  # equal but for rounding, which must not decide
    return ((x[..., :-1, :, :] - low) / width).std(-1).softmax(-1)
