"""Column sums of attention on a GPU in two passes, memory linear in the number of tokens.

    L_i = log sum_k exp(s q_i.k_k)     pass 1, one program per block of queries
    S_k = sum_i exp(s q_i.k_k - L_i)   pass 2, one program per block of keys; every term is at most 1

The reference is `kvlib.core.attention.column_sums`.
"""

import torch
import triton
import triton.language as tl

BLOCK = 64


@triton.jit
def _tile(
    Q, K, QP, KP, row, head, kv_head, i, k, scale, new, slots, kv_heads, heads, DIM: tl.constexpr, PAD: tl.constexpr
):
    """Masked logits of queries `i` against keys `k`, with -inf where a key is unseen."""
    d = tl.arange(0, PAD)
    inside_q, inside_k = i < new, k < slots
    q = tl.load(
        Q + ((row * heads + head) * new + i[:, None]) * DIM + d[None, :], inside_q[:, None] & (d < DIM)[None, :], 0.0
    )
    at = (row * kv_heads + kv_head) * slots + k
    keys = tl.load(K + at[None, :] * DIM + d[:, None], inside_k[None, :] & (d < DIM)[:, None], 0.0)
    q_position = tl.load(QP + row * new + i, inside_q, -1)
    k_position = tl.load(KP + at, inside_k, -1)
    logits = tl.dot(q, keys, input_precision="ieee") * scale
    seen = (k_position >= 0)[None, :] & (k_position[None, :] <= q_position[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _norms(
    Q, K, QP, KP, L, scale, new, slots, kv_heads, heads, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr
):
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    # the queries are the last tokens, so keys behind a block's last query are in its future
    for start in range(0, tl.minimum(slots, slots - new + (tl.program_id(0) + 1) * BLOCK), BLOCK):
        k = start + tl.arange(0, BLOCK)
        logits = _tile(Q, K, QP, KP, row, head, kv_head, i, k, scale, new, slots, kv_heads, heads, DIM, PAD)
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        top = higher
    # a query of padding sees nothing: +inf makes its share of every column 0
    norm = tl.where(total > 0, top + tl.log(total), float("inf"))
    tl.store(L + (row * heads + head) * new + i, norm, i < new)


@triton.jit
def _sums(
    Q, K, QP, KP, L, S, scale, new, slots, kv_heads, heads, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr
):
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.maximum(0, tl.program_id(0) * BLOCK - (slots - new))  # the first query that can see the block
    for start in range(first // BLOCK * BLOCK, new, BLOCK):
        i = start + tl.arange(0, BLOCK)
        logits = _tile(Q, K, QP, KP, row, head, kv_head, i, k, scale, new, slots, kv_heads, heads, DIM, PAD)
        norm = tl.load(L + (row * heads + head) * new + i, i < new, float("inf"))
        total += tl.sum(tl.exp(logits - norm[:, None]), 0)
    tl.store(S + (row * heads + head) * slots + k, total, k < slots)


def column_sums(query, key, query_positions, key_positions, scaling: float) -> torch.Tensor:
    """`(batch, kv_heads, group, slots)` float32, as `kvlib.core.attention.column_sums` with both positions given.

    Args:
        query: `(batch, query_heads, new, head_dim)`, key: `(batch, kv_heads, slots, head_dim)`, no float64.
    """
    batch, heads, new, dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    query, key = query.contiguous(), key.contiguous()
    positions = query_positions.to(torch.int32).contiguous(), key_positions.to(torch.int32).contiguous()
    norms = torch.empty(batch, heads, new, device=query.device)
    sums = torch.empty(batch, kv_heads, heads // kv_heads, slots, device=query.device)
    sizes = scaling, new, slots, kv_heads, heads, dim, max(16, triton.next_power_of_2(dim)), BLOCK
    _norms[triton.cdiv(new, BLOCK), batch * heads](query, key, *positions, norms, *sizes)
    _sums[triton.cdiv(slots, BLOCK), batch * heads](query, key, *positions, norms, sums, *sizes)
    return sums
