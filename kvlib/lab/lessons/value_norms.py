"""Norms of values, and how they compare: with the median of their head, with other numbers of the same tokens."""

import torch
from scipy import stats


def norms(snapshot, order: float = 1) -> torch.Tensor:
    """‖v‖ of every token, before the output projection: `(layers, kv_heads, tokens)` in float64.

    Args:
        order: 1, 2 or `torch.inf`; VATP (2406.12335) takes 1, the sum of absolute values.
    """
    found = [
        torch.linalg.vector_norm(value[0], order, dim=-1, dtype=torch.float64) for _, _, value, _ in snapshot.layers
    ]
    return torch.stack(found).cpu()


def over_median(x: torch.Tensor) -> torch.Tensor:
    """Each token's number as a multiple of its head's median over tokens, the last dimension; the same shape."""
    return x / x.median(dim=-1, keepdim=True).values


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation over the last dimension: `(..., tokens)` twice gives `(...)`, in [-1, 1]."""
    ranks = [torch.as_tensor(stats.rankdata(x.cpu().double().numpy(), axis=-1)) for x in (first, second)]
    first, second = (x - x.mean(-1, keepdim=True) for x in ranks)
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
