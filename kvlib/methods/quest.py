"""Quest: pages of tokens, and the greatest logit that one of a page's keys could have (Tang et al., 2406.10774)."""

import torch
import torch.nn.functional as F

from kvlib.core.method import Reader, highest, register, require, whole

LEAST = 3  # pages


@register("quest")
class Quest(Reader):
    """The pages whose keys may match the query best. Nothing is evicted: a decoded token reads less.

    Of every page of `page` tokens the least and the greatest key entry of each channel are known, l and h. No logit of
    the page exceeds the sum over channels of max(q l, q h); each query head reads the page of the newest token and the
    others of the highest bounds, max(3, budget // page) in all. Prompts, later turns and questions are dense.

    Followed: mit-han-lab/Quest 01c1623, the mask in its `evaluation/quest_attention.py` for the first two layers, the
    number of pages and the choice per query head (a page may be read once for every head of a group), and the
    controller of its kernels for the page of the newest token, which competes in the mask, and for leaving bounds alone
    as long as all pages are read. Departures: a bound is read once per KV head (their kernels have no groups), and
    bounds of the newest token's page, which are not needed, not at all.

    Args:
        page: tokens of a page.
        dense: first layers that read everything.

    Raises:
        ValueError: for page < 1 and dense < 0.
    """

    page: int = 16
    dense: int = 2

    def __post_init__(self):
        super().__post_init__()
        require("page", self.page, whole(self.page, 1), "a number of tokens >= 1")
        require("dense", self.dense, whole(self.dense, 0), "a number of layers >= 0")

    def observe(self, view):
        """Work out the bounds `(batch, kv_heads, pages, head_dim)` of pages with new tokens, from all of their keys."""
        if self.everything or view.layer_idx < self.dense or not int(view.tokens.max()):  # a chunk may be all padding
            return
        ends, counts, new = view.step.ends, view.on_device(view.step.counts), view.query.shape[2]
        touched = torch.arange((new + self.page - 2) // self.page + 1, device=view.device)
        page = ((ends - counts) // self.page)[:, None] + touched
        page = torch.minimum(page, (ends[:, None] - 1) // self.page).clamp(min=0)
        slots = page[..., None] * self.page + torch.arange(self.page, device=view.device)
        row = torch.arange(len(ends), device=view.device)[:, None]
        keys = view.key.transpose(1, 2)[row[..., None], slots.clamp(max=view.key.shape[2] - 1)]
        empty = (slots >= ends[:, None, None])[..., None, None]
        low, high = keys.masked_fill(empty, torch.inf).amin(2), keys.masked_fill(empty, -torch.inf).amax(2)
        for name, bound in (("low", low), ("high", high)):
            known = view.layer.rows.get(name, bound[:, :0].transpose(1, 2))
            missing = (view.key.shape[2] - 1) // self.page + 1 - known.shape[2]
            known = view.layer.rows[name] = F.pad(known, (0, 0, 0, missing)) if missing > 0 else known
            known.transpose(1, 2)[row, page] = bound  # in place, where a captured step finds them again

    def select(self, view):
        if view.layer_idx < self.dense:
            return None
        low, high = view.layer.rows["low"], view.layer.rows["high"]
        bound = greatest(view.query[:, :, 0].unflatten(1, (-1, view.groups)), low, high).flatten(1, 2)
        count = view.per_prompt("pages", self.pages)
        page, newest = torch.arange(bound.shape[-1], device=view.device), (view.step.ends - 1) // self.page
        best = highest(bound, page.where(page < view.per_row(newest), -1), count - 1)
        best = torch.cat([best, view.per_row(newest).expand(-1, bound.shape[1], -1)], dim=-1)
        view.note_read(newest * (newest >= view.on_device(count)) * (2 * low[0, :, 0].nbytes))
        slots = (best[..., None] * self.page + torch.arange(self.page, device=view.device)).flatten(2)
        return slots.where((slots >= 0) & (slots < view.per_row(view.step.ends)), -1)

    def pages(self, view) -> torch.Tensor:
        """Pages that a query head reads, `(batch,)` on the CPU."""
        return view.clamp("pages", self.tokens(view, self.budget) // self.page, low=LEAST)


def greatest(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The sum over channels of max(q l, q h), in float32 at least: of rounded bounds too many would be alike.

    Args:
        query: `(..., queries, dim)`. low, high: `(..., pages, dim)`.

    Returns:
        `(..., queries, pages)`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    query, low, high = (x.to(exact) for x in (query, low, high))
    if query.is_cuda:  # where what is as large as all pages times all queries times `dim` takes most of a step
        return by_sign(query, low, high)
    query, low, high = query[..., None, :], low[..., None, :, :], high[..., None, :, :]
    return torch.maximum(query * low, query * high).sum(-1)


def by_sign(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`greatest` as two products of matrices: what is positive in a query meets h, what is negative l."""
    return query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
