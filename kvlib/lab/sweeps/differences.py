"""What methods cost on the tasks of a study, against the full cache on the same samples: numbers, a page, figures."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from kvlib.lab import statistics
from kvlib.lab.book.tables import table
from kvlib.lab.lessons.drawing import interval_points
from kvlib.lab.plotting import printed, use_style
from kvlib.lab.results.summaries import named

MEAN = "mean of tasks"
FOUND = ["budget", "task", "configuration", "stored", "samples", "full", "score", "value", "low", "high"]
ACROSS = 4  # panels


def against_full(rows: pd.DataFrame, scale: float = 100) -> pd.DataFrame:
    """Scores of every method, and their paired differences from the full cache's.

    Args:
        rows: of one model, as a sweep makes them, the method "full" among them. scale: what scores are multiplied by.

    Returns:
        a row per budget, configuration and task, and for `MEAN` if there are several. Columns `FOUND`: stored, the
        share of the full cache's bytes; full and score, means over samples; value, low, high: score - full with its
        95 % interval, over samples within tasks.
    """
    rows = named(rows).set_index(["task", "sample"]).sort_index()
    full, found = rows[rows["method"] == "full"], []
    tasks = list(full.index.unique("task"))
    sets = {MEAN: tasks} if len(tasks) > 1 else {}
    for (budget, configuration), own in rows[rows["method"] != "full"].groupby(["budget", "configuration"]):
        for task, chosen in (sets | {task: [task] for task in tasks}).items():
            sides = [[side.loc[each, "value"] for each in chosen] for side in (full, own)]
            base, score = (sum(values.mean() for values in side) / len(chosen) for side in sides)
            change = statistics.paired_difference(sides[1], sides[0])
            stored, whole = own.loc[chosen, ["stored_bytes", "full_bytes"]].sum()
            numbers = (scale * number for number in (base, score, change.value, change.low, change.high))
            found.append((budget, task, configuration, stored / whole, sum(map(len, sides[0])), *numbers))
    return pd.DataFrame(found, columns=FOUND)


def page(name: str, found: pd.DataFrame, unit: str) -> str:
    """Markdown: for each budget a table of tasks and methods."""
    parts = [
        f"# {name}\n\nIn {unit}: the mean, and in brackets the 95 % interval of its difference from the full cache "
        "on the same samples.\n"
    ]
    for budget, own in found.groupby("budget"):
        methods = list(own["configuration"].unique())
        body = []
        for task, cells in own.groupby("task", sort=False):
            cells = cells.set_index("configuration")
            first = cells.iloc[0]
            numbers = [
                f"{c['score']:.2f} ({c['low']:+.2f} to {c['high']:+.2f})" for _, c in cells.loc[methods].iterrows()
            ]
            body.append([str(task), f"{first['samples']}", f"{first['full']:.2f}", *numbers])
        head = ["task", "samples", printed("full"), *map(printed, methods)]
        parts.append(f"## Budget {budget:g}\n\n{table(head, body, len(head) - 1)}")
    return "\n".join(parts)


def draw(name: str, found: pd.DataFrame, unit: str, folder: Path) -> Iterator[Path]:
    """Write a figure for each budget, a panel for each task; yields the files."""
    use_style()
    folder.mkdir(parents=True, exist_ok=True)
    for budget, own in found.groupby("budget"):
        panels = list(own.groupby("task", sort=False))
        down = -(-len(panels) // ACROSS)
        size = (2.6 * min(len(panels), ACROSS) + 1, 0.6 + down * (0.9 + 0.2 * own["configuration"].nunique()))
        figure, axes = plt.subplots(down, min(len(panels), ACROSS), figsize=size, sharey=True, squeeze=False)
        for place, (task, cells) in zip(axes.flat, panels):
            interval_points(place, cells.set_index("configuration")[["value", "low", "high"]])
            place.set_title(
                f"{str(task).partition('/')[2] or task}\nfull cache {cells['full'].iloc[0]:.3g}", fontsize=9
            )
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        figure.supxlabel(f"{name}, budget {budget:g}: {unit} above the full cache, with 95 % intervals", fontsize=10)
        file = folder / f"{name}_{budget:g}.svg"
        with matplotlib.rc_context({"svg.hashsalt": file.stem, "svg.fonttype": "none"}):
            figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
        yield file
