"""Drawings that lessons share; each draws into axes and takes methods by the names of `kvlib.METHODS`."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import LogNorm, to_rgba

from kvlib.lab.plotting import printed, series

EVICTED = "#eeeeee"


def budget_axis(axes, ticks=(0.05, 0.1, 0.2, 0.5, 0.8)) -> None:
    """A logarithmic horizontal axis of shares of the cache, written in percent."""
    axes.set(xscale="log", xlabel="bytes stored, % of the full cache")
    axes.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axes.minorticks_off()


def interval_lines(axes, summary: pd.DataFrame, x: str = "stored") -> None:
    """One line with intervals per configuration, percent over `x`; a configuration of one point crosses all of them.

    Args:
        summary: columns configuration, mean, low, high in [0, 1] and `x`, as `kvlib.lab.results.summaries.summarise`
            gives them for one model and one set of tasks.
    """
    for configuration, rows in summary.groupby("configuration", sort=False):
        rows, look = rows.sort_values(x), series(configuration)
        mean, low, high = (100 * rows[name].to_numpy() for name in ("mean", "low", "high"))
        if len(rows) == 1:
            axes.axhline(mean[0], **{name: look[name] for name in ("label", "color", "linestyle")})
        else:
            axes.errorbar(rows[x], mean, yerr=[mean - low, high - mean], capsize=2, elinewidth=1, **look)


def interval_bars(axes, places, found: pd.DataFrame, **look) -> None:
    """A point with its interval for each row, joined if the look has a line.

    Args:
        places: where on the horizontal axis. found: columns value, low, high. look: of `axes.errorbar`.
    """
    errors = [found["value"] - found["low"], found["high"] - found["value"]]
    axes.errorbar(places, found["value"], yerr=errors, **{"capsize": 2, "elinewidth": 1} | look)


def interval_points(axes, table: pd.DataFrame, zero: float | None = 0) -> None:
    """One point with its interval per row, the first row on top.

    Args:
        table: columns value, low, high; its index labels the rows, names of methods as in print.
        zero: where a line says "no difference"; None for no line.
    """
    places = range(len(table))
    errors = [table["value"] - table["low"], table["high"] - table["value"]]
    looks = [series(str(name)) for name in table.index]
    for place, look, (_, row), low, high in zip(places, looks, table.iterrows(), *errors):
        point = {"color": look["color"], "marker": look["marker"], "capsize": 3}
        axes.errorbar(row["value"], place, xerr=[[low], [high]], **point)
    if zero is not None:
        axes.axvline(zero, color="#555555", linewidth=1)
    axes.set_yticks(places, [look["label"] for look in looks])
    axes.set_ylim(len(table) - 0.5, -0.5)


def annotated_grid(
    axes,
    table,
    label: str | None,
    *,
    limits: tuple,
    digits: int = 0,
    neutral: float | None = None,
    log=False,
    numbers=True,
) -> None:
    """Coloured cells with their numbers, and a bar that says what they are.

    Args:
        table: `(rows, columns)`, a frame or a tensor such as a number per layer and head.
        label: what the numbers are; without one there is no bar, as when a panel beside this one has it.
        limits: ends of the colour scale. neutral: where a diverging scale has its pale middle, if it has one.
        log: whether colours go by the logarithm.
        numbers: whether cells show them.
    """
    if torch.is_tensor(table):
        table = pd.DataFrame(table.cpu().numpy())
    low, high = limits
    scale = {"norm": LogNorm(low, high)} if log else {"vmin": low, "vmax": high, "center": neutral}
    cells = min(axes.get_window_extent().width / table.shape[1], 2.2 * axes.get_window_extent().height / len(table))
    sns.heatmap(
        table.clip(lower=low) if log else table,
        annot=table.map(lambda value: "" if pd.isna(value) else f"{value:.{digits}f}") if numbers else None,
        fmt="",
        annot_kws={"fontsize": float(np.clip(cells / 4, 6, 10))},
        cmap="cividis" if neutral is None else "vlag",
        cbar=label is not None,
        cbar_kws={"label": label, "format": "{x:g}"},
        linewidths=0.5,
        rasterized=True,
        ax=axes,
        **scale,
    )
    axes.tick_params(length=0, labelrotation=0)
    axes.grid(False)


def strips(axes, kept: dict, *, marks: dict | None = None, labels: list[str] | None = None) -> None:
    """A strip of prompt tokens per method: its colour where tokens are kept, paler where fewer heads keep them.

    Args:
        kept: method -> share of heads that keep each token, `(tokens,)` in [0, 1]; or the keep-sets themselves,
            `(..., tokens)` bool, of which the mean is drawn.
        marks: label -> positions, written above the strips and marked by two lines.
        labels: the tokens, beneath the strips; positions are counted without them.
    """
    rows = [share.double().reshape(-1, share.shape[-1]).mean(0).cpu().numpy() for share in kept.values()]
    picture = np.ones((len(rows), len(rows[0]), 4))
    for row, (method, share) in enumerate(zip(kept, rows)):
        full, none = (np.array(to_rgba(color)) for color in (series(method)["color"], EVICTED))
        picture[row] = none + share[:, None] * (full - none)
    tokens = picture.shape[1]
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(-0.5, tokens - 0.5, len(rows) - 0.5, -0.5))
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="white", linewidth=5)
    for label, positions in (marks or {}).items():
        for edge in (min(positions) - 0.5, max(positions) + 0.5):
            axes.axvline(edge, color="black", linewidth=0.8)
        at = ((min(positions) + max(positions)) / 2, -0.5)
        axes.annotate(label, at, xytext=(0, 4), textcoords="offset points", ha="center", annotation_clip=False)
    axes.set_yticks(range(len(rows)), [printed(method) for method in kept])
    axes.tick_params(length=0)
    axes.grid(False)
    if labels is None:
        axes.set_xlabel("position in the prompt, tokens")
    else:
        axes.set_xticks(range(tokens), labels, rotation=90, family="monospace", fontsize=8)
