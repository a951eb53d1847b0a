"""What lessons 90 and 90b compare: methods on prompts that all have answered, and the bytes that each would store."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd

from kvlib import paths
from kvlib.lab import statistics
from kvlib.lab.plotting import printed, series
from kvlib.lab.results.summaries import named
from kvlib.lab.tasks.natural.words import GOLDEN

SAMPLES = 24  # of each family of SmolLM2's
TABLES = {  # what stands in several is taken from the first, which says of which prompts
    "asked": ("90_real", "00_real", "01_real", "02_real"),
    "later": ("90_real_later", "00_real_later"),
    "texts": ("90_real_texts", "00_real_texts"),
    "minilm, asked": ("90_comparison", "00_kv_cache", "01_vatp", "02_uncomp"),
    "minilm, later": ("90_comparison_later",),
}
KINDS = {  # what a method does, in the order of the lesson
    "position": "random streaming_llm",
    "keys alone": "knorm keydiff lagkv",
    "attention of all": "h2o tova scissorhands vatp keyformer expected_attention subgen adaptive elastic_cache",
    "attention of the end": "snapkv pyramidkv adakv uncomp kv_compress critical_kv defensive_kv corm zipvl",
    "a second reading": "kvzip",
    "fewer bits": "int8 kivi",
    "fewer directions": "think lorc eigen_attention cskv",
    "fewer layers": "minicache kvsharer",
    "sampled": "subgen_sampled",
    "two together": "combined",
}
OLDER = [  # of the tables of other lessons, which hold controls and ablations too
    "full", "random", "streaming_llm", "h2o", "scissorhands", "tova", "knorm", "vatp (host=h2o)", "vatp (host=snapkv)",
    "snapkv", "snapkv (window=8, kernel=15)", "pyramidkv", "adakv", "adakv (window=8)", "uncomp",
]  # fmt: skip
ONE_PLACE = [  # families whose answer stands once, where their first fact is
    "constant", "number", "number_of_four", "profession", "quantity", "recall", "register", "returned", "secret_word",
    "year",
]  # fmt: skip
CELL = ["configuration", "budget"]


def rows(kind: str) -> pd.DataFrame:
    """What all methods have answered of the same prompts, those of the first table of a kind.

    Args:
        kind: a key of `TABLES`: a protocol, of SmolLM2 if no model is named.
    """
    tables = [named(pd.read_parquet(paths.RESULTS / f"{name}.parquet")) for name in TABLES[kind]]
    found = [tables[0], *(table[table["configuration"].isin(OLDER)] for table in tables[1:])]
    together = pd.concat(found).drop_duplicates([*CELL, "task", "sample"], ignore_index=True)
    together = together.merge(tables[0][["task", "sample"]].drop_duplicates())
    counts = together.groupby(CELL)["value"].transform("size")
    return together[counts == counts.max()]


def shares(table: pd.DataFrame) -> pd.Series:
    """Bytes after the prompt as a share of a full cache, if the model computes in 16 bits, by configuration and budget.

    Measured with a model in bfloat16 (`90_bytes.parquet`) where what is stored is not keys and values as they are;
    tables of answers are made in 32 bits, in which 8 bits would look like a quarter.
    """
    sums = table.groupby(CELL)[["stored_bytes", "full_bytes"]].sum()
    measured = named(pd.read_parquet(paths.RESULTS / "90_bytes.parquet")).groupby(CELL)["value"].mean()
    return measured.reindex(sums.index).fillna(sums["stored_bytes"] / sums["full_bytes"]).rename("share")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per configuration and budget: label, method, kind, share, and the mean of values with its interval."""
    kinds = {name: kind for kind, names in KINDS.items() for name in names.split()}
    share, found = shares(table), {}
    for (configuration, budget), cell in table.groupby(CELL, sort=False):
        value = statistics.mean([part.to_numpy() for _, part in cell.groupby("task")["value"]])
        method, arguments = cell[["method", "arguments"]].iloc[0]
        found[configuration, budget] = {
            "label": label(method, arguments), "method": method, "kind": kinds.get(method, ""),
            "share": share[configuration, budget], "mean": value.value, "low": value.low, "high": value.high,
        }  # fmt: skip
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(CELL)


def label(method: str, arguments: str) -> str:
    """A setting as in print, without its budget: "KVzip", "SnapKV + 8 bits", "KIVI, 4 bits"."""
    given = json.loads(arguments)
    if method == "combined":
        store = printed(given["store"]) if "store" in given else f"read by {printed(given['reader'])}"
        return f"{printed(given['evictor'])} + {store.replace('KIVI', 'KIVI, 2 bits')}"
    if "host" in given:
        return f"{printed(method)} on {printed(given['host'])}"
    said = {
        "kivi": f"{given.get('bits', 2)} bits",
        "cskv": f"{given.get('keys', 0.5):.0%}{', activations' if 'calibration' in given else ''}",
        "kvsharer": f"{given.get('order', 'dissimilar')} first",
        "think": f"{1 - given.get('ratio', 0.4):.0%} of keys" if method == "think" else "",
        "lorc": "more directions" if given else "",
        "eigen_attention": f"{given.get('rank', 0.5):.0%}" if method == "eigen_attention" else "",
        "zipvl": f"τ = {given.get('tau')}",
        "corm": f"window {given.get('window')}" if given else "",
        "kvzip": "asked to repeat" if given else "",
        "snapkv": "tuned" if given else "",
    }.get(method, ", ".join(f"{name}={value}" for name, value in given.items() if name != "window"))
    return f"{printed(method)}, {said}" if said else printed(method)


def front(found: pd.DataFrame) -> pd.DataFrame:
    """The Pareto front: rows that no other beats in the mean with as small a share, or in share with as high a mean."""
    by_bytes = found.sort_values(["share", "mean"], ascending=[True, False])
    best = by_bytes["mean"].cummax()
    return by_bytes[(by_bytes["mean"] == best) & ~best.duplicated()]


def differences(table: pd.DataFrame, pairs: dict) -> pd.DataFrame:
    """Paired differences in points, with 95 % intervals over prompts and Holm's p over all pairs.

    Args:
        pairs: label -> (first, second), each (configuration, budget).

    Returns:
        A row per label: value, low, high of first - second; p of no difference, adjusted; more, fewer: prompts on which
        the first is better, and worse.
    """
    cells = {cell: part.set_index(["task", "sample"])["value"] for cell, part in table.groupby(CELL)}
    found = {}
    for name, sides in pairs.items():
        both = pd.concat([cells[side] for side in sides], axis=1, keys=["first", "second"], join="inner")
        first, second = ([part.to_numpy() for _, part in both[side].groupby("task")] for side in both)
        gap = statistics.paired_difference(first, second)
        found[name] = {x: 100 * getattr(gap, x) for x in ("value", "low", "high")}
        found[name] |= {"p": min(gap.above(0), gap.below(0))}
        found[name] |= {"more": (both["first"] > both["second"]).sum(), "fewer": (both["first"] < both["second"]).sum()}
    result = pd.DataFrame.from_dict(found, orient="index")
    return result.assign(p=statistics.holm(result["p"]))


def by_family(table: pd.DataFrame, cells: dict) -> pd.DataFrame:
    """Percent right, a row per label of `cells` (label -> (configuration, budget)), a column per family."""
    means = table.groupby([*CELL, "task"])["value"].mean().unstack("task")
    return 100 * pd.DataFrame({name: means.loc[cell] for name, cell in cells.items()}).T


def by_depth(table: pd.DataFrame, cells: dict, parts: int) -> pd.DataFrame:
    """Percent right over `ONE_PLACE` by where the answer stands, in `parts` equal parts of the text.

    A sample's number says where its first fact is put (`kvlib.lab.tasks.natural.words.Draw.depths`), between the first
    tokens and the last ones of the text, which every method keeps.
    """
    edges = np.linspace(0, 1, parts + 1)
    names = [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in pairwise(edges)]
    some = table[table["task"].isin(ONE_PLACE)]
    part = pd.cut(some["sample"] * GOLDEN % 1, edges, labels=names, include_lowest=True)
    means = some.groupby([*CELL, part.rename("part")], observed=False)["value"].mean().unstack("part")
    return 100 * pd.DataFrame({name: means.loc[cell] for name, cell in cells.items()}).T[names]


def draw(axes, found: pd.DataFrame, named_rows: dict) -> None:
    """Answers over bytes: every setting a point, those of `named_rows` with their look, and the front as a band.

    Args:
        found: as `summary` gives it. named_rows: configuration -> series' name, whose budgets are joined by a line.
    """
    others = found.drop(index="full", level="configuration")
    axes.plot(others["share"], 100 * others["mean"], linestyle="", marker=".", color="#bbbbbb", zorder=1)
    best = front(others)
    steps = {"where": "post", "zorder": 2}
    edge = np.append(best["share"], 1.0)
    low, mean, high = (100 * np.append(best[x], best[x].iloc[-1]) for x in ("low", "mean", "high"))
    axes.fill_between(edge, low, high, step="post", color="#dddddd", linewidth=0, zorder=0)
    axes.step(edge, mean, color="#777777", linewidth=1, **steps)
    for configuration, name in named_rows.items():
        if configuration not in found.index.get_level_values("configuration"):
            continue
        points = found.xs(configuration, level="configuration").sort_values("share")
        errors = [100 * (points["mean"] - points["low"]), 100 * (points["high"] - points["mean"])]
        axes.errorbar(
            points["share"], 100 * points["mean"], yerr=errors, capsize=2, elinewidth=0.8, zorder=3,
            **series(name) | {"label": points["label"].iloc[0], "markersize": 7},
        )  # fmt: skip
    whole = found.xs("full", level="configuration").iloc[0]
    axes.axhline(100 * whole["mean"], **{x: series("full")[x] for x in ("label", "color", "linestyle")})


def beside(axes, sides: dict, zero: pd.Series) -> None:
    """A row per setting, the first on top: a full marker with its interval, and an open one.

    Args:
        sides: two summaries of the same settings, as `summary` gives them, by what they are. zero: of the full cache.
    """
    first, second = sides.values()
    for place, (cell, row) in enumerate(first.iterrows()):
        look = series(cell[0].partition("evictor=")[2].partition(",")[0] or row["method"])
        for other, face, lift in ((row, look["color"], -0.12), (second.loc[cell], "white", 0.14)):
            errors = [[100 * (other["mean"] - other["low"])], [100 * (other["high"] - other["mean"])]]
            style = {"marker": "o", "color": look["color"], "markerfacecolor": face, "linestyle": "", "capsize": 2}
            axes.errorbar(100 * other["mean"], place + lift, xerr=errors, elinewidth=1, **style)
    for name, face in zip(sides, ("#444444", "white")):
        axes.plot([], [], marker="o", color="#444444", markerfacecolor=face, linestyle="", label=name)
    axes.axvline(100 * zero["mean"], color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(first)), first["label"])
    axes.set_ylim(len(first) - 0.5, -0.5)
