"""What evictions cost, exactly: the attention output with and without the evicted tokens, in float64."""

import itertools

import pandas as pd
import torch
from torch.nn.functional import pad

from kvlib.core.support import attention_modules
from kvlib.lab import statistics
from kvlib.lab.lessons.attention_maps import attention_map, expanded
from kvlib.lab.lessons.scoring import best
from kvlib.lab.lessons.value_norms import norms

# One token


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
    weights = attention_map(snapshot, layer, last)  # (query_heads, queries, tokens)
    output = weights @ value
    errors = weights / (1 - weights) * torch.cdist(output, value)
    return weights.mean(1), errors.mean(1), output.norm(dim=-1).mean(1, keepdim=True)


def best_kept(score: torch.Tensor, errors: torch.Tensor, share: float) -> torch.Tensor:
    """Of the `share` of tokens whose loss would hurt most, how many `score` keeps in as many places: `(heads,)`."""
    count = max(1, int(share * errors.shape[-1]))
    wanted = torch.zeros_like(errors).scatter_(-1, errors.topk(count).indices, 1)
    return wanted.gather(-1, score.topk(count).indices).sum(-1) / count


# Many tokens


def change(snapshot, layer: int, kept: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the outputs of later queries move when some of the first n tokens are not there.

    A query behind the first n tokens sees, with softmax weights a, all tokens up to itself. Without the evicted ones
    the weights of the others are divided by what is left of them: o' = Σ a_k v_k / Σ a_k over the tokens that remain.

    Args:
        snapshot: of a text of more than n tokens.
        kept: `(..., kv_heads, n)` bool, of the first n tokens. All later tokens stay.
        weight: W_O, `(hidden, query_heads · head_dim)`.

    Returns:
        numbers for every query behind the first n tokens, `(..., query_heads, tokens - n)` in float64:
        "head": ‖o' − o‖₂ / ‖o‖₂, each head's own output;
        "mass": Σ a_k over the evicted;
        "layer": `(..., tokens - n)`, as "head" for the output of the layer, all heads together after W_O.
    """
    value, (kv_heads, n) = expanded(snapshot, layer)[2], kept.shape[-2:]
    weights = attention_map(snapshot, layer, last=value.shape[1] - n)  # (query_heads, queries, tokens)
    output = weights @ value
    counted = pad(value[:: len(value) // kv_heads], (0, 1), value=1)  # a 1 beside each value sums the weights
    group = weights.unflatten(0, (kv_heads, -1)).flatten(1, 2)  # (kv_heads, group · queries, tokens)
    sums = torch.einsum("hqn,...hnd->...hqd", group[..., :n], kept[..., None] * counted[:, :n])
    sums = sums + group[..., n:] @ counted[:, n:]
    sums = sums.unflatten(-2, (-1, weights.shape[1])).flatten(-4, -3)  # (..., query_heads, queries, head_dim + 1)
    rest = sums[..., -1]
    moved, size = sums[..., :-1] / rest[..., None] - output, output.norm(dim=-1)
    after, before = (project(x, weight.double().cpu()) for x in (moved, output))
    return {
        "head": moved.norm(dim=-1) / size,
        "layer": after.norm(dim=-1) / before.norm(dim=-1),
        "mass": 1 - rest,
    }


def project(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All heads' outputs side by side times W_O: `(..., heads, queries, head_dim)` to `(..., queries, hidden)`."""
    return heads.transpose(-3, -2).flatten(-2) @ weight.T


def damage(model, snapshot, scores: dict[str, torch.Tensor], budgets) -> pd.DataFrame:
    """What each score loses at each budget: `change` when only its best tokens stay.

    Args:
        snapshot: of a text that goes on behind the n tokens that are scored.
        scores: name -> `(layers, kv_heads, n)`, higher = keep.

    Returns:
        A row per layer, score and budget, columns layer_idx, score, budget, head, layer, mass: means over heads and
        over the queries behind the scored tokens.
    """
    rows, cells = [], list(itertools.product(scores, budgets))
    for index, module in enumerate(attention_modules(model)):
        kept = torch.stack([best(scores[name][index], budget) for name, budget in cells])
        found = change(snapshot, index, kept, module.o_proj.weight)
        means = pd.DataFrame({measure: x.flatten(1).mean(1).numpy() for measure, x in found.items()})
        rows.append(pd.DataFrame(cells, columns=["score", "budget"]).assign(layer_idx=index).join(means))
    return pd.concat(rows, ignore_index=True)


def worst_found(snapshot, scores: dict[str, torch.Tensor], share: float = 0.2) -> dict[str, float]:
    """Of the `share` of tokens whose single loss hurts the later queries most, how many each score has on top.

    Each token is evicted alone, from one KV head; what that costs is the mean over the query heads of the group.
    Beside the scores stands what the later queries themselves would say: their own attention, and its product with the
    1-norm of the value ("attention to come", "product to come").

    Args:
        snapshot, scores: as in `damage`.
    """
    n = next(iter(scores.values())).shape[-1]
    later, sizes, found = snapshot.positions.shape[1] - n, norms(snapshot)[..., :n], {}
    for layer in range(len(snapshot.layers)):
        groups = (x.unflatten(0, (sizes.shape[1], -1)).mean(1) for x in eviction_errors(snapshot, layer, later))
        coming, errors, _ = (x[:, :n] for x in groups)
        of_layer = {name: score[layer] for name, score in scores.items()}
        of_layer |= {"attention to come": coming, "product to come": coming * sizes[layer]}
        for name, score in of_layer.items():
            found.setdefault(name, []).append(best_kept(score, errors, share))
    return {name: torch.stack(parts).mean().item() for name, parts in found.items()}


def paired(table: pd.DataFrame, first: str, second: str, measure: str = "head") -> pd.DataFrame:
    """Paired difference of two scores at every budget, with a 95 % interval over texts.

    Args:
        table: rows of `damage` for several texts, with a column text.

    Returns:
        index budget; columns value, low, high: first − second in percentage points, and texts, in how many first is
        lower.
    """
    means = table.groupby(["score", "budget", "text"])[measure].mean() * 100
    rows = {}
    for budget in sorted(table["budget"].unique()):
        one, other = means[first, budget], means[second, budget]
        found = statistics.paired_difference([one], [other])
        rows[budget] = {"value": found.value, "low": found.low, "high": found.high, "texts": int((one < other).sum())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("budget")


def differences(table: pd.DataFrame, comparisons) -> pd.DataFrame:
    """`paired` as text, "value [low, high]": a row per comparison `(first, second, measure)`, a column per budget."""
    rows = {}
    for first, second, measure in comparisons:
        found = paired(table, first, second, measure)
        cells = [f"{row.value:+z.2f} [{row.low:z.2f}, {row.high:z.2f}]" for row in found.itertuples()]
        rows[f"{first} − {second}", measure] = dict(zip(map("{:.0%}".format, found.index), cells))
    return pd.DataFrame.from_dict(rows, orient="index")
