"""SubGen as its experiments have it: tokens whose keys are far from each other (Zandieh et al., 2402.06082)."""

import torch

from kvlib.core.method import Evictor, register, require, whole


@register("subgen")
class SubGen(Evictor):
    """The newest tokens, and of the others those whose keys stand for all of them: greedy k-center.

    At the end of the prompt, in every KV head for itself: the first token is the first centre, each next one is the
    token whose key is farthest from its nearest centre, by Euclidean distance, until the budget is full. No query is
    looked at, attention to what is kept is as always, and nothing changes while decoding; a later turn chooses anew
    from what is left. This is what the experiments
    evaluate; the streaming estimator of the paper's analysis is `subgen_sampled`.

    No code of the authors is known: the rule is second hand, which token is the first centre and how many of the newest
    stay beside the centres is ours. Departures: the newest tokens are no candidates, where the rule is over all keys.
    One centre follows the other, which takes as many short passes over the keys as there are centres.

    Args:
        recent: how many of the newest tokens stay; at most half of the budget. They are no candidates for centres.

    Raises:
        ValueError: for recent < 0.
    """

    recent: int = 32

    def __post_init__(self):
        super().__post_init__()
        require("recent", self.recent, whole(self.recent, 0), "a number of tokens >= 0")

    def score(self, view):
        budget = self.tokens(view, self.budget)
        recent = view.clamp("recent", self.recent, 0, budget // 2)
        inside = view.protect(torch.zeros(view.positions.shape, device=view.device), last=recent).isinf()
        rank = spread_out(view.key, (view.positions >= 0) & ~inside, int((budget - recent).max()))
        return (-rank).masked_fill(inside, torch.inf)


def spread_out(key: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """In which order greedy k-center takes tokens: 0, 1, ... for the first `count`, `count` for all others.

    Ties go to the earlier slot; the first one is that of the first candidate.

    Args:
        key: `(batch, heads, slots, dim)`. candidates: `(batch, heads, slots)`.

    Returns:
        `(batch, heads, slots)` in float32, as a score is.
    """
    key = key.to(torch.promote_types(key.dtype, torch.float32)).masked_fill(~candidates[..., None], 0)
    rank = torch.full(candidates.shape, float(count), device=key.device)
    gap = torch.full_like(key[..., 0], torch.inf).masked_fill(~candidates, -1)  # squared; -1: not to be taken
    for number in range(min(count, key.shape[2])):
        best = gap.argmax(-1, keepdim=True)
        left = gap.gather(-1, best) >= 0  # where candidates have run out nothing is taken
        rank.scatter_(-1, best, rank.gather(-1, best).masked_fill(left, number))
        centre = key.gather(2, best[..., None].expand(-1, -1, 1, key.shape[-1]))
        gap = torch.minimum(gap, (key - centre).square().sum(-1)).scatter(-1, best, -1.0)
    return rank
