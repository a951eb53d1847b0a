"""How lessons show methods that read part of a cache: who reads what in a step, and points over the bytes read."""

import re

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from kvlib.lab import statistics
from kvlib.lab.lessons import comparing
from kvlib.lab.lessons.drawing import annotated_grid, interval_bars
from kvlib.lab.plotting import COLORS, series
from kvlib.lab.results import summaries

ROLES = {  # what a layer does with a token, and its colour
    "not read": "#f4f4f4",
    "read by a dense layer": "#c4c4c4",
    "read by a selection layer": "#5c5c5c",
    "read by a sparse layer": COLORS["tidaldecode"],
}


def step_map(axes, chosen, selection_layers: tuple[int, ...]) -> list[Patch]:
    """Layers over tokens of one decode step of TidalDecode, coloured by what is read; returns handles of a legend.

    Args:
        chosen: `(layers, tokens)` bool, what each layer would choose for one head.
        selection_layers: ascending; layers before the first are dense, those behind each read its choice.
    """
    unread, dense, selection, sparse = range(len(ROLES))
    picture = np.full(chosen.shape, dense)
    for layer in range(selection_layers[0] + 1, len(chosen)):
        chooses = max(choosing for choosing in selection_layers if choosing <= layer)
        picture[layer] = np.where(chosen[chooses].numpy(), sparse, unread)
    picture[list(selection_layers)] = selection
    colors = ListedColormap(list(ROLES.values()))
    axes.imshow(picture, aspect="auto", interpolation="nearest", cmap=colors, vmin=unread, vmax=sparse, rasterized=True)
    axes.set(ylabel="layer")
    axes.grid(False)
    return [Patch(color=color, label=role) for role, color in ROLES.items()]


def layer_pairs(axes, matrix, label: str | None = None) -> None:
    """A triangular map of what one layer's choice is worth to each later one, from 0 to 1.

    Args:
        matrix: `(layers, layers)`, a tensor, row: the layer that chooses; only the part above the diagonal is drawn.
        label: of the colour bar; without one there is no bar.
    """
    layers, ticks = len(matrix), range(0, len(matrix), 5)
    above = np.triu(np.ones((layers, layers), dtype=bool), 1)
    table = pd.DataFrame(np.where(above, matrix.numpy(), np.nan))
    annotated_grid(axes, table, label, limits=(0, 1), numbers=False)
    axes.set_xticks([tick + 0.5 for tick in ticks], ticks)
    axes.set_yticks([tick + 0.5 for tick in ticks], ticks)
    axes.set_xlabel("layer that reads")


def look(configuration: str) -> dict:
    """Keyword arguments of `axes.plot` for a reader, its name as in print without numbers of layers.

    Of TidalDecode a set per query head is a full thin diamond and one per KV head an open one; one set for all heads is
    an open square diamond, and LessIsMore, which adds sinks and the newest tokens to that, a full one. A line with
    correction is dotted.
    """
    method, _, variant = configuration.partition(" ")
    base = series(method)
    if method == "loki" and "rank=" in variant:
        return base | {"label": "Loki, all directions", "linestyle": ":"}
    if method != "tidaldecode":
        return base
    if "heads=group" in variant:
        base |= {"label": "TidalDecode, set per KV head", "markerfacecolor": "white", "linestyle": "--"}
    elif "heads=all" in variant and "recent=" in variant:
        base |= {"label": "LessIsMore", "marker": "D"}
    elif "heads=all" in variant:
        base |= {"label": "TidalDecode, one set", "marker": "D", "markerfacecolor": "white", "linestyle": "-."}
    if period := re.search(r"correction=(\d+)", variant):
        base |= {"label": f"{base['label']}, corrected every {period[1]}", "linestyle": ":"}
    return base


def points(table: pd.DataFrame, families, above: tuple[str, float] | None = None) -> pd.DataFrame:
    """What every setting reads and scores.

    Args:
        table: rows of one study and model.
        families: tasks, of which the mean is taken.
        above: (configuration, budget) whose score on the same prompts is taken off.

    Returns:
        index (configuration, budget) in the order of the table; columns read, the share of the full cache's bytes that
        a decode step reads; value, low, high, the mean over families with its 95 % interval over prompts.
    """
    cells = summaries.named(table[table["task"].isin(families)]).groupby(["configuration", "budget"], sort=False)
    scores = {setting: rows.set_index(["task", "sample"])["value"] for setting, rows in cells}
    shares = cells["read_bytes"].sum() / cells["full_bytes"].sum()
    found = {}
    for setting, own in scores.items():
        both = pd.concat([own, scores[above or setting]], axis=1, join="inner", keys=["own", "other"])
        sides = [[both.loc[family, side] for family in families] for side in both]
        estimate = statistics.paired_difference(*sides) if above else statistics.mean(sides[0])
        found[setting] = {"read": shares[setting], "value": estimate.value, "low": estimate.low, "high": estimate.high}
    made = pd.DataFrame.from_dict(found, orient="index")
    return made.set_axis(pd.MultiIndex.from_tuples(made.index, names=["configuration", "budget"]))


def between(first: pd.DataFrame, second: pd.DataFrame, settings: dict, families) -> pd.DataFrame:
    """One setting in two tables, such as those of two protocols, on the prompts that both have.

    Args:
        first, second: rows of one model and length.
        settings: label -> (configuration, budget).

    Returns:
        A row per label with the columns of `comparing.changes`, of first - second.
    """
    sides = {"first": first, "second": second}
    both = pd.concat([table.assign(method=f"{side} " + table["method"]) for side, table in sides.items()])
    pairs = {label: (f"first {name}", f"second {name}", budget) for label, (name, budget) in settings.items()}
    return comparing.changes(both, pairs, families)


def lines_over(axes, found: pd.DataFrame, x: str, factor: float = 1) -> None:
    """A line per configuration, its rows joined, over a column of `found`, with intervals.

    Args:
        found: as `points` returns it. factor: 100 for percent.
    """
    for configuration, rows in found.groupby(level="configuration", sort=False):
        rows = rows.sort_values(x)
        interval_bars(axes, rows[x], factor * rows[["value", "low", "high"]], **look(configuration))


def lines_over_bytes(axes, found: pd.DataFrame, factor: float = 1) -> None:
    """`lines_over` the bytes that a step reads, in percent of the full cache."""
    lines_over(axes, found.assign(bytes=100 * found["read"]), "bytes", factor)
    axes.set_xlabel("bytes read, % of the full cache")


def legend(panels) -> tuple[list, list[str]]:
    """Handles and labels of several panels, each label once."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    return [*found.values()], [*found]
