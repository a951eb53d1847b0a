"""What methods share that store the older tokens of a layer otherwise than the newest ones."""

import torch

from kvlib.core.part import Part


def move(layer, chunk: dict[str, torch.Tensor], counts: torch.Tensor, group: int = 1) -> None:
    """Put the oldest entries of the tail, encoded, behind those of the body, and free them in the tail.

    Args:
        chunk: field -> `(batch, kv_heads, most, ...)`, what is stored of them; with a `group` > 1 of so many tokens
            together.
        counts: `(batch, kv_heads)` on the CPU, how many of them are real; `most` is the largest.
    """
    tail, tokens = layer.tail, counts * group
    at, most = tail.position_rectangle(), int(counts.max())
    places = at[:, :, : most * group]
    if layer.body is None:
        layer.body = Part(*tail.shape, at.device, group, layer.memo)
    layer.body.append(
        chunk, places if group == 1 else places.unflatten(2, (most, -1)), counts, skip=torch.zeros_like(counts)
    )
    newer = torch.arange(at.shape[-1], device=at.device) >= tokens[..., None].to(at.device)
    layer.keep(newer, tail.lengths - tokens)
