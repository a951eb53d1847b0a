"""Attention over a packed cache, and column sums of attention without the N x N matrix.

Pure mathematics: nothing here stores, evicts or knows of a model.
"""

from functools import cache
from types import SimpleNamespace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend(view, seen: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention of the view's queries over its rectangle: `(batch, new, query_heads, head_dim)`.

    The stock SDPA function does the work, with the very arguments that it gets in an unmodified model as long as no
    row is padded and nothing has been evicted, so that results are bit-equal.

    Args:
        seen: `(batch or 1, query_heads or 1, new, slots)` bool, in place of `visible(view)`.
        bias: `(batch, kv_heads, slots)` added to the logits, for entries that stand for several tokens.
    """
    if view.weighing and seen is None and bias is None:
        return weighted(view)
    seen = visible(view) if seen is None else seen
    if bias is not None:
        bias = bias.repeat_interleave(view.groups, dim=1)[:, :, None].to(view.query.dtype)
        if seen is None:
            new, slots = view.query.shape[2], view.key.shape[2]
            seen = torch.ones(new, slots, dtype=torch.bool, device=view.query.device).tril(slots - new)
        seen = bias.expand(-1, -1, view.query.shape[2], -1).masked_fill(~seen, -torch.inf)
    heads = view.module
    if view.groups != getattr(heads, "num_key_value_groups", 1):  # keys were chosen for every query head
        heads = SimpleNamespace(num_key_value_groups=view.groups)
    return sdpa_attention_forward(
        heads, view.query, view.key, view.value, seen, dropout=view.dropout, scaling=view.scaling
    )[0]


def weighted(view) -> torch.Tensor:
    """`attend` for the one query of a decode step from `view.weights`, which the method will score by."""
    weights = view.weights.to(view.value.dtype).flatten(0, 1)
    return torch.bmm(weights, view.value.flatten(0, 1)).view(len(view.query), 1, -1, view.value.shape[-1])


def visible(view) -> torch.Tensor | None:
    """Which slots each query may see, `(batch or 1, query_heads or 1, new, slots)` bool; None: a kernel flag does."""
    new, slots = view.query.shape[2], view.key.shape[2]
    if view.uniform:
        if new in (1, slots):
            return None
        causal = torch.ones(new, slots, dtype=torch.bool, device=view.query.device).tril(slots - new)
        return causal[None, None]
    keys, queries = view.positions[:, :, None], view.query_positions[:, None, :, None]
    if view.intact and view.layer.body is None and bool((view.lengths == view.lengths[:, :1]).all()):
        keys = keys[:, :1]  # what is stored from earlier is visible to all, and the new tokens lie in the same slots
    else:
        keys = keys.repeat_interleave(view.groups, dim=1)
    # A padded query sees everything: its output is never used, and an empty softmax would be NaN.
    return (keys >= 0) & (keys <= queries) | (queries < 0)


def weights(query, key, key_positions=None, scaling=None) -> torch.Tensor:
    """Softmax attention of one query per row, `(batch, kv_heads, group, slots)` in float32 or better.

    Args:
        query: `(batch, query_heads, 1, head_dim)`, which sees all `key` `(batch, kv_heads, slots, head_dim)`.
        key_positions: `(batch, kv_heads, slots)`, -1 for empty slots; None: there are none.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = key.shape[-1] ** -0.5 if scaling is None else scaling
    query, keys = query.reshape(len(key) * key.shape[1], -1, key.shape[-1]), key.flatten(0, 1).mT
    if query.is_cuda and query.dtype != dtype:
        exact = {"out_dtype": dtype}  # products of halves are exact in float32, and no key is converted
    else:
        query, keys, exact = query.to(dtype), keys.to(dtype), {}
    logits = torch.baddbmm(nothing(dtype, query.device), query, keys, beta=0, alpha=scaling, **exact)
    logits = logits.view(*key.shape[:2], -1, key.shape[2])
    if key_positions is not None:
        logits = logits.masked_fill(key_positions[:, :, None] < 0, -torch.inf)
    return logits.softmax(-1)


@cache
def nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What `baddbmm` asks for and with beta=0 does not look at."""
    return torch.zeros(1, 1, 1, dtype=dtype, device=device)


def column_sums(
    query, key, query_positions=None, key_positions=None, scaling=None, block=None, lse=None
) -> torch.Tensor:
    """Sum over queries of the softmax attention that each key receives, without the N x N matrix.

    On a CPU one pass over blocks of query rows: a block's rows are complete, so each can be normalised at once. On a
    GPU the two passes of `kvlib.kernels.column_sums` (not for float64, nor for the single row of a decode step).

    Args:
        query: `(batch, query_heads, new, head_dim)`, the last `new` tokens of every row.
        key: `(batch, kv_heads, slots, head_dim)`, ends with the keys of those tokens.
        query_positions: `(batch, new)`, -1 for padding (counted nowhere); None: no padding.
        key_positions: `(batch, kv_heads, slots)`, -1 for empty slots; None with `query_positions=None`: plain causal.
        scaling: factor on the logits, default `head_dim ** -0.5`.
        block: query rows at a time; default: as many as 16 MiB of float32 logits hold (256 MiB on a GPU). Given: always
            the blocked pass.
        lse: log-sum-exp of each query's logits `(batch, query_heads, new)`, if it is known: that leaves out the first
            of the two passes. Infinite where a query sees nothing. The blocked pass finds its own.

    Returns:
        `(batch, kv_heads, group, slots)` in float32 (float64 for float64 inputs), one sum per query head: how a group
        of query heads is reduced is the method's choice. Sums over slots equal the number of queries counted.
    """
    batch, query_heads, new, dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = dim**-0.5 if scaling is None else scaling
    if query.is_cuda and new > 1 and block is None and dtype == torch.float32:
        from kvlib.kernels import column_sums as kernel  # Triton is there with CUDA builds of torch only

        return kernel.column_sums(query, key, query_positions, key_positions, scaling, lse)
    total = torch.zeros(batch, kv_heads, query_heads // kv_heads, slots, dtype=dtype, device=query.device)
    for logits in blocks(query, key, query_positions, key_positions, scaling, block):
        weights = logits.softmax(-1)
        if query_positions is not None:
            weights = weights.nan_to_num_(0.0)  # rows of padding see nothing
        total[..., : logits.shape[-1]] += weights.sum(-2)
    return total


def eviction_errors(
    query, key, value, query_positions=None, key_positions=None, scaling=None, block=None
) -> torch.Tensor:
    """Sum over queries of how far the attention output moves if one key is evicted, without the N x N matrix.

    Evicting key k and letting softmax renormalise moves a query's output o by exactly a / (1 - a) x (o - v_k), a its
    weight. A query's term is the 2-norm of that, with a clipped at 1 - 1e-6; a query that sees one key only has none.

    Args:
        value: `(batch, kv_heads, slots, value_dim)`; everything else as in `column_sums`.

    Returns:
        `(batch, kv_heads, group, slots)`, per query head, in float32 (float64 for float64 inputs).
    """
    batch, query_heads, _, dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = dim**-0.5 if scaling is None else scaling
    value = value.to(dtype)
    total = torch.zeros(batch, kv_heads, query_heads // kv_heads, slots, dtype=dtype, device=query.device)
    for logits in blocks(query, key, query_positions, key_positions, scaling, block):
        limit = logits.shape[-1]
        if not limit:
            continue
        seen = value[:, :, :limit]
        # Weights in units of each row's largest, which is set apart: where a is near 1, 1 - a and o - v are differences
        # of nearly equal numbers, but sums over the other keys are not.
        highest, top = logits.max(-1, keepdim=True)
        rest = (logits - highest).exp_()
        if query_positions is not None:
            rest = rest.nan_to_num_(0.0)  # rows of padding see nothing
        rest = rest.scatter_(-1, top, 0.0)
        mass = rest.sum(-1, keepdim=True)
        others = torch.einsum("bhgqk,bhkd->bhgqd", rest, seen)
        first = seen[:, :, None].expand(-1, -1, rest.shape[2], -1, -1)
        first = first.gather(3, top.expand(*top.shape[:-1], seen.shape[-1]))
        output = (others + first) / (mass + 1)
        # |o|² + |v|² - 2 o.v is far faster than differences, but loses half of the digits: it takes twice as many
        exact = dtype == torch.float64
        mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
        distance = torch.cdist(output.flatten(2, 3).double(), seen.double(), compute_mode=mode).to(dtype)
        total[..., :limit] += distance.view_as(rest).mul_(rest).div_(mass + 1 - rest).sum(-2)
        moved = torch.linalg.vector_norm(others - mass * first, dim=-1, keepdim=True) / (mass + 1)
        moved *= mass.reciprocal().clamp(max=(1 - 1e-6) / 1e-6)
        total.scatter_add_(-1, top.squeeze(-1), moved.squeeze(-1))
    return total


def blocks(query, key, query_positions, key_positions, scaling, block):
    """Masked logits of successive query rows, `(batch, kv_heads, group, rows, keys)`; arguments of `column_sums`.

    Keys end with the block's last query: slots are in text order, so that later ones are in its future.
    """
    batch, query_heads, new, dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.view(batch, kv_heads, -1, new, dim)
    key = key.to(dtype)
    block = block or max(1, 2 ** (26 if query.is_cuda else 22) // max(1, batch * query_heads * slots))
    for start in range(0, new, block):
        end = min(start + block, new)
        limit = max(0, slots - new + end)
        rows = query[..., start:end, :].to(dtype) * scaling
        logits = torch.einsum("bhgqd,bhkd->bhgqk", rows, key[:, :, :limit])
        if query_positions is None:  # all of a block's future lies in its own last columns
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
            logits[..., start - end :].masked_fill_(future, -torch.inf)
        else:
            at = key_positions[:, :, None, None, :limit]
            hidden = (at < 0) | (at > query_positions[:, None, None, start:end, None])
            logits.masked_fill_(hidden, -torch.inf)
        yield logits
