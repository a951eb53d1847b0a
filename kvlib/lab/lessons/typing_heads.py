"""What decides how UNComp types heads: eigenvalues that count, windows of text, rules, and the rotary embedding."""

from dataclasses import replace
from itertools import product

import pandas as pd
import torch

from kvlib.core.rotary import rotaries, rotate
from kvlib.lab.lessons.value_norms import rank_correlation
from kvlib.methods.entropy import entropy, truncation
from kvlib.methods.head_groups import RULES, Measured, by_rank, group_sizes, per_kv_head

LEAST = 1e-12  # eigenvalues below are rounding, and have no logarithm worth drawing


def before_rotation(model, snapshot):
    """A `kvlib.snapshot` whose queries and keys are as they were before rotary embedding.

    Where the embedding has a factor for all of them (YaRN) they keep it, which makes no difference to a spectrum.

    Raises:
        ValueError: if the model's rotation is not known (`kvlib.core.rotary`).
    """
    layers = []
    for rotary, (query, key, value, scaling) in zip(rotaries(model), snapshot.layers, strict=True):
        back = -snapshot.positions[:, None]  # (batch, 1, tokens), for all heads
        query, key = (x if rotary is None else rotate(x, back.expand(x.shape[:3]), rotary) for x in (query, key))
        layers.append((query, key, value, scaling))
    return replace(snapshot, layers=layers, sums={})


def elbow(curve: torch.Tensor, axes: str) -> torch.Tensor:
    """Which point of falling curves `(..., d)` is furthest from the straight line between their ends, counted from 1.

    The line along which the distance is measured does not matter: perpendicular to the chord or along the ordinate,
    they differ by the cosine of its slope. What matters is which axes are logarithmic.

    Args:
        axes: "linear", "log" (the eigenvalue) or "log-log" (its number, too).

    Raises:
        KeyError: for other axes.
    """
    abscissa, ordinate = {"linear": (False, False), "log": (False, True), "log-log": (True, True)}[axes]
    y = curve.clamp(min=LEAST).log() if ordinate else curve
    x = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype)
    x = x.log() if abscissa else x
    along = (x - x[0]) / (x[-1] - x[0])
    chord = y[..., :1] + along * (y[..., -1:] - y[..., :1])
    return (y - chord).abs().argmax(-1) + 1


def bends(spectra: torch.Tensor, scales: dict[str, str]) -> dict[str, float]:
    """Where the elbows of heads are, beside the number of eigenvalues that UNComp counts.

    Args:
        spectra: `(layers, heads, d)`. scales: axes as of `elbow` -> what they are called.

    Returns:
        "k = d/4"; for each scale "elbow, ...", the median over heads; "from" and "to", over all scales.
    """
    found = {label: elbow(spectra, axes).double() for axes, label in scales.items()}
    medians = {f"elbow, {label}": x.median().item() for label, x in found.items()}
    ends = {"from": min(x.min().item() for x in found.values()), "to": max(x.max().item() for x in found.values())}
    return {"k = d/4": truncation(spectra.shape[-1])} | medians | ends


def distances(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """How far two texts move the spectrum of a head, and how far apart two heads of a layer are on one text.

    Both are means of |log₁₀ λ − log₁₀ μ| over all eigenvalues: the first over heads, the second over pairs of heads of
    each layer, and both texts.

    Args:
        first, second: spectra of the same heads on two texts, `(layers, heads, d)`.
    """
    both = torch.stack([first, second]).clamp(min=LEAST).log10()
    pairs = (both[:, :, :, None] - both[:, :, None]).abs().mean(-1)  # (texts, layers, heads, heads)
    heads = pairs.shape[-1]
    return (both[0] - both[1]).abs().mean().item(), pairs.sum((2, 3)).mean().item() / (heads * (heads - 1))


def chance(heads: int, groups: int) -> float:
    """The share of heads that two random typings put into the same group."""
    return sum(size**2 for size in group_sizes(heads, groups)) / heads**2


def moved(heads: int, groups: int, spread: float) -> float:
    """The share of all kept tokens that heads of the lower groups give to those of the upper ones.

    Half of the mean over heads of |budget − mean| / mean, before budgets are rounded to tokens.

    Args:
        heads, groups, spread: as of UNComp.
    """
    sizes, last = group_sizes(heads, groups), max(1, groups - 1)
    away = sum(size * abs(2 * group - groups + 1) / last for group, size in enumerate(sizes))
    return spread * away / heads / 2


def two_rules(measured: Measured, groups: int) -> dict[str, float]:
    """Of query heads, the percentage that the release's rule puts into another group than the mean rank does.

    Returns:
        "by lot", what two random typings would have; a number for each text of the calibration, and "all texts"; the
        furthest jump, in groups, on all texts.
    """
    found = {"by lot": 100 * (1 - chance(next(iter(measured.entropy.values())).shape[-1], groups))}
    for text in (*measured.entropy, None):
        clean, release = (measured.groups(groups, rule, stored=False, corpus=text) for rule in RULES)
        found[text or "all texts"] = 100 * (clean != release).double().mean().item()
    return found | {"furthest jump": (clean - release).abs().max().item()}


def two_typings(first: torch.Tensor, second: torch.Tensor) -> tuple[tuple[float, float], torch.Tensor]:
    """Are heads of a layer ranked alike by two statistics `(layers, heads)`?

    Returns:
        ((mean rank correlation over layers, percentage of heads in the same half), rank correlation of each layer,
        NaN where there are too few heads, three or less, to rank)
    """
    few = first.shape[1] <= 3
    in_layers = torch.full((len(first),), torch.nan) if few else rank_correlation(first, second)
    halves = (by_rank(first, 2) == by_rank(second, 2)).double().mean().item()
    return (in_layers.mean().item(), 100 * halves), in_layers


def before_and_after(found: dict) -> tuple[pd.DataFrame, dict]:
    """Entropies of heads before and after rotation: are heads of a layer ranked alike by both?

    Args:
        found: (model, text, tensor, "before" or "after") -> spectra `(layers, heads, d)`.

    Returns:
        (a row per model, tensor, text and entropy, "truncated" or "full": before, after, means over heads; "rank
        correlation" and "same half, %" as of `two_typings`; (model, tensor, text, entropy) -> (entropies before and
        after, rank correlation of each layer))
    """
    rows, in_layers = {}, {}
    for model, text, tensor in dict.fromkeys(place[:3] for place in found):
        both = [found[model, text, tensor, when] for when in ("before", "after")]
        for kind, count in {"truncated": truncation(both[0].shape[-1]), "full": None}.items():
            pair = [entropy(spectra, count) for spectra in both]
            numbers, each = two_typings(*pair)
            rows[model, tensor, text, kind] = [*(x.mean().item() for x in pair), *numbers]
            in_layers[model, tensor, text, kind] = pair, each
    index = pd.MultiIndex.from_tuples(rows, names=["model", "tensor", "text", "entropy"])
    return pd.DataFrame(list(rows.values()), index, ["before", "after", "rank correlation", "same half, %"]), in_layers


def other_counts(spectra: torch.Tensor, shares) -> pd.DataFrame:
    """Are heads of a layer ranked by other numbers of eigenvalues as by the number that UNComp counts?

    Args:
        spectra: `(layers, heads, d)`. shares: of the d eigenvalues, how many count; left out where that is none.

    Returns:
        a row per share and kind, "as released" or "renormalised" (the eigenvalues that count are divided by their sum):
        kind, "k / d", "rank correlation", "same half", as `two_typings` returns them.
    """
    d, rows = spectra.shape[-1], []
    usual = entropy(spectra, truncation(d))
    shares = [share for share in shares if round(share * d) > 0]
    for share, (kind, renormalised) in product(shares, {"as released": False, "renormalised": True}.items()):
        (like, same), _ = two_typings(usual, entropy(spectra, round(share * d), renormalised))
        rows.append({"kind": kind, "k / d": share, "rank correlation": like, "same half": same})
    return pd.DataFrame(rows)


def as_calibrated(spectra: torch.Tensor, measured: Measured, groups: int) -> dict[str, float]:
    """Of KV heads, the percentage that a prompt puts into the group that a calibration has found.

    Args:
        spectra: of the prompt's queries, `(layers, query_heads, d)`.

    Returns:
        "typed by ..." each text of the calibration, and "both"; "by lot", what two random typings would have.
    """
    found = by_rank(per_kv_head(entropy(spectra, truncation(spectra.shape[-1])), measured.kv_heads), groups)
    shares = {}
    for text in (*measured.entropy, None):
        same = found == measured.groups(groups, corpus=text)
        shares[f"typed by {text or 'both'}"] = 100 * same.double().mean().item()
    return shares | {"by lot": 100 * chance(measured.kv_heads, groups)}


def stability(
    entropies: torch.Tensor,
    groups: int,
    counts=(1, 2, 4, 8),
    *,
    against: torch.Tensor | None = None,
    rule: str = "clean",
    draws: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Typed by so many windows, which share of the heads is in the group that other windows put it into?

    Args:
        entropies: `(windows, layers, heads)`. counts: how many of these windows type, drawn without replacement.
        against: entropies of other windows, all of which say what is right; None: the windows that were not drawn.
        rule: "clean" or "release", of both sides.

    Returns:
        a row per count: value, the mean over draws; low and high, the middle nine tenths of the draws.
    """
    generator, rows, of = torch.Generator().manual_seed(seed), {}, RULES[rule]
    for count in counts:
        shares = []
        for _ in range(draws):
            order = torch.randperm(len(entropies), generator=generator)
            others = entropies[order[count:]] if against is None else against
            same = of(entropies[order[:count]], groups) == of(others, groups)
            shares.append(same.double().mean())
        shares = torch.stack(shares)
        low, high = shares.quantile(torch.tensor([0.05, 0.95], dtype=shares.dtype)).tolist()
        rows[count] = {"value": shares.mean().item(), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("windows")


def between_texts(measured: Measured, groups: int, draws: int = 50, seed: int = 0) -> pd.DataFrame:
    """`stability` of a calibration's KV heads within prose, within code, and of prose typed by code.

    Returns:
        its rows in percent, with windows as a column; kind, "prose by code" being the last; at, an abscissa that keeps
        the kinds apart.
    """
    prose, code = (per_kv_head(measured.entropy[text], measured.kv_heads) for text in ("prose", "code"))
    cases = {"prose by prose": (prose, None), "code by code": (code, None), "prose by code": (code, prose)}
    rows = []
    for place, (kind, (windows, against)) in enumerate(cases.items()):
        counts = [
            2**power for power in range(len(windows).bit_length()) if against is not None or 2**power < len(windows)
        ]
        same = 100 * stability(windows, groups, counts, against=against, draws=draws, seed=seed)
        rows.append(same.reset_index().assign(kind=kind, at=same.index * (0.96 + 0.04 * place)))
    return pd.concat(rows)


def intervals(axes, rows: pd.DataFrame, looks: dict[str, dict]) -> None:
    """A line of points with intervals for each kind.

    Args:
        rows: columns at, the abscissa; value, low, high; kind.
        looks: kind, which is also the label -> keyword arguments of `axes.errorbar`.
    """
    for kind, look in looks.items():
        own = rows[rows["kind"].eq(kind)]
        # The mean of equal draws can be outside of them by rounding.
        errors = [(own["value"] - own["low"]).clip(lower=0), (own["high"] - own["value"]).clip(lower=0)]
        axes.errorbar(own["at"], own["value"], yerr=errors, capsize=2, elinewidth=1, label=kind, **look)
