"""How a model rotates its keys, read off the keys themselves, and turning rotated keys further."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvlib.core.support import attention_modules, decoder

NAME = "kvlib_keys"
TOKENS, POSITIONS = 4, 8  # of the prompt that is read to see a rotation


@dataclass(frozen=True, eq=False)
class Rotary:
    """Pairs of channels and how far each turns from one position to the next; other channels stay as they are.

    Attributes:
        channels: `(2 r,)`, the first channel of every pair, then the second ones.
        frequencies: `(r,)`, angle per position.
    """

    channels: torch.Tensor
    frequencies: torch.Tensor


def rotate(x: torch.Tensor, offset: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn rotary-encoded vectors by `offset` positions, in float32 or better.

    Args:
        x: `(..., head_dim)`, already rotated; offset: `(...)`, positions to move by, negative = towards the start.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, angle = rotary.channels.to(x.device), offset[..., None].to(dtype) * rotary.frequencies.to(x.device, dtype)
    first, second = x.to(dtype).index_select(-1, channels).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return x.to(dtype).expand(*turned.shape[:-1], -1).index_copy(-1, channels, turned).to(x.dtype)


def rotation(offset: torch.Tensor, rotary: Rotary, dim: int) -> torch.Tensor:
    """Matrices `(..., dim, dim)` with `x @ matrix == rotate(x, offset)`, for many vectors that turn alike."""
    dtype = torch.promote_types(rotary.frequencies.dtype, torch.float32)
    return rotate(torch.eye(dim, dtype=dtype, device=offset.device), offset[..., None], rotary)


def rotaries(model) -> list[Rotary | None]:
    """How each layer of the model rotates its keys; None where keys do not depend on the position.

    A short prompt tells: each row repeats one token, and attention adds nothing to the residual stream, so that keys
    differ by their position alone. They are compared with what each known layout makes of the first of them, with each
    set of frequencies that the model has: neighbouring channels or the two halves, in all of a head, or in its first or
    last channels.

    Raises:
        ValueError: if none fits, and for frequencies that change with the length of the text.
    """
    modules, model = attention_modules(model), decoder(model)
    words = model.get_input_embeddings().num_embeddings
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # offloaded: inputs are brought there
    ids = torch.arange(1, TOKENS + 1, device=device) * words // (TOKENS + 1)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.no_grad():
            model(input_ids=ids[:, None].expand(-1, POSITIONS), use_cache=False)
        keys = [module.__dict__.pop(NAME) for module in modules]
    finally:
        model.set_attn_implementation(before)
    layouts: dict[int, list] = {}
    return [fitting(module, key, layouts, model) for module, key in zip(modules, keys, strict=True)]


def note_key(module, query, key, value, *args, **kwargs):
    """An attention function that adds nothing to the residual stream and leaves the keys with the module."""
    module.__dict__[NAME] = key
    batch, heads, new, _ = query.shape
    return query.new_zeros(batch, new, heads, value.shape[-1]), None


AttentionInterface.register(NAME, note_key)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def fitting(module, key: torch.Tensor, layouts: dict, model) -> Rotary | None:
    """The layout that explains keys `(rows, kv_heads, positions, head_dim)` best."""
    dim = key.shape[-1]
    if dim not in layouts:
        layouts[dim] = [(None, "none"), *candidates(model, dim)]
    errors = [mismatch(key, rotary) for rotary, _ in layouts[dim]]
    best = min(range(len(errors)), key=errors.__getitem__)
    rotary, kind = layouts[dim][best]
    # wrong pairs turn the fast ones of them by whole radians; rounding, of whatever depth, is far below its square root
    fits = errors[best] < max(torch.finfo(key.dtype).eps, 2**-23) ** 0.5
    if not fits or kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{type(module).__name__} of layer {module.layer_idx}: keys cannot be moved to other positions "
            + (f"with rotary embedding {kind!r}" if fits else "(no known rotary embedding)")
        )
    return rotary


def candidates(model, dim: int) -> list[tuple[Rotary, str]]:
    """Every layout of the model's frequencies in heads of `dim` channels, with the kind of their rotary embedding."""
    found = []
    for module in model.modules():
        named = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        for name in named:
            prefix, here, rest = name.partition("inv_freq")
            if not here or rest or prefix.endswith(("original_", "long_")) or 2 * len(named[name]) > dim:
                continue
            frequencies, kind = named[name].detach().clone(), getattr(module, "rope_type", "default")
            kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
            channels = torch.arange(2 * len(frequencies), device=frequencies.device)
            for layout in (channels, channels.view(-1, 2).T.flatten()):
                for start in {0, dim - len(channels)}:
                    found.append((Rotary(layout + start, frequencies), kind))
    return found


def mismatch(key: torch.Tensor, rotary: Rotary | None) -> float:
    """How far keys are from the first one turned to their positions, in units of each channel's size.

    Directions are compared: what a model does to lengths is none of a rotation's business. Channels are made
    comparable because in some models few are a hundred times as large as the others.
    """
    key = F.normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1)
    offset = torch.arange(key.shape[2], device=key.device)
    turned = key[:, :, :1] if rotary is None else rotate(key[:, :, :1], offset, rotary)
    size = key.square().mean((0, 2), keepdim=True).clamp(min=1e-30)
    return float(((key - turned).square() / size).mean().sqrt())
