"""KVzip: what the model looks at when it repeats the text stays (Kim et al., 2505.23416)."""

import torch

from kvlib.core import attention
from kvlib.core.method import Evictor, register, require, whole
from kvlib.methods.systems.kv_compress import keep_best

POSTFIX = 8  # of the chunk before, where the next one begins in the text


@register("kvzip")
class KVzip(Evictor):
    """The tokens that the model looks at when it is given the prompt a second time, whatever is asked later.

    After the prompt its text is read once more, chunk by chunk, each behind the whole prompt and forgotten again.
    Before a chunk stand `prompt_ids` and, from the second one on, the last 8 tokens of the chunk before. Score of a
    token: the most attention that any of these queries, in any query head of the group, gives it, where the softmax is
    over the first `sinks` tokens, the chunk, and the repetition so far. The first `sinks` tokens stay. The highest
    scores of all layers and heads are kept together, or, with `layerwise`, those of all heads of a layer. Reading
    costs two to four times as much as the prompt alone.

    Follows kvpress 0.5.5, `kvzip_press.py` (code). Departures: what goes is freed (kvpress masks it); the instruction
    to repeat needs a tokenizer, which a cache has not, so that it is an argument, the same for every chunk, and stands
    wholly before the 8 tokens (kvpress words it in two ways and ends with what the chat template puts before an
    answer); all of the text is repeated, the template's beginning included; scores in float32; no normalisation of
    KVzip+. A second turn repeats the whole text, and scores what is left of it. Nothing checks that a repetition behind
    the prompt fits the model's window.

    Args:
        chunk: tokens repeated at a time.
        sinks: how many of the first tokens stay, at most the budget.
        prompt_ids: token ids that ask for a repetition, before each chunk.

    Raises:
        ValueError: for a chunk < 1, sinks < 0, a `layerwise` that is no bool, `prompt_ids` that are no tuple of ids; in
            a block, where embeddings were passed in place of ids.
    """

    chunk: int = 2048
    sinks: int = 4
    layerwise: bool = False
    prompt_ids: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require("chunk", self.chunk, whole(self.chunk, 1), "a number of tokens >= 1")
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")
        require("layerwise", self.layerwise, isinstance(self.layerwise, bool), "True or False")
        if isinstance(self.prompt_ids, list):  # as tables write it
            object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        ids = isinstance(self.prompt_ids, tuple) and all(whole(i, 0) for i in self.prompt_ids)
        require("prompt_ids", self.prompt_ids, ids, "a tuple of token ids")

    def observe(self, view):
        if not view.step.probing:
            return
        start, at, end = view.run.cache.notes["repeats"], view.positions, view.per_row(view.prompt_tokens)
        inside = (at >= start) & (at < start + self.chunk)
        read = inside | (at < min(self.sinks, start)) | (at >= end)
        most = greatest(view.query, view.key, view.query_positions, at.where(read, -1), view.scaling)
        view.state["most"] = most.where(inside, view.state.get("most", 0.0))

    def compress(self, view):
        """Not yet: the text has to be repeated."""

    def finish(self, run):
        if not (run.step.ends_prompt and self.evicts):
            return
        text = [ids[:count] for ids, count in zip(run.cache.ids.tolist(), run.cache.tokens.tolist())]
        if any(-1 in ids for ids in text):
            raise ValueError("embeddings were passed in place of ids, and cannot be repeated")
        for start in range(0, max(map(len, text)), self.chunk):
            run.cache.notes["repeats"] = start
            run.probe(self.repetition(text, start).to(run.cache.ids.device))
        views = [run.view(layer) for layer in range(len(run.cache.layers))]
        budget = self.tokens(views[0], self.budget)
        first = views[0].clamp("sinks", self.sinks, 0, budget)
        for some in [[view] for view in views] if self.layerwise else [views]:
            keep_best(some, [view.protect(view.state["most"], first=first) for view in some], budget)

    def repetition(self, text: list[list[int]], start: int) -> torch.Tensor:
        """What is read to score the chunk from `start`, `(batch, new)`, -1 = padding.

        A shorter text, of which nothing is left, still needs a token: it scores nothing.
        """
        before = max(0, start - min(POSTFIX, self.chunk))
        rows = [[*self.prompt_ids, *ids[before : start + self.chunk]] or ids[-1:] for ids in text]
        width = max(map(len, rows))
        return torch.tensor([[-1] * (width - len(row)) + row for row in rows])


def greatest(query, key, query_positions, key_positions, scaling) -> torch.Tensor:
    """The most attention that each key gets from any query of its group, `(batch, kv_heads, slots)`.

    Arguments of `kvlib.core.attention.column_sums`.
    """
    most = torch.zeros(key.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=key.device)
    scaling = key.shape[-1] ** -0.5 if scaling is None else scaling
    for logits in attention.blocks(query, key, query_positions, key_positions, scaling, None):
        weights = logits.softmax(-1).nan_to_num_(0.0)  # rows of padding see nothing
        seen = most[..., : logits.shape[-1]]
        torch.maximum(seen, weights.amax((2, 3)), out=seen)
    return most
