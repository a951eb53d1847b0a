"""What the lessons compute beside the library: attention maps, damage done by evictions, summaries of result tables.

Everything that looks at attention starts from a `kvlib.snapshot` of one prompt and works in float64.
"""

import json

import pandas as pd
import torch

from kvlib import attention, paths
from kvlib.lab.statistics import mean_interval, paired_difference


def heldout_code(file: str) -> str:
    """The text of one file of the shipped held-out code, which no training text contains: `heldout_code("attr/_make.py")`."""
    with (paths.DATA / "heldout" / "code.jsonl").open(encoding="utf-8") as lines:
        texts = {entry["file"]: entry["text"] for entry in map(json.loads, lines)}
    if file not in texts:
        raise ValueError(f"no held-out file {file!r}; there are: {', '.join(sorted(texts))}")
    return texts[file]


def token_labels(tokenizer, ids) -> list[str]:
    r"""Tokens as they can be written beside an axis: a space is `·`, a newline `\n`."""
    return [tokenizer.decode([i]).replace("\n", r"\n").replace(" ", "·") for i in ids]


# Attention


def attention_map(snapshot, layer: int) -> torch.Tensor:
    """Softmax attention of every query over every key, `(query_heads, tokens, tokens)` in float64."""
    query, key, _, scaling = expanded(snapshot, layer)
    hidden = torch.ones(key.shape[1], key.shape[1], dtype=torch.bool).triu(1)
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


# Evicting one token


def remove_each(query, key, value, scaling) -> torch.Tensor:
    """What happens to the attention output when token j is not there, for every j in turn.

    Row j of keys and values is left out and the softmax is taken over the others.

    Args:
        query: `(head_dim,)`; key, value: `(tokens, head_dim)`.

    Returns:
        o' − o, `(tokens, head_dim)`.
    """
    output = (key @ query * scaling).softmax(0) @ value
    changes = []
    for j in range(len(key)):
        others = torch.arange(len(key)) != j
        changes.append((key[others] @ query * scaling).softmax(0) @ value[others] - output)
    return torch.stack(changes)


def eviction_errors(snapshot, layer: int, last: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to each token, the exact error of evicting it alone, and the size of the output: means over queries.

    Args:
        last: how many of the last queries.

    Returns:
        a and ‖o' − o‖₂ = a / (1 − a) · ‖o − v‖₂, `(query_heads, tokens)`; ‖o‖₂ `(query_heads, 1)`.
    """
    value = expanded(snapshot, layer)[2]
    weights = attention_map(snapshot, layer)[:, -last:]  # (query_heads, queries, tokens)
    output = weights @ value
    errors = weights / (1 - weights) * torch.cdist(output, value)
    return weights.mean(1), errors.mean(1), output.norm(dim=-1).mean(1, keepdim=True)


def best_kept(score: torch.Tensor, errors: torch.Tensor, share: float) -> torch.Tensor:
    """Of the `share` of tokens whose loss would hurt most, how many `score` keeps in as many places: `(heads,)`."""
    count = max(1, int(share * errors.shape[-1]))
    wanted = torch.zeros_like(errors).scatter_(-1, errors.topk(count).indices, 1)
    return wanted.gather(-1, score.topk(count).indices).sum(-1) / count


def kept_share(run) -> torch.Tensor:
    """Share of all heads in all layers that keep each token of the first row, `(tokens,)`."""
    layers = [run.kept(layer)[0] for layer in range(len(run.cache.layers))]
    kept = torch.cat([head[head >= 0] for layer in layers for head in layer]).cpu()
    return torch.bincount(kept, minlength=int(run.cache.layers[0].tokens[0])) / sum(map(len, layers))


# Result tables


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `configuration`: the method, and its arguments where they are not the defaults."""
    words = {"{}": "", '{"renumber": false}': " (not renumbered)"}
    return table.assign(configuration=table["method"] + table["arguments"].map(lambda x: words.get(x, f" {x}")))


def accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """One row per task, configuration and budget: share of bytes stored, accuracy with its 95 % interval, samples."""
    rows = []
    for (task, configuration, budget), cell in named(table).groupby(["task", "configuration", "budget"], sort=False):
        mean, low, high = mean_interval(cell["value"])
        stored = cell["stored_bytes"].sum() / cell["full_bytes"].sum()
        rows.append((task, configuration, budget, stored, mean, low, high, len(cell)))
    columns = ["task", "configuration", "budget", "stored", "accuracy", "low", "high", "samples"]
    return pd.DataFrame(rows, columns=columns)


def differences(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Accuracy of `first` minus that of `second` on the same samples: one row per task, one column per budget.

    A difference whose 95 % interval leaves out 0 is followed by `*`.
    """
    cells = named(table).set_index(["task", "budget", "sample"]).sort_index()
    pairs = [cells.loc[cells["configuration"] == name, "value"] for name in (first, second)]
    both = pd.concat(pairs, axis=1, keys=["first", "second"], join="inner")
    rows = {}
    for (task, budget), cell in both.groupby(["task", "budget"], sort=False):
        difference, low, high = paired_difference(cell["first"], cell["second"])
        star = "*" if low > 0 or high < 0 else ""
        rows[task, budget] = f"{100 * difference:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]{star}"
    return pd.Series(rows).unstack(sort=False)
