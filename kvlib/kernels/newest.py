"""The newest keys and values of all segments, written where they belong in one launch, which counts them too.

In torch operations these are six short launches a layer, and in a captured step they take as long as attention to a
short list. The reference is what `kvlib.core.part.Part` does without it.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _write(
    KEY,
    VALUE,
    POSITIONS,
    NEW_KEY,
    NEW_VALUE,
    NEW_POSITIONS,
    STARTS,
    ENDS,
    HOLE,
    INDEX,
    heads,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    if HOLE is None:
        end = tl.load(ENDS + segment)
        at = tl.load(STARTS + segment) + end
        tl.store(ENDS + segment, end + 1)
    else:
        at = tl.load(HOLE + segment)
    d = tl.arange(0, PAD)
    tl.store(KEY + at * DIM + d, tl.load(NEW_KEY + segment * DIM + d, d < DIM), d < DIM)
    tl.store(VALUE + at * DIM + d, tl.load(NEW_VALUE + segment * DIM + d, d < DIM), d < DIM)
    tl.store(POSITIONS + at, tl.load(NEW_POSITIONS + segment // heads).to(tl.int32))
    tl.store(INDEX + segment, at)


def write(
    fields: dict[str, torch.Tensor],
    positions: torch.Tensor,
    chunk: dict[str, torch.Tensor],
    new_positions: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    hole: torch.Tensor | None,
) -> torch.Tensor:
    """Write one entry of each segment behind its last one, or in its hole.

    Args:
        fields: "key" and "value", flat `(allocated, head_dim)` of one dtype; positions: flat int32. Overwritten.
        chunk: "key" and "value" `(batch, kv_heads, 1, head_dim)`, new_positions: `(batch, 1)`.
        starts: where each segment begins, ends: slots of each in use, `(batch, kv_heads)` int64; ends are overwritten,
            by one more, unless a hole is filled.
        hole: `(batch x kv_heads,)` int64 in the flat tensors; None: there is none.

    Returns:
        Where they are in the flat tensors, `(batch x kv_heads,)` int64.
    """
    dim, index = fields["key"].shape[1], torch.empty(starts.numel(), dtype=torch.int64, device=starts.device)
    with torch.cuda.device_of(positions):
        _write[(starts.numel(),)](
            *(fields["key"], fields["value"], positions),
            *(x.contiguous() for x in (chunk["key"], chunk["value"], new_positions)),
            *(starts, ends, hole, index, starts.shape[1], dim, triton.next_power_of_2(dim)),
            num_warps=1,  # an end is read by all threads before one of them writes it
        )
    return index


def serves(fields: dict[str, torch.Tensor], chunk: dict[str, torch.Tensor], new_positions: torch.Tensor) -> bool:
    """Can the kernel write these? Arguments of `write`."""
    if fields.keys() != {"key", "value"} or new_positions.ndim != 2:
        return False
    key, value = fields["key"], fields["value"]
    new = {x.dtype for x in (value, *chunk.values())}
    return key.ndim == value.ndim == 2 and key.shape == value.shape and new == {key.dtype}
