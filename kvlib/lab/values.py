"""What the lesson on values computes: norms of values, what each score makes of a prompt, what an eviction then costs.

Scores are those of the methods that run: `importance` lets a method read a prompt and takes what it has added up. Costs
are exact: the attention output with and without the evicted tokens, in float64.
"""

import itertools

import pandas as pd
import torch
from scipy import stats

import kvlib
from kvlib.core.run import attention_modules
from kvlib.lab import analysis, statistics

# What a host reads in place of attention, by a short name: the method of `kvlib.methods.vatp`, and how many sinks are forced.
SCORES = {
    "attention": ("forced_sinks", 0),
    "attention, 20 sinks": ("forced_sinks", 20),
    "product": ("vatp", 0),
    "product, 20 sinks": ("vatp", 20),  # this is VATP
    "exact error": ("exact_error", 0),
    "output norm": ("output_norm", 0),
}


def read_code(model, tokenizer, file: str, scored: int, later: int):
    """Snapshots of the first `scored` tokens of a held-out file, and of these and the `later` tokens behind them.

    The file is read from its first function on.

    Raises:
        ValueError: for a file with fewer tokens.
    """
    text = analysis.heldout_code(file)
    text = text[max(text.find("def "), 0) :]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=scored + later).input_ids.to(model.device)
    if ids.shape[1] < scored + later:
        raise ValueError(f"{file} has {ids.shape[1]} tokens from its first function on, {scored + later} are needed")
    return kvlib.snapshot(model, ids[:, :scored]), kvlib.snapshot(model, ids)


# Norms


def value_norms(snapshot, order: float = 1) -> torch.Tensor:
    """‖v‖ of every token, before the output projection: `(layers, kv_heads, tokens)` in float64.

    Args:
        order: 1, 2 or `torch.inf`; VATP (2406.12335) takes 1, the sum of absolute values.
    """
    norms = [
        torch.linalg.vector_norm(value[0], order, dim=-1, dtype=torch.float64) for _, _, value, _ in snapshot.layers
    ]
    return torch.stack(norms).cpu()


def over_median(x: torch.Tensor) -> torch.Tensor:
    """Each token's number as a multiple of its head's median over tokens, the last dimension; the same shape."""
    return x / x.median(dim=-1, keepdim=True).values


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation over the last dimension: `(..., tokens)` twice gives `(...)`, in [-1, 1]."""
    ranks = [torch.as_tensor(stats.rankdata(x.cpu().double().numpy(), axis=-1)) for x in (first, second)]
    first, second = (x - x.mean(-1, keepdim=True) for x in ranks)
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


def show_ratios(axes, ratio: torch.Tensor, low: float = 0.05, high: float = 2.0):
    """Draw a ratio per head, `(layers, heads)`, on a logarithmic scale, with numbers; returns the image."""
    image = axes.imshow(ratio.numpy(), norm="log", clim=(low, high), rasterized=True, aspect="auto")
    for layer, row in enumerate(ratio.tolist()):
        for head, value in enumerate(row):
            color = "white" if value < low**0.4 * high**0.6 else "black"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    axes.set(xlabel="head", xticks=range(ratio.shape[1]), yticks=range(ratio.shape[0]))
    axes.grid(False)
    return image


# Scores


def importance(model, snapshot, method: str, **arguments) -> torch.Tensor:
    """What a method of `kvlib.methods.vatp` on host H2O has added up at the end of the prompt: `(layers, kv_heads, tokens)`.

    Nothing is protected in it, neither sinks nor recent tokens: it is what the host ranks outside of these.
    """
    tokens = snapshot.positions.shape[1]
    with kvlib.method(method, budget=tokens, host="h2o", **arguments)(model) as run:  # the whole prompt: nothing goes
        run.fork(snapshot)
    return torch.stack([layer.rectangles(layer.state["attention"])[0][0] for layer in run.cache.layers]).cpu()


def forced(score: torch.Tensor, sinks: int) -> torch.Tensor:
    """A copy of `score` `(..., tokens)` in which the first tokens come before all others."""
    score = score.clone()
    score[..., :sinks] = torch.inf
    return score


def all_scores(model, snapshot, seed: int = 0) -> dict[str, torch.Tensor]:
    """`random` and every entry of SCORES for one prompt, `(layers, kv_heads, tokens)` each."""
    found = {name: importance(model, snapshot, name) for name in dict.fromkeys(name for name, _ in SCORES.values())}
    chance = torch.rand(found["vatp"].shape, generator=torch.Generator().manual_seed(seed))
    return {"random": chance} | {label: forced(found[name], sinks) for label, (name, sinks) in SCORES.items()}


def best(score: torch.Tensor, budget: float) -> torch.Tensor:
    """The tokens that a score keeps, bool of its shape: int(budget · tokens), at least one; ties go to the earlier."""
    count = max(1, int(budget * score.shape[-1]))
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


# Costs


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
        "terms": ‖Σ a_k v_k‖₂ / ‖o‖₂ over the evicted, what goes if the other weights do not grow;
        "mass": Σ a_k over the evicted;
        "layer": `(..., tokens - n)`, as "head" for the output of the layer, all heads together after W_O.
    """
    value, n = analysis.expanded(snapshot, layer)[2], kept.shape[-1]
    weights = analysis.attention_map(snapshot, layer, last=value.shape[1] - n)  # (query_heads, queries, tokens)
    output, later = weights @ value, weights[..., n:]
    left = weights[..., :n] * kept.repeat_interleave(len(weights) // kept.shape[-2], dim=-2)[..., None, :]
    terms = left @ value[:, :n] + later @ value[:, n:]
    rest = left.sum(-1) + later.sum(-1)
    moved, size = terms / rest[..., None] - output, output.norm(dim=-1)
    after, before = (project(x, weight.double().cpu()) for x in (moved, output))
    return {
        "head": moved.norm(dim=-1) / size,
        "layer": after.norm(dim=-1) / before.norm(dim=-1),
        "terms": (terms - output).norm(dim=-1) / size,
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
        A row per layer, score and budget, columns layer_idx, score, budget, head, layer, terms, mass: means over heads
        and over the queries behind the scored tokens.
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

    Each token is evicted alone. Beside the scores stands what the later queries themselves would say: their own
    attention, and its product with the 1-norm of the value ("attention to come", "product to come").

    Args:
        snapshot, scores: as in `damage`, of a model without grouped heads.
    """
    n = next(iter(scores.values())).shape[-1]
    later, norms, found = snapshot.positions.shape[1] - n, value_norms(snapshot)[..., :n], {}
    for layer in range(len(snapshot.layers)):
        coming, errors, _ = (x[:, :n] for x in analysis.eviction_errors(snapshot, layer, later))
        of_layer = {name: score[layer] for name, score in scores.items()}
        of_layer |= {"attention to come": coming, "product to come": coming * norms[layer]}
        for name, score in of_layer.items():
            found.setdefault(name, []).append(analysis.best_kept(score, errors, share))
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


# What is kept


def kept_by(model, snapshot, methods: dict) -> dict[str, torch.Tensor]:
    """What each method keeps of a prompt that was read once: name -> `(layers, kv_heads, tokens)` bool."""
    kept = {}
    for name, method in methods.items():
        with method(model) as run:
            run.fork(snapshot)
            kept[name] = analysis.kept_mask(run)
    return kept


def overlaps(kept: dict[str, torch.Tensor]) -> pd.DataFrame:
    """How alike are keep-sets? 2 |A ∩ B| / (|A| + |B|) (Dice), mean over heads: 1 for equal sets, 0 for disjoint ones.

    Args:
        kept: name -> `(layers, kv_heads, tokens)` bool, the same tokens for all.

    Raises:
        ValueError: if a set is empty.
    """
    masks = torch.stack(list(kept.values())).double().flatten(1, 2)  # (methods, heads, tokens)
    sizes = masks.sum(-1)
    if (sizes == 0).any():
        raise ValueError("an empty keep-set is like no other")
    common = torch.einsum("aht,bht->abh", masks, masks)
    return pd.DataFrame((2 * common / (sizes[:, None] + sizes)).mean(-1), index=list(kept), columns=list(kept))
