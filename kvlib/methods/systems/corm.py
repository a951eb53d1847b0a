"""CORM: keys that no recent query has looked at go (Dai et al., 2404.15949)."""

import torch

from kvlib.core.attention import blocks
from kvlib.core.method import Method, register, require, whole


@register("corm")
class Corm(Method):
    """Tokens that the last queries have found minor are evicted, as many as there are: there is no budget.

    A key is minor to the query of token t (counted from 1) if its attention is below 1 / t, what it would be if all
    were alike. It goes once it was minor to each of the last `window` queries, unless it is one of the last `recent`
    tokens. For every key one number is remembered: queries in a row that have found it minor. A prompt is read in full
    and judged by its last `window` queries; later tokens are judged one by one, and so is a question about a document.

    No code was found; definitions and defaults are those of a translation of the paper's first version. Our reading: of
    a group of query heads any one can make a key important; t counts the whole text, evicted tokens included; a key is
    not judged by queries from before it was there, so that it stays for `window` queries at least. How long segments
    are follows from attention, and knowing it costs one wait for the device at every step.

    Args:
        window: queries that have to agree. recent: tokens that stay whatever their attention.

    Raises:
        ValueError: for a window or a recent < 1.
    """

    window: int = 256
    recent: int = 256
    evicts_in_decode = True
    weighs = True

    def __post_init__(self):
        require("window", self.window, whole(self.window, 1), "a number of queries >= 1")
        require("recent", self.recent, whole(self.recent, 1), "a number of tokens >= 1")

    @property
    def evicts(self):
        return True

    def observe(self, view):
        before = view.state.get("minor", torch.zeros_like(view.positions))
        if view.step.decoding:
            found = minor(view.column_sums(), view.per_row(view.step.ends)[:, :, None]).all(2)
            view.state["minor"] = (before + 1).where(found, 0)
        elif view.step.ends_prompt or view.step.ends_question:
            view.state["minor"] = self.judged(view, before)

    def judged(self, view, before: torch.Tensor) -> torch.Tensor:
        """`before`, queries in a row that have found a key minor, `(batch, kv_heads, slots)`, after the last ones."""
        query, at = view.recent_queries(self.window)
        asked = (at >= 0).sum(1)[:, None, None]
        latest = torch.zeros_like(before)  # of these queries the last one to which a key was not minor, from 1
        end = 0
        for logits in blocks(query, view.key, at, view.positions, view.scaling, None):
            start, end, slots = end, end + logits.shape[3], logits.shape[4]
            number = at[:, None, None, start:end, None]
            important = ~minor(logits.softmax(-1), number + 1).all(2) & (number[:, 0] >= 0)
            order = torch.arange(start + 1, end + 1, device=before.device, dtype=before.dtype)
            latest[..., :slots] = torch.maximum(latest[..., :slots], (important * order[:, None]).amax(2))
        first = view.per_row(view.step.ends) - asked
        before_it = view.positions - first  # queries from before a key was there
        late = (before_it + query.shape[2] - asked).where(before_it > 0, 0)
        latest = torch.maximum(latest, late.to(latest.dtype))
        return (query.shape[2] - latest).where(latest > 0, before + asked).to(before.dtype)

    def compress(self, view):
        ends = view.per_row(view.step.ends)
        stays = (view.state["minor"] < self.window) | (view.positions >= ends - self.recent)
        stays &= view.positions >= 0
        lengths = stays.sum(-1).cpu()
        if not torch.equal(lengths, view.lengths):
            view.layer.keep(stays, lengths)


def minor(attention: torch.Tensor, number) -> torch.Tensor:
    """Is `attention` below 1 / `number`? Where all are alike it is not, however it was rounded."""
    return attention * number < 1 - 1e-6
