"""Column sums of attention on a GPU in two passes, memory linear in the number of tokens.

    L_i = log sum_k exp(s q_i.k_k)     `log_sum_exps`, one program per block of queries, or per split of their keys
    S_k = sum_i exp(s q_i.k_k - L_i)   `column_sums`, one program per block of keys; every term is at most 1

The first pass is not needed where attention itself has left its log-sum-exps. In either a program keeps one block and
works through blocks of the other kind; without positions only those on the diagonal are masked. Blocks with the most to
do come first. Query heads of a group have programs of their own: that they read the same keys would save little, since
a program reads one block of keys and all queries behind it, and the longest would take `group` times as long.

The reference is `kvlib.core.attention.column_sums`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))  # exponentials are powers of two
PROGRAMS = 512  # so many at least in the first pass, if there are so many blocks


class Tiling(NamedTuple):
    """A program keeps `kept` tokens and works through blocks of `block` (powers of two >= 16).

    stages: blocks that are on their way from memory while one is computed, and that one.
    """

    kept: int
    block: int
    warps: int
    stages: int


HALF = Tiling(128, 128, 4, 2)  # tensor cores
SINGLE = Tiling(32, 32, 8, 2)  # none, for float32: larger blocks do not fit the registers


@triton.jit
def _rows(X, first, stride, limit, LENGTH: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr):
    """`(LENGTH, PAD)` from row `first` on; with MASKED 0 in rows that are below 0 or not below `limit`."""
    r, d = tl.arange(0, LENGTH)[:, None], tl.arange(0, PAD)[None, :]
    at = X + tl.cast(first, tl.int64) * stride + (r * stride + d)
    if MASKED:
        rows = tl.load(at, (first + r >= 0) & (first + r < limit) & (d < DIM), 0.0)
    elif DIM < PAD:
        rows = tl.load(at, d < DIM, 0.0)
    else:
        rows = tl.load(at)
    return rows


@triton.jit
def _seen(QP, KP, i, k, new, slots):
    """May query `i` see key `k`? Both are of such shapes that they are compared each with each."""
    if QP is None:
        seen = k <= i + (slots - new)
    else:
        query_position = tl.load(QP + i, (i >= 0) & (i < new), -1)
        key_position = tl.load(KP + k, k < slots, -1)
        seen = tl.where(key_position < 0, 2**31 - 1, key_position) <= query_position
    return seen


@triton.jit
def _attended(
    q, K, QP, KP, top, total, i, first, stride, scale, new, slots,
    KEYS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The highest logits of queries `i`, and the sums of exponentials relative to them, with one block of keys more."""
    key = _rows(K, first, stride, slots, KEYS, DIM, PAD, MASKED)
    logits = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        k = first + tl.arange(0, KEYS)
        logits = tl.where(_seen(QP, KP, i[:, None], k[None, :], new, slots), logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    base = higher
    if MASKED:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet
    return higher, total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)


@triton.jit(do_not_specialize=["chunk", "slots", "heads", "group"])  # fewer kernels to compile
def _norms(
    Q, K, QP, KP, PARTIAL, chunk, q_row, q_head, q_stride, k_row, k_head, k_stride, scale, new, slots, heads, group,
    DIM: tl.constexpr, PAD: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block, split = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    Q += row.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    K += row.to(tl.int64) * k_row + (head // group).to(tl.int64) * k_head
    if QP is not None:
        QP += row * new
        KP += (row * (heads // group) + head // group) * slots
    i = block * KEPT + tl.arange(0, KEPT)
    q = _rows(Q, block * KEPT, q_stride, new, KEPT, DIM, PAD, True)
    top = tl.full([KEPT], float("-inf"), tl.float32)
    total = tl.zeros([KEPT], tl.float32)

    # the queries are the last tokens, so keys behind a block's last query are in its future
    first = split * chunk
    stop = tl.minimum(tl.minimum(first + chunk, slots), slots - new + (block + 1) * KEPT)
    partly = first
    if QP is None:  # keys up to that of the block's first query are seen by all
        partly += tl.maximum(0, tl.minimum(slots - new + block * KEPT + 1, stop) - first) // BLOCK * BLOCK
    for start in range(first, partly, BLOCK):
        top, total = _attended(
            q, K, QP, KP, top, total, i, start, k_stride, scale, new, slots, BLOCK, DIM, PAD, False
        )  # fmt: skip
    for start in range(partly, stop, BLOCK):
        top, total = _attended(
            q, K, QP, KP, top, total, i, start, k_stride, scale, new, slots, BLOCK, DIM, PAD, True
        )  # fmt: skip
    some = total > 0
    norm = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    place = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * new
    tl.store(PARTIAL + place + i, norm, i < new)


@triton.jit
def _received(
    key, Q, QP, KP, L, k, first, stride, scale, new, slots,
    QUERIES: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What keys `k` receive from one block of queries."""
    i = first + tl.arange(0, QUERIES)
    norm = tl.load(L + i, i >= 0, float("inf")) if MASKED else tl.load(L + i)
    q = _rows(Q, first, stride, new, QUERIES, DIM, PAD, MASKED)
    weights = tl.exp2(tl.dot(key, tl.trans(q), input_precision="ieee") * scale - norm[None, :])
    if MASKED:
        weights = tl.where(_seen(QP, KP, i[None, :], k[:, None], new, slots), weights, 0.0)
    return tl.sum(weights, 1)


@triton.jit(do_not_specialize=["slots", "heads", "group"])
def _sums(
    Q, K, QP, KP, L, S, q_row, q_head, q_stride, k_row, k_head, k_stride, scale, new, slots, heads, group,
    DIM: tl.constexpr, PAD: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    Q += row.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    K += row.to(tl.int64) * k_row + (head // group).to(tl.int64) * k_head
    L += tl.program_id(0).to(tl.int64) * new
    if QP is not None:
        QP += row * new
        KP += (row * (heads // group) + head // group) * slots
    start_key = tl.program_id(1) * KEPT
    k = start_key + tl.arange(0, KEPT)
    key = _rows(K, start_key, k_stride, slots, KEPT, DIM, PAD, True)
    total = tl.zeros([KEPT], tl.float32)

    # Blocks of queries are counted back from the last one: what is left over then lies on the diagonal, where there is
    # a mask anyhow.
    first = tl.maximum(0, start_key - (slots - new))  # queries before it do not see the block
    whole = new
    if QP is None:  # queries from that of the block's last key on see all of it
        last = tl.maximum(0, tl.minimum(start_key + KEPT, slots) - 1 - (slots - new))
        whole -= (new - last) // BLOCK * BLOCK
    for start in range(whole - tl.cdiv(whole - first, BLOCK) * BLOCK, whole, BLOCK):
        total += _received(key, Q, QP, KP, L, k, start, q_stride, scale, new, slots, BLOCK, DIM, PAD, True)
    for start in range(whole, new, BLOCK):
        total += _received(key, Q, QP, KP, L, k, start, q_stride, scale, new, slots, BLOCK, DIM, PAD, False)
    tl.store(S + tl.program_id(0).to(tl.int64) * slots + k, total, k < slots)


def log_sum_exps(
    query, key, query_positions=None, key_positions=None, scaling=None, tiling: Tiling | None = None
) -> torch.Tensor:
    """Of each query's logits, `(batch, query_heads, new)` float32, natural; -inf where it sees nothing.

    Arguments are those of `column_sums`.
    """
    (batch, heads, new, _), slots = query.shape, key.shape[2]
    tiling = tiling or standard(query.dtype)
    blocks, most = triton.cdiv(new, tiling.kept), triton.cdiv(slots, tiling.block)
    splits = max(1, min(most, triton.cdiv(PROGRAMS, batch * heads * blocks)))  # few queries: keys are split
    chunk = triton.cdiv(most, splits) * tiling.block
    partial = torch.empty(splits, batch, heads, new, device=query.device)
    tensors, sizes = _arguments(query, key, query_positions, key_positions, scaling, tiling)
    grid = batch * heads, blocks, splits
    _norms[grid](*tensors, partial, chunk, *sizes, num_warps=tiling.warps, num_stages=tiling.stages)
    return partial[0] if splits == 1 else partial.logsumexp(0)


def column_sums(
    query, key, query_positions=None, key_positions=None, scaling=None, lse=None, tiling: Tiling | None = None
) -> torch.Tensor:
    """`(batch, kv_heads, group, slots)` float32, as `kvlib.core.attention.column_sums`.

    Args:
        query: `(batch, query_heads, new, head_dim)`, key: `(batch, kv_heads, slots, head_dim)`, no float64.
        lse: `(batch, query_heads, new)`, what `log_sum_exps` would find.
    """
    (batch, heads, _, _), (_, kv_heads, slots, _) = query.shape, key.shape
    if lse is None:
        lse = log_sum_exps(query, key, query_positions, key_positions, scaling)
    norms = (lse / math.log(2)).contiguous()
    sums = torch.empty(batch, kv_heads, heads // kv_heads, slots, device=query.device)
    tiling = tiling or standard(query.dtype)
    tensors, sizes = _arguments(query, key, query_positions, key_positions, scaling, tiling)
    grid = batch * heads, triton.cdiv(slots, tiling.kept)
    _sums[grid](*tensors, norms, sums, *sizes, num_warps=tiling.warps, num_stages=tiling.stages)
    return sums


def standard(dtype: torch.dtype) -> Tiling:
    return SINGLE if dtype == torch.float32 else HALF


def _arguments(query, key, query_positions, key_positions, scaling, tiling: Tiling) -> tuple[tuple, tuple]:
    """The tensors that both kernels read, and the numbers behind those."""
    # queries are hundreds of megabytes, and not contiguous: they are not copied for that
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    dim, heads, kv_heads = query.shape[3], query.shape[1], key.shape[1]
    positions = (None if x is None else x.to(torch.int32).contiguous() for x in (query_positions, key_positions))
    scale = (dim**-0.5 if scaling is None else scaling) / math.log(2)
    sizes = scale, query.shape[2], key.shape[2], heads, heads // kv_heads, dim, max(16, triton.next_power_of_2(dim))
    return (query, key, *positions), (*query.stride()[:3], *key.stride()[:3], *sizes, *tiling[:2])
