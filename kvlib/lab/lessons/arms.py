"""Tables of models that were trained alike, but for a part of the method, beside a dense one at as many bytes.

A *contender* is an arm ("TML-4"), or the dense model D1 under another method ("full", "streaming_llm (sinks=0)"). All
of them have read the same prompts.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
import seaborn as sns

from kvlib.lab import functions, statistics, tasks
from kvlib.lab.lessons.drawing import interval_bars
from kvlib.lab.plotting import COLORS, series
from kvlib.lab.results import summaries

ARM = "anchorcoder"
NAMES = {  # as in print; of what is not listed, its name
    "full": "full cache (D1)",
    "streaming_llm (sinks=0)": "window",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
    "vatp (host=h2o)": "VATP on H2O",
    "snapkv": "SnapKV",
}
LOOKS = {  # of arms: colour, marker, dash; greens, that of AnchorCoder for the paper's own
    "D1": ("#000000", ".", ":"),
    "D2": ("#555555", "s", ":"),
    "T-4": ("#8fd3bd", "v", "--"),
    "TM-4": ("#5cbd9d", "<", "--"),
    "TL-4": ("#3fa98a", ">", "--"),
    "TML-4": (COLORS[ARM], "P", "-"),
    "T-6": ("#66b39b", "^", "--"),
    "TML-6": ("#02704f", "X", "-"),
    "TML-8": ("#014a34", "d", "-"),
    "T0": ("#8aa800", "D", "-."),
    "AnLLM": ("#6b8e23", "h", ":"),
    "FIX-4": ("#20a0a0", "p", "-."),
    "TML-4-seed1": ("#029e73", "1", ":"),
}


def contenders(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several tables together, with a column contender; lines are right to the letter (1) or not (0)."""
    rows = summaries.named(pd.concat(tables, ignore_index=True))
    arm = rows["model"].str.partition("-")[2]
    lines = rows["task"].map({name: tasks.find(name).metric == "similarity" for name in rows["task"].unique()})
    right = rows["value"].where(~lines, (rows["value"] == 1).astype(float))
    return rows.assign(contender=arm.where(rows["method"] == ARM, rows["configuration"]), value=right)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """By task, length and contender: mean, low, high over prompts, and stored, the share of bytes.

    Bytes are those at the end of the prompt, over those of a full cache of the same text without anchors.
    """
    found = {}
    for place, cell in rows.groupby(["task", "length", "contender"], sort=False):
        mean = statistics.mean([cell["value"]])
        stored = cell["stored_bytes"].sum() / cell["full_bytes"].sum()
        found[place] = {"mean": mean.value, "low": mean.low, "high": mean.high, "stored": stored}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["task", "length", "contender"])


def changes(rows: pd.DataFrame, pairs: dict[str, tuple[str, str]], chosen: Sequence[str], length: int) -> pd.DataFrame:
    """First contender against second on the same prompts: value, low, high, the mean over tasks, and prompts.

    Of tasks judged in bits the first one's excess in percent of the second's mean, where less is better; of others the
    difference in percentage points.

    Args:
        pairs: label -> (first, second). chosen: tasks, either all or none of which are judged in bits.

    Raises:
        ValueError: for tasks of both kinds, and for contenders whose prompts are not the same ones.
    """
    bits = {tasks.find(task).metric == "bits" for task in chosen}
    if len(bits) > 1:
        raise ValueError(f"{', '.join(chosen)}: bits and shares have no mean")
    here = rows[(rows["length"] == length) & rows["task"].isin(chosen)]
    values = here.set_index(["contender", "task", "sample"])["value"].sort_index()
    found = {}
    for label, contestants in pairs.items():
        sides = [[values.loc[name, task] for task in chosen] for name in contestants]
        if any(not one.index.equals(other.index) for one, other in zip(*sides)):
            raise ValueError(f"{label}: not the same prompts")
        if bits == {True}:
            ratio = statistics.paired_ratio(*sides)
            found[label] = {name: 100 * (getattr(ratio, name) - 1) for name in ("value", "low", "high")}
        else:
            gap = statistics.paired_difference(*sides)
            found[label] = {name: 100 * getattr(gap, name) for name in ("value", "low", "high")}
        found[label]["prompts"] = sum(map(len, sides[0]))
    return pd.DataFrame.from_dict(found, orient="index").astype({"prompts": int})


def more_bits(table: pd.DataFrame, pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """How many more bits one arm needs for the same files than another, in percent, with 95 % intervals over files.

    Args:
        table: columns arm, file, characters, bits (per character), as of `kvlib.anchored.bits`. pairs: label -> (first,
            second), names of arms.

    Returns:
        A row per label: value, low, high; files.

    Raises:
        ValueError: for arms that have not read the same files.
    """
    total = (table["bits"] * table["characters"]).groupby([table["arm"], table["file"]]).sum().unstack("arm")
    found = {}
    for label, names in pairs.items():
        sides = total[list(names)].dropna(how="all")
        if sides.isna().any(axis=None):
            raise ValueError(f"{label}: not the same files")
        ratio = statistics.paired_ratio(*([sides[name]] for name in names))
        found[label] = {name: 100 * (getattr(ratio, name) - 1) for name in ("value", "low", "high")}
        found[label]["files"] = len(sides)
    return pd.DataFrame.from_dict(found, orient="index").astype({"files": int})


def look(contender: str) -> dict:
    """Keyword arguments of `axes.plot`; what is no arm that is listed looks as in all lessons."""
    if contender not in LOOKS:
        return series(contender) | {"label": NAMES.get(contender, contender)}
    color, marker, dash = LOOKS[contender]
    return {"label": contender, "color": color, "marker": marker, "linestyle": dash}


def lines(axes, table: pd.DataFrame, contenders: Sequence[str], scale: float = 1.0) -> None:
    """A line with intervals per contender over the length of the prompt.

    Args:
        table: index (length, contender), columns value, low, high. scale: what values are multiplied by.
    """
    for number, name in enumerate(contenders):
        rows = table.xs(name, level="contender").sort_index() * scale
        places = rows.index * 1.012 ** (number - len(contenders) / 2)  # side by side
        interval_bars(axes, places, rows, **look(name))
    lengths = sorted(table.index.unique("length"))
    axes.set(xscale="log", xlabel="tokens of the prompt")
    axes.set_xticks(lengths, [f"{length:,}".replace(",", " ") for length in lengths])
    axes.minorticks_off()


def points(axes, table: pd.DataFrame) -> None:
    """A value with its interval per contender, the first one on top.

    Args:
        table: of `changes`; its labels are contenders.
    """
    for place, (contender, row) in enumerate(table.iterrows()):
        errors = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axes.errorbar(row["value"], place, xerr=errors, capsize=3, **look(contender) | {"linestyle": ""})
    axes.axvline(0, color="black", linewidth=1, linestyle=":")
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_yticks(range(len(table)), [look(name)["label"] for name in table.index])


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Percent of functions that fared in each way, one row per contender, columns `kvlib.lab.functions.KINDS`."""
    shares = pd.crosstab(rows["contender"], rows["outcome"], normalize="index")
    return 100 * shares.reindex(columns=functions.KINDS, fill_value=0.0)


def bars(axes, kinds: pd.DataFrame, passed: pd.DataFrame) -> None:
    """A bar per contender, the first one on top, with how functions fared, and intervals of the share that passes.

    Args:
        kinds: of `outcomes`. passed: columns mean, low, high, in percent.
    """
    left, places = pd.Series(0.0, kinds.index), range(len(kinds))
    met = [kind for kind in kinds if kinds[kind].any()]
    for kind, color in zip(met, ["#e6c229", *sns.color_palette("Greys", len(met) - 1)]):
        axes.barh(places, kinds[kind], left=left, color=color, label=kind)
        left = left + kinds[kind]
    errors = [passed["mean"] - passed["low"], passed["high"] - passed["mean"]]
    axes.errorbar(passed["mean"], places, xerr=errors, linestyle="", color="black", capsize=3)
    axes.set_yticks(places, [look(name)["label"] for name in kinds.index])
    axes.set(xlabel="functions, %", xlim=(0, 100), ylim=(len(kinds) - 0.5, -0.5))
