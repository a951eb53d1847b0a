"""Attention of every head to every token, from a `kvlib.snapshot` of one prompt, in float64."""

import torch

from kvlib.core import attention
from kvlib.lab.lessons.value_norms import rank_correlation


def attention_map(snapshot, layer: int, last: int | None = None) -> torch.Tensor:
    """Softmax attention of all queries, or the `last` ones: `(query_heads, queries, tokens)` in float64."""
    query, key, _, scaling = expanded(snapshot, layer)
    query, tokens = query[:, -(last or key.shape[1]) :], key.shape[1]
    hidden = torch.ones(query.shape[1], tokens, dtype=torch.bool).triu(1 + tokens - query.shape[1])
    return (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)


def attention_received(snapshot) -> torch.Tensor:
    """Share of all attention that each token receives, `(layers, query_heads, tokens)`; sums to 1 over the tokens."""
    rows = [
        attention.column_sums(query.double(), key.double(), scaling=scaling)
        for query, key, _, scaling in snapshot.layers
    ]
    return torch.cat(rows).flatten(1, 2).cpu() / snapshot.positions.shape[1]


def expanded(snapshot, layer: int):
    """Query, key, value `(query_heads, tokens, head_dim)` of the first row in float64 on the CPU, and the scaling.

    Keys and values of a group stand once per query head.
    """
    query, key, value, scaling = snapshot.layers[layer]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return (*(x[0].double().cpu() for x in (query, key, value)), scaling)


def looking_heads(snapshot, tokens: list[int], count: int, query: int | None = None) -> list[tuple]:
    """The KV heads in which a query attends most to `tokens`: `(layer, head, attention to each)`, most first.

    Of a group of query heads it is the one that attends most.

    Args:
        query: its position; the last one if left out. It sees what precedes it, so `tokens` stand before it.
    """
    kv_heads, length, found = snapshot.layers[0][1].shape[1], snapshot.positions.shape[1], []
    for layer in range(len(snapshot.layers)):
        last = 1 if query is None else length - query
        attention_to = attention_map(snapshot, layer, last=last)[:, 0, tokens]  # (query_heads, tokens)
        groups = attention_to.view(kv_heads, -1, len(tokens))
        for head, group in enumerate(groups):
            found.append((layer, head, group[group.sum(1).argmax()]))
    return sorted(found, key=lambda entry: -entry[2].sum())[:count]


def short_keys(snapshot) -> torch.Tensor:
    """Do tokens with short keys get the attention? Rank correlation of −‖k‖₂ with it, `(layers, kv_heads)`.

    Attention is what a token receives from all queries, mean over the query heads of a group. 1: the shorter the key,
    the more attention.
    """
    short = torch.stack([-key[0].double().norm(dim=-1).cpu() for _, key, _, _ in snapshot.layers])
    received = attention_received(snapshot).unflatten(1, (short.shape[1], -1)).mean(2)
    return rank_correlation(short, received)
