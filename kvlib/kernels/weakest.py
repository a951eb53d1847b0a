"""The entry to evict from each segment after a decoded token, found and marked in one launch.

In torch operations this is a dozen short launches, and while tokens come one by one launching is what takes the time.
The reference is `kvlib.core.method.weakest`, where scores hold no NaN.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _retire(SCORE, POSITIONS, INDEX, heads, slots, size, row_stride, head_stride, slot_stride, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    score = SCORE + (segment // heads).to(tl.int64) * row_stride + (segment % heads) * head_stride
    positions = POSITIONS + segment.to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    lowest = tl.full([BLOCK], float("inf"), SCORE.dtype.element_ty)
    latest = tl.full([BLOCK], -1, tl.int32)
    slot = tl.zeros([BLOCK], tl.int32)
    for start in range(0, slots, BLOCK):
        k = start + lane
        position = tl.load(positions + k, k < slots, -1)
        value = tl.load(score + k * slot_stride, (k < slots) & (position >= 0), float("inf"))
        better = (value < lowest) | ((value == lowest) & (position > latest))
        lowest = tl.where(better, value, lowest)
        latest = tl.where(better, position, latest)
        slot = tl.where(better, k, slot)
    latest = tl.where(lowest == tl.min(lowest, 0), latest, -2)
    weakest = tl.max(tl.where(latest == tl.max(latest, 0), slot, -1), 0)
    tl.store(positions + weakest, -1)
    tl.store(INDEX + segment, segment.to(tl.int64) * size + weakest)


def retire(score: torch.Tensor, positions: torch.Tensor, size: int, index: torch.Tensor | None = None) -> torch.Tensor:
    """Mark the entry of the lowest score in each segment as empty; of equal ones the latest.

    Args:
        score: `(batch, heads, slots)` float32 or float64; empty slots may hold anything.
        positions: flat int32 `(batch x heads x size,)`, of which the first `slots` of every segment are looked at; -1 =
            empty slot. Overwritten: -1 where an entry is evicted.
        index: where to write what is returned; by default new memory.

    Returns:
        Where it was in the flat tensors, `(batch x heads,)` int64.
    """
    batch, heads, slots = score.shape
    if index is None:
        index = torch.empty(batch * heads, dtype=torch.int64, device=score.device)
    with torch.cuda.device_of(score):
        _retire[(batch * heads,)](score, positions, index, heads, slots, size, *score.stride(), BLOCK)
    return index
