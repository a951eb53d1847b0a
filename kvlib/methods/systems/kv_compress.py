"""KV-Compress: one budget for all layers and heads, shared by squared attention (Rehg, 2410.00161)."""

import torch
import torch.nn.functional as F

from kvlib.core import attention
from kvlib.core.method import Evictor, register, require, strongest, whole


@register("kv_compress")
class KVCompress(Evictor):
    """The tokens of highest score in all layers and KV heads together: one that is looked at little keeps little.

    Score: squared attention of the prompt's last `window` queries, summed over them; of that the maximum over `kernel`
    neighbouring tokens, for every query head; summed over the query heads of a group. The newest `protected` tokens
    stay in every head and count in the budget. What is stored is layers x heads x budget tokens exactly, and how many
    of them a head gets is known when the last layer has been read, for one wait for the device.

    Follows IsaacRe/vllm-kvcompress 5e2a639, `kvcompress/metrics.py`, and `attention/backends/flash_attn.py` of 4701cb9
    (code), with the defaults of the latter; `protected` is its example's. Departures: no pages, or pages of one token
    (theirs evict whole ones and count a page by its best token); ties go to the earlier token, of one token to the
    first layer and head; one eviction, at the end of the prompt (theirs may go on while decoding); no bias of heads and
    no distance below which attention does not count, which are options there.

    Args:
        protected: how many of the newest tokens stay, at most the budget.

    Raises:
        ValueError: for a window < 1, an even kernel, or protected < 0.
    """

    window: int = 32
    kernel: int = 7
    protected: int = 32

    def __post_init__(self):
        super().__post_init__()
        require("window", self.window, whole(self.window, 1), "a number of queries >= 1")
        require("kernel", self.kernel, whole(self.kernel, 1) and self.kernel % 2 == 1, "an odd number of tokens")
        require("protected", self.protected, whole(self.protected, 0), "a number of tokens >= 0")

    def observe(self, view):
        if view.step.ends_prompt and self.evicts:
            sums = view.over_queries(squares, last=self.window)
            pooled = F.max_pool1d(sums.flatten(1, 2), self.kernel, stride=1, padding=self.kernel // 2)
            view.state["squares"] = pooled.view_as(sums).sum(2)

    def compress(self, view):
        """Not yet: all layers have to be known."""

    def finish(self, run):
        if run.step.ends_prompt and self.evicts:
            views = [run.view(layer) for layer in range(len(run.cache.layers))]
            budget = self.tokens(views[0], self.budget)
            last = views[0].clamp("protected", self.protected, 0, budget)
            keep_best(views, [view.protect(view.state["squares"], last=last) for view in views], budget)


def keep_best(views: list, scores: list[torch.Tensor], budget: torch.Tensor) -> None:
    """Keep the highest scores of all heads of all `views` together, `budget` `(batch,)` times as many as heads.

    Ties go to the earlier token, of one token to the first view and head.

    Args:
        scores: `(batch, kv_heads, slots)` of each view.
    """
    width, device = max(score.shape[-1] for score in scores), scores[0].device

    def together(rectangles):
        return torch.cat([F.pad(x.to(device), (0, width - x.shape[-1]), value=-1) for x in rectangles], dim=1)

    score, at = together(scores), together([view.positions for view in views]).long()
    heads = score.shape[1]
    place = at * heads + torch.arange(heads, device=device)[:, None]  # < 0 in empty slots
    total = torch.minimum(budget * heads, sum(view.lengths.sum(1) for view in views))
    best = strongest(score.flatten(1)[:, None], place.flatten(1)[:, None], total[:, None]).view_as(score)
    parts = [len(view.lengths[0]) for view in views]
    for view, mask, counts in zip(views, best.split(parts, dim=1), best.sum(2).cpu().split(parts, dim=1)):
        view.layer.keep(mask[..., : view.positions.shape[-1]].to(view.device), counts)


def squares(query, key, query_positions=None, key_positions=None, scaling=None) -> torch.Tensor:
    """`kvlib.core.attention.column_sums` of squared attention, `(batch, kv_heads, group, slots)`; its arguments."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(*key.shape[:2], query.shape[1] // key.shape[1], key.shape[2], dtype=dtype, device=key.device)
    scaling = key.shape[-1] ** -0.5 if scaling is None else scaling
    for logits in attention.blocks(query, key, query_positions, key_positions, scaling, None):
        weights = logits.softmax(-1).nan_to_num_(0.0)  # rows of padding see nothing
        total[..., : logits.shape[-1]] += weights.square_().sum(-2)
    return total
