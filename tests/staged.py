"""The slow, obvious reading of a prompt whose tokens get fewer from one stage of layers to the next."""

import torch
from transformers import AttentionInterface


class Staged:
    """A prompt read by the stock layers one after the other, with fewer tokens from stage to stage.

    positions: per layer the tokens that it reads. logits: of the last one.
    """

    def __init__(self, model, ids, counts: dict[int, int], window: int, forced: set[int]):
        AttentionInterface.register("staged", self.attend)
        before, model.config._attn_implementation = model.config._attn_implementation, "staged"
        hidden, at = model.model.embed_tokens(ids), torch.arange(ids.shape[1])
        self.window, self.positions, self.seen = window, [], None
        for index, layer in enumerate(model.model.layers):
            if index in counts:
                others = [i for i, token in enumerate(at.tolist()) if token not in forced]
                chosen = sorted(others, key=lambda i: (-self.seen[i].item(), i))[: counts[index] - len(forced)]
                stay = sorted([*chosen, *(i for i, token in enumerate(at.tolist()) if token in forced)])
                hidden, at = hidden[:, stay], at[stay]
            self.positions.append(at.tolist())
            rotary = model.model.rotary_emb(hidden, at[None])
            hidden = layer(hidden, attention_mask=None, position_ids=at[None], position_embeddings=rotary)
            hidden = hidden if torch.is_tensor(hidden) else hidden[0]
        model.config._attn_implementation = before
        self.logits = model.lm_head(model.model.norm(hidden[:, -1:]))[0, 0]

    def attend(self, module, query, key, value, mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        weights = (scaling * query @ key.mT).masked_fill(future, -torch.inf).softmax(-1)
        self.seen = weights[0, :, -self.window :].sum((0, 1))
        return (weights @ value).transpose(1, 2), None
