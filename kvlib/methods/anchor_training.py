"""What a model computes while it is trained for AnchorCoder: masks over everything, with gradients, nothing stored.

Two kernels compute the same. "sdpa" takes masks as they are. "flex" takes them by blocks, and leaves out those in which
nothing is seen: in a TAA layer nearly all. It is compiled, for a GPU. A layer that sees everything needs no mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvlib.core.method import require
from kvlib.core.rotary import rotate
from kvlib.core.support import kv_heads
from kvlib.methods.anchorcoder import AnchorCoder, marks
from kvlib.methods.anchors import lines, moves, visible

NAME = "kvlib_anchored"
KERNELS = ("sdpa", "flex")


class Pass:
    """One batch of token ids `(batch, tokens)` without padding, read at once.

    source: keys and values of the second layer, when it has been there.
    """

    def __init__(self, model, prepared, ids: torch.Tensor, kernel: str):
        self.settings, self.rotary, bos = prepared
        self.marked = marks(ids, self.settings.anchor, bos)
        self.positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.begins, _ = lines(self.marked, self.positions, self.positions.new_zeros(len(ids)))
        spread = self.settings.spread
        self.moves = moves(self.marked, self.positions, self.begins, kv_heads(model)) if spread else None
        self.source, self.kernel, self.masks = None, kernel, {}

    def attend(self, module, query, key, value, scaling, dropout):
        settings, layer = self.settings, module.layer_idx
        if self.moves is not None and self.rotary[layer] is not None:
            key = rotate(key, self.moves, self.rotary[layer])
        if layer == settings.source:
            self.source = key, value
        full = (settings.full(layer),)
        if settings.beyond is not None and layer > settings.beyond:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), self.source))
            full += (full[0] and settings.full(settings.source),)
        if full not in self.masks:
            self.masks[full] = self.blocks(full) if self.kernel == "flex" and full != (True,) else self.mask(full)
        mask = self.masks[full]
        if self.kernel == "sdpa" or mask is None:
            return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
        attention = compiled() if query.is_cuda else flex_attention
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotation leaves them in float32
        output = attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        return output.transpose(1, 2), None

    def mask(self, full: tuple[bool, ...]) -> torch.Tensor | None:
        """What queries see, `(batch, 1, tokens, tokens or twice)`: of the layer, and of a second one behind it.

        full: does a query see everything of each? None: a flag of the kernel does.
        """
        if full == (True,):
            return None
        at = self.positions
        causal = at[:, None] <= at[:, :, None]
        seen = [causal if everything else visible(at, self.marked, at, self.begins) for everything in full]
        return torch.cat(seen, dim=-1)[:, None]

    def blocks(self, full: tuple[bool, ...]):
        """The same for `flex_attention`."""
        marked, begins, tokens = self.marked, self.begins, self.marked.shape[1]
        second = full[-1]

        def seen(row, head, query, key):
            at = key % tokens
            anchored = marked[row, at] | (at == 0) | (at >= begins[row, query])
            return (at <= query) & (torch.where(key < tokens, full[0], second) | anchored)

        return create_block_mask(seen, len(marked), None, tokens, len(full) * tokens, device=marked.device)


@cache
def compiled() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@contextmanager
def training(model, method: AnchorCoder, kernel: str = "sdpa") -> Iterator[None]:
    """Inside the block `model(input_ids, use_cache=False)` has the attention with which `method` decodes.

    Its logits are those of `with method(model)`, token by token: what the method frees is what these masks hide. Rows
    are packed: without padding, and documents in one row see each other's anchors.

    Args:
        kernel: "sdpa" or "flex".

    Raises:
        ValueError: as the method, when it is entered; for another kernel; without token ids; for padding.
    """
    require("kernel", kernel, kernel in KERNELS, " or ".join(map(repr, KERNELS)))
    prepared, before, passes = method.prepare(model), model.config._attn_implementation, []

    def begin(model, args, kwargs):
        given = dict(zip(("input_ids", "attention_mask"), args)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            raise ValueError("anchors are found by their token ids; the model was given embeddings")
        if mask is not None and not bool(mask.all()):
            raise ValueError("padding: texts are packed in rows of one length")
        passes[:] = [Pass(model, prepared, ids, kernel)]

    @torch.compiler.disable  # which layer it is, and what it has seen of this pass, is not for a graph
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
