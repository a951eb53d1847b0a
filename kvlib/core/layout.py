"""Where the entries of segments are in flat tensors and in rectangles; see `kvlib.core.part` for these words.

All of it follows from lengths and capacities `(batch, kv_heads)` on the CPU.
"""

import torch


def starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each segment begins in a flat tensor, in the shape of `lengths`."""
    return (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)


def segments(lengths: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a flat tensor without room: each entry's segment, and its place within it, both `(stored,)`."""
    total, counts = int(lengths.sum()), lengths.flatten().to(device)
    numbers = torch.arange(len(counts), device=device)
    segment = torch.repeat_interleave(numbers, counts, output_size=total)
    return segment, torch.arange(total, device=device) - starts(counts)[segment]


def places(lengths: torch.Tensor, capacity: torch.Tensor, device) -> torch.Tensor:
    """Where the entries are in a flat tensor with room: `(stored,)`."""
    segment, place = segments(lengths, device)
    return starts(capacity).flatten().to(device)[segment] + place


def slots(lengths: torch.Tensor, capacity: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For a rectangle: each slot's entry in the flat tensor, and whether it holds one, `(batch, kv_heads, slots)`."""
    place, lengths = torch.arange(int(lengths.max()), device=device), lengths.to(device)
    filled = place < lengths[..., None]
    return (starts(capacity).to(device)[..., None] + place).where(filled, 0), filled


def sources(
    lengths: torch.Tensor, capacity: torch.Tensor, counts: torch.Tensor, skip: torch.Tensor, new: int, device
) -> torch.Tensor:
    """For longer segments: where their entries are in the flat tensor with a chunk of `new` columns behind it.

    Args:
        lengths, capacity: of the segments so far. counts, skip: as in `Part.append`.
    """
    segment, place = segments(lengths + counts, device)
    old = lengths.flatten().to(device)
    chunk = int(capacity.sum()) + new * torch.arange(len(old), device=device) + skip.flatten().to(device)
    place_in_chunk = place - old[segment]
    in_flat = starts(capacity).flatten().to(device)[segment] + place
    return torch.where(place_in_chunk < 0, in_flat, chunk[segment] + place_in_chunk)


def take(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries `index` of a flat tensor."""
    if flat.is_cuda and flat.ndim == 2 and not flat.requires_grad:
        from kvlib.kernels import rows  # Triton is there with CUDA builds of torch only

        return rows.take(flat, index)
    return flat[index]
