"""What a model computes while it is trained for AnchorCoder: masks over everything, with gradients, nothing stored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvlib.core.rotary import rotate
from kvlib.core.support import kv_heads
from kvlib.methods.anchorcoder import AnchorCoder
from kvlib.methods.anchors import lines, moves, visible

NAME = "kvlib_anchored"


class Pass:
    """One batch of token ids `(batch, tokens)` without padding, read at once.

    masks: layer is full, and so is its second layer -> what its queries see, `(batch, 1, tokens, tokens or twice)`;
    the first half is the layer's own. source: keys and values of the second layer, when it has been there.
    """

    def __init__(self, model, prepared, ids: torch.Tensor):
        self.settings, self.rotary, bos = prepared
        marked = ids == self.settings.anchor
        marked = marked if bos is None else marked | (ids == bos)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begins, _ = lines(marked, positions, positions.new_zeros(len(ids)))
        self.moves = moves(marked, positions, begins, kv_heads(model)) if self.settings.spread else None
        causal = (positions[:, None] <= positions[:, :, None])[:, None]
        self.masks = {True: causal, False: visible(positions, marked, positions, begins)[:, None]}
        self.source = None

    def attend(self, module, query, key, value, scaling, dropout):
        settings, layer = self.settings, module.layer_idx
        if self.moves is not None and self.rotary[layer] is not None:
            key = rotate(key, self.moves, self.rotary[layer])
        if layer == settings.source:
            self.source = key, value
        full = settings.full(layer)
        mask = self.masks[full]
        if settings.beyond is not None and layer > settings.beyond:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), self.source))
            mask = torch.cat([mask, self.masks[full and settings.full(settings.source)]], dim=-1)
        elif full:
            mask = None  # a flag of the kernel
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)


@contextmanager
def training(model, method: AnchorCoder) -> Iterator[None]:
    """Inside the block `model(input_ids, use_cache=False)` has the attention with which `method` decodes.

    Its logits are those of `with method(model)`, token by token: what the method frees is what these masks hide. Rows
    are packed: without padding, and documents in one row see each other's anchors.

    Raises:
        ValueError: as the method, when it is entered; without token ids; for padding.
    """
    prepared, before, passes = method.prepare(model), model.config._attn_implementation, []

    def begin(model, args, kwargs):
        given = dict(zip(("input_ids", "attention_mask"), args)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            raise ValueError("anchors are found by their token ids; the model was given embeddings")
        if mask is not None and not bool(mask.all()):
            raise ValueError("padding: texts are packed in rows of one length")
        passes[:] = [Pass(model, prepared, ids)]

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        return passes[0].attend(module, query, key, value, scaling, dropout)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        hook.remove()
