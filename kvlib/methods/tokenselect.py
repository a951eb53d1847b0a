"""TokenSelect: all heads vote which tokens to read, and like queries read the same ones (Wu et al., 2411.02886)."""

import torch
import torch.nn.functional as F

from kvlib.core import attention
from kvlib.core.method import Reader, highest, register, require, whole

AUTHORS = (128, 2048, 512)  # first tokens, chosen ones, newest ones


@register("tokenselect")
class TokenSelect(Reader):
    """The first and the newest tokens, and those between them that most heads vote for. Nothing is evicted.

    A head's vote is its softmax over the tokens between, of logits that are not scaled; votes are added up over all
    query heads of a layer, and all heads read the same tokens. As long as the queries of a layer (of all heads, one
    behind the other) are like those of its last vote, their cosine at least `similarity`, this vote stands; newest
    tokens are read all the same. Nothing is voted on while the budget has room for all. Prompts, later turns and
    questions are dense, and the token behind them votes anew.

    Followed: pzs19/TokenSelect 8e1e97f, `patcher/token_retrieval.py`, whose branch for votes that stand says what is
    meant, but cannot run as published (an argument is missing). Departures: query head h belongs to KV head h // groups
    as in the model, where their kernel takes h % kv_heads; votes are not rounded to bfloat16; their options of pooling
    votes and of rotating the query that votes are not there, nor is sparse prefill. What stands is decided on the
    device, so that votes are computed for every token; bytes are counted as read only where they decide.

    Args:
        sinks, recent: first and newest tokens that are read, of the budget; the rest is voted on. None: as the authors
            share out 128 + 2048 + 512, one and four of 21 parts, at least the newest token; their numbers themselves
            would be more than most budgets here.
        similarity: cosine from which on a vote stands.

    Raises:
        ValueError: for sinks < 0, recent < 1, and a similarity outside of (0, 1].
    """

    sinks: int | None = None
    recent: int | None = None
    similarity: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        require("sinks", self.sinks, self.sinks is None or whole(self.sinks, 0), "a number of tokens >= 0, or None")
        require("recent", self.recent, self.recent is None or whole(self.recent, 1), "a number of tokens >= 1, or None")
        cosine = isinstance(self.similarity, int | float) and not isinstance(self.similarity, bool)
        require("similarity", self.similarity, cosine and 0 < self.similarity <= 1, "a cosine in (0, 1]")

    def observe(self, view):
        if not (view.step.decoding or self.everything):
            dtype, batch = torch.promote_types(view.query.dtype, torch.float32), len(view.query)
            view.layer.rows["query"] = torch.zeros_like(view.query[:, :, 0].flatten(1), dtype=dtype)  # like no other
            view.layer.rows["vote"] = torch.zeros(batch, view.key.shape[2], dtype=dtype, device=view.device)

    def split(self, view) -> torch.Tensor:
        """First, newest, and all tokens that are read, `(3, batch)` on the CPU."""
        count = self.tokens(view, self.budget)
        sinks, recent = (count * part // sum(AUTHORS) for part in (AUTHORS[0], AUTHORS[2]))
        recent = view.clamp("recent", recent.clamp(min=1) if self.recent is None else self.recent, 1, count)
        sinks = view.clamp("sinks", sinks if self.sinks is None else self.sinks, 0, count - recent)
        return torch.stack([sinks, recent, count])

    @torch.no_grad()  # votes are kept from step to step, and would keep their graphs
    def select(self, view):
        rows, ends, positions = view.layer.rows, view.step.ends, view.positions[:, :1]
        sinks, recent, count = view.per_prompt("split", self.split)
        always = (positions < view.per_row(sinks)) | (positions >= view.per_row(ends) - view.per_row(recent))
        between = positions.masked_fill(always, -1).expand_as(view.positions)
        vote = attention.weights(view.query, view.key, between, scaling=1.0).nan_to_num().sum((1, 2))
        if more := vote.shape[1] - rows["vote"].shape[1]:
            rows["vote"] = F.pad(rows["vote"], (0, more))
        query = view.query.flatten(1).to(vote.dtype)
        stands = F.cosine_similarity(query, rows["query"]) >= self.similarity
        stands |= ends <= view.on_device(count)
        for name, new in (("vote", vote), ("query", query)):  # in place, where a captured step finds them again
            rows[name].copy_(rows[name].where(stands[:, None], new))
        view.note_read((between[:, 0] >= 0).sum(1) * ~stands * view.new_key[0].nbytes)
        score = rows["vote"][:, None].masked_fill(always, torch.inf)
        return highest(score, positions, count).expand(-1, view.key.shape[1], -1)
