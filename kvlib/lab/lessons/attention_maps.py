"""Attention of every head to every token, from a `kvlib.snapshot` of one prompt, in float64."""

import torch

from kvlib.core import attention


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


def looking_heads(snapshot, tokens: list[int], count: int) -> list[tuple[int, int, torch.Tensor]]:
    """The KV heads in which the last query attends most to `tokens`: `(layer, head, attention to each)`, most first.

    Of a group of query heads it is the one that attends most.
    """
    kv_heads, found = snapshot.layers[0][1].shape[1], []
    for layer in range(len(snapshot.layers)):
        attention_to = attention_map(snapshot, layer, last=1)[:, 0, tokens]  # (query_heads, tokens)
        groups = attention_to.view(kv_heads, -1, len(tokens))
        for head, group in enumerate(groups):
            found.append((layer, head, group[group.sum(1).argmax()]))
    return sorted(found, key=lambda entry: -entry[2].sum())[:count]


def show_heads(axes, share: torch.Tensor):
    """Draw a share per head, `(layers, heads)`, in percent on a logarithmic scale, with numbers; returns the image."""
    image = axes.imshow((100 * share).numpy(), norm="log", clim=(1, 100), rasterized=True, aspect="auto")
    for layer, row in enumerate((100 * share).tolist()):
        for head, value in enumerate(row):
            color = "white" if value < 15 else "black"
            axes.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=9, color=color)
    axes.set(xlabel="head", xticks=range(share.shape[1]), yticks=range(share.shape[0]))
    axes.grid(False)
    return image
