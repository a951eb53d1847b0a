"""Readers as a mask: the stock model with its own cache, whose attention hides what a function does not choose."""

import torch
from transformers import AttentionInterface, DynamicCache


class Masked:
    """Logits of passes `(1, tokens)` over one cache.

    Attributes:
        choose: function of (layer, queries `(query_heads, new, head_dim)`, keys `(kv_heads, tokens, head_dim)` of all
            tokens so far, scaling) that returns the positions that each query head reads, a set each, or None for all.
        sets: layer -> what it chose last.
    """

    def __init__(self, model, choose):
        self.model, self.choose, self.cache, self.sets = model, choose, DynamicCache(), {}

    def attend(self, module, query, key, value, mask, scaling=None, **kwargs):
        new, heads = query.shape[2], key.shape[1]
        logits = torch.einsum("hgqd,hkd->hgqk", query[0].unflatten(0, (heads, -1)), key[0]) * scaling
        hidden = torch.ones(new, key.shape[2], dtype=torch.bool).triu(key.shape[2] - new + 1)
        chosen = self.sets[module.layer_idx] = self.choose(module.layer_idx, query[0], key[0], scaling)
        if chosen is not None:
            hidden = torch.ones(query.shape[1], 1, key.shape[2], dtype=torch.bool)
            for head, positions in enumerate(chosen):
                hidden[head, 0, sorted(positions)] = False
            hidden = hidden.unflatten(0, (heads, -1))
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hgqk,hkd->qhgd", weights, value[0]).flatten(1, 2)[None], None

    def __call__(self, ids):
        AttentionInterface.register("masked", self.attend)
        before, self.model.config._attn_implementation = self.model.config._attn_implementation, "masked"
        try:
            return self.model(ids, past_key_values=self.cache).logits[:, -1]
        finally:
            self.model.config._attn_implementation = before
