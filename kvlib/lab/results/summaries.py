"""Result tables in few numbers: means with their intervals, values of single cells, and the sentences of README."""

import json

import pandas as pd

from kvlib.lab import statistics
from kvlib.lab.tasks import FAMILIES, NATURAL

COMPARED = ["divergence", "agreement"]
SUMMARY = ["model", "tasks", "configuration", "budget", "stored", "mean", "low", "high", *COMPARED, "samples"]


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `configuration`: the method, and its arguments where they are not the defaults."""
    words = {}
    for arguments in table["arguments"].unique():
        pairs = ", ".join(f"{name}={value}" for name, value in json.loads(arguments).items())
        words[arguments] = f" ({pairs})" if pairs else ""
    return table.assign(configuration=table["method"] + table["arguments"].map(words))


def task_sets(table: pd.DataFrame) -> dict[str, list[str]]:
    """What is worth a mean: each catalogue of families, if the table has them all, and every task alone."""
    present = list(table["task"].unique())
    catalogues = {"families": list(FAMILIES), "natural": list(NATURAL)}
    together = {name: chosen for name, chosen in catalogues.items() if set(chosen) <= set(present)}
    return together | {task: [task] for task in present}


def summarise(table: pd.DataFrame, sets: dict[str, list[str]] | None = None) -> pd.DataFrame:
    """One row per model, set of tasks, configuration and budget, in the order of the table.

    Args:
        sets: name -> tasks; default: `task_sets`.

    Returns:
        columns `SUMMARY`: stored, the share of the full cache's bytes; mean, over tasks of means over samples, with
        its 95 % interval, which is over samples within tasks (`kvlib.lab.statistics.mean`); divergence and agreement
        likewise (`kvlib.lab.evaluation`); samples, of all tasks.
    """
    rows, sets = [], sets or task_sets(table)
    for (model, configuration, budget), cell in named(table).groupby(["model", "configuration", "budget"], sort=False):
        values = {task: part["value"] for task, part in cell.groupby("task", sort=False)}
        sizes = cell.groupby("task")[["stored_bytes", "full_bytes"]].sum()
        compared = cell.groupby("task")[COMPARED].mean()
        for name, chosen in sets.items():
            found = statistics.mean([values[task] for task in chosen])
            stored = sizes.loc[chosen, "stored_bytes"].sum() / sizes.loc[chosen, "full_bytes"].sum()
            samples = sum(len(values[task]) for task in chosen)
            means = (stored, found.value, found.low, found.high, *compared.loc[chosen].mean(skipna=False))
            rows.append((model, name, configuration, budget, *means, samples))
    return pd.DataFrame(rows, columns=SUMMARY)


def values(table: pd.DataFrame, task: str, configuration: str, budget: float) -> pd.Series:
    """Per-sample values of one cell of a result table, by sample.

    Raises:
        ValueError: for a cell that the table does not have, and for a table of several models.
    """
    if table["model"].nunique() > 1:
        raise ValueError(f"rows of {', '.join(table['model'].unique())}: choose one model")
    cell = table[(table["task"] == task) & (table["budget"] == budget)]
    cell = named(cell)[lambda rows: rows["configuration"] == configuration]
    if cell.empty:
        known = ", ".join(named(table)["configuration"].unique())
        raise ValueError(f"no rows for {task}, {configuration} at {budget}; configurations: {known}")
    return cell.set_index("sample")["value"].sort_index()


def finding(asked: pd.DataFrame, later: pd.DataFrame) -> str:
    """The sentences of README about the real model, from the rows of 00_real and 00_real_later."""
    means, too_late = (
        summarise(table, {"natural": list(NATURAL)}).set_index(["configuration", "budget"])["mean"]
        for table in (asked, later)
    )
    names, budgets = ("snapkv", "streaming_llm", "h2o", "random"), (0.2, 0.8)
    fifth, most = ([f"{100 * means[name, budget]:.0f} %" for name in names] for budget in budgets)
    unasked = [f"{100 * too_late[name, 0.2]:.0f} %" for name in names]
    return (
        f"SmolLM2 scores {100 * means['full', 1.0]:.0f} % over sixteen families of tasks in natural language. With a "
        f"fifth of its cache's bytes it scores {fifth[0]} under SnapKV, {fifth[1]} under StreamingLLM, {fifth[2]} "
        f"under H2O, {fifth[3]} under random eviction; with four fifths {', '.join(most[:3])} and {most[3]}. If the "
        f"question comes after the eviction, a fifth is worth {', '.join(unasked[:3])} and {unasked[3]}."
    )
