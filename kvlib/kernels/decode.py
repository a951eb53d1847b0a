"""Attention of one decoded token over packed segments, or over lists of their slots, on a GPU.

Each segment, or list, is split; a program works through one split for all query heads that read it, and a second kernel
combines the splits by their log-sum-exps. Lengths are read on the device and all shapes follow from a bound on them, so
that a captured step (`kvlib.core.capture`) can replay it.

What is stored may be 8-bit codes with a scale for each slot. It serves the core through `kvlib.core.packed`. The
reference is `kvlib.core.attention.weights` of the rectangle, or of what `View.gathered` gathers, and their product with
the values.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LEAST_ROWS = 16  # of a tensor core's tile: a group with fewer query heads is padded
PARTS = 32  # splits that are combined at a time
LN2 = tl.constexpr(math.log(2))


class Tiling(NamedTuple):
    """How work is cut: `block` slots at a time (a power of two >= 16), and about `programs` programs in all."""

    block: int = 64
    programs: int = 512
    warps: int = 4
    stages: int = 3  # blocks that are on their way from memory while one is computed, and that one


TILING = Tiling()
CODED = Tiling(128, 1024)  # for codes: conversion takes as long as reading them


class Attended(NamedTuple):
    """Of all query heads `(batch, query_heads, ...)`: what `attend` returns."""

    output: torch.Tensor
    lse: torch.Tensor
    logits: torch.Tensor | None


@triton.jit(do_not_specialize=["most"])  # grows with the text: not to be compiled anew on the way
def _split(
    Q,
    K,
    V,
    STARTS,
    LENGTHS,
    SLOTS,
    POSITIONS,
    KEY_SCALE,
    VALUE_SCALE,
    PARTIAL,
    NORMS,
    LOGITS,
    scale,  # times log2(e): exponentials are powers of two
    most,
    chunk,  # a multiple of BLOCK
    group,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, split = tl.program_id(0), tl.program_id(1)  # a unit is HEADS query heads that read the same slots
    segment = unit * HEADS // group
    start = tl.load(STARTS + segment).to(tl.int64)
    length = tl.load(LENGTHS + segment).to(tl.int32)
    first = split * chunk
    stop = tl.minimum(first + chunk, most)
    if (SLOTS is None) and (LOGITS is None):  # else the list goes on, or -inf is to be written
        stop = tl.minimum(stop, length)

    h, d = tl.arange(0, ROWS), tl.arange(0, PAD)
    head = unit.to(tl.int64) * HEADS + h
    real = (h < HEADS)[:, None] & (d < DIM)[None, :]
    q = tl.load(Q + head[:, None] * DIM + d[None, :], real, 0.0)
    K += start * DIM
    V += start * DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, PAD], tl.float32)
    for begin in range(first, stop, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        slot = k
        if SLOTS is not None:
            slot = tl.load(SLOTS + unit.to(tl.int64) * most + k, k < most, -1).to(tl.int32)
        seen = (slot >= 0) & (slot < length)
        if POSITIONS is not None:
            seen &= tl.load(POSITIONS + start + slot, seen, -1) >= 0
        # hidden slots are not read: a weight of 0 does not hide what is not a number
        key = tl.load(K + slot[None, :] * DIM + d[:, None], seen[None, :] & (d < DIM)[:, None], 0.0)
        value = tl.load(V + slot[:, None] * DIM + d[None, :], seen[:, None] & (d < DIM)[None, :], 0.0)
        logits = tl.dot(q, key.to(q.dtype), input_precision="ieee") * scale
        if KEY_SCALE is not None:
            logits *= tl.load(KEY_SCALE + start + slot, seen, 0.0).to(tl.float32)[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        if LOGITS is not None:
            tl.store(
                LOGITS + head[:, None] * most + k[None, :], logits * LN2, (h < HEADS)[:, None] & (k < most)[None, :]
            )
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        if VALUE_SCALE is not None:  # on the weights, of which there are fewer
            weights *= tl.load(VALUE_SCALE + start + slot, seen, 0.0).to(tl.float32)[None, :]
        output = tl.dot(weights.to(q.dtype), value.to(q.dtype), output * decay[:, None], input_precision="ieee")
        top = higher

    some = total > 0
    total = tl.where(some, total, 1.0)
    part = head * tl.num_programs(1) + split
    tl.store(NORMS + part, tl.where(some, top + tl.log2(total), float("-inf")), h < HEADS)
    tl.store(PARTIAL + part[:, None] * DIM + d[None, :], output / total[:, None], real & some[:, None])


@triton.jit(do_not_specialize=["splits"])
def _combine(PARTIAL, NORMS, OUTPUT, LSE, splits, DIM: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PAD)
    top = float("-inf")
    total = 0.0
    output = tl.zeros([PAD], tl.float32)
    for begin in range(0, splits, PARTS):
        s = begin + tl.arange(0, PARTS)
        norm = tl.load(NORMS + head * splits + s, s < splits, float("-inf"))
        some = norm > float("-inf")  # else nothing was written
        partial = tl.load(
            PARTIAL + (head * splits + s)[:, None] * DIM + d[None, :], some[:, None] & (d < DIM)[None, :], 0.0
        )
        higher = tl.maximum(top, tl.max(norm, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(norm - base)
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 0)
        output = output * decay + tl.sum(partial * weights[:, None], 0)
        top = higher
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(LSE + head, tl.where(some, (top + tl.log2(total)) * LN2, float("-inf")))
    tl.store(OUTPUT + head * DIM + d, output / total, d < DIM)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    most: int,
    *,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float | None = None,
    scoring: bool = False,
    tiling: Tiling = TILING,
) -> Attended:
    """Softmax attention of one query per row over packed segments (`kvlib.core.part`); nothing waits for the device.

    Args:
        query: `(batch, query_heads, head_dim)`, of the dtype of keys and values, not float64; for codes float32 or
            bfloat16.
        key, value: flat `(allocated, head_dim)`, or int8 codes of them, of which `scales` are the factors.
        starts, lengths: `(batch, kv_heads)` integers on the device: where each segment begins in the flat tensors, and
            how many of its slots may be read. Query heads of a group follow each other.
        most: no length exceeds it, and `most x head_dim` is below 2^31. What is allocated and launched follows from it.
        slots: `(batch, kv_heads or query_heads, k)` int32 or int64, the only slots of each segment to read, in any
            order; -1 = none, and those beyond the length are left out. One that is listed twice counts twice. With
            lists of their own the query heads of a group do not share what they read.
        positions: flat int32 `(allocated,)`; slots where it is -1 are not read.
        scales: of codes of keys and of values, flat `(allocated, 1)` each, of any dtype.
        scaling: factor on the logits, default `head_dim ** -0.5`.
        scoring: write the logits, too.

    Returns:
        output: `(batch, query_heads, head_dim)` in the query's dtype, 0 where nothing was read.
        lse: log-sum-exp of the logits `(batch, query_heads)` float32, natural, -inf where nothing was read.
        logits: None, or `(batch, query_heads, k or most)` float32, scaled, -inf where nothing was read. Not weights,
            because the sum that divides these is known when all splits have been read: see `weights`.
    """
    (batch, heads, dim), kv_heads = query.shape, starts.shape[1]
    group = heads // kv_heads
    shared = group  # query heads that read the same slots
    if slots is not None:
        most, slots = slots.shape[2], slots.contiguous()
        shared = heads // slots.shape[1]
    units = batch * heads // shared
    chunk = triton.cdiv(max(1, most), triton.cdiv(tiling.programs, units))
    chunk = triton.cdiv(chunk, tiling.block) * tiling.block
    splits = triton.cdiv(max(1, most), chunk)

    new = {"dtype": torch.float32, "device": query.device}
    partial, norms = torch.empty(batch, heads, splits, dim, **new), torch.empty(batch, heads, splits, **new)
    logits = torch.empty(batch, heads, most, **new) if scoring else None
    output, lse = torch.empty_like(query, memory_format=torch.contiguous_format), torch.empty(batch, heads, **new)
    pad = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(query):
        _split[units, splits](
            *(x.contiguous() for x in (query, key, value, starts, lengths)),
            *(slots, positions, *(scales or (None, None)), partial, norms, logits),
            (dim**-0.5 if scaling is None else scaling) / math.log(2),
            *(most, chunk, group),
            *(shared, max(LEAST_ROWS, triton.next_power_of_2(shared)), dim, pad, tiling.block),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        _combine[(batch * heads,)](partial, norms, output, lse, splits, dim, pad, PARTS)
    return Attended(output, lse, logits)


def weights(attended: Attended) -> torch.Tensor:
    """Attention `(batch, query_heads, k or most)` float32 of what was attended with `scoring`; all 0 where nothing was
    read."""
    lse = attended.lse.masked_fill(attended.lse == -torch.inf, 0.0)
    return (attended.logits - lse[..., None]).exp()
