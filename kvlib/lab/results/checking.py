"""What can be checked of the data without running a model: that files are those that were recorded, and agree."""

from pathlib import Path

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.summaries import COMPARED, named, task_sets

ROUNDED = 1e-5  # to five digits, in the summaries


def problems(data: Path = paths.DATA) -> list[str]:
    """Everything that is wrong, in words: checksums of all lists, files without one, summaries of other tables."""
    found = [problem for sums in sorted(data.rglob(checksums.NAME)) for problem in checksums.problems(sums.parent)]
    found += checksums.unlisted(data, "*.yaml", "*.csv", "VERDICTS.md")
    found += checksums.unlisted(data / "results", "*.parquet", "*.csv")
    for folder in sorted(data.glob("calibration/*/")):
        found += checksums.unlisted(folder, "*.json", "*.safetensors")
    for name in STUDIES:
        table, summary = (data / "results" / f"{name}.{kind}" for kind in ("parquet", "csv"))
        if table.is_file() and summary.is_file() and not summed_up(pd.read_parquet(table), pd.read_csv(summary)):
            found.append(f"{summary} does not hold the means of {table.name}")
    return found


def summed_up(table: pd.DataFrame, summary: pd.DataFrame) -> bool:
    """Whether a summary holds the means, shares of bytes and numbers of samples of a table, and nothing else.

    Its intervals are not computed again: that takes minutes, and checksums vouch for them.
    """
    index, columns = ["model", "tasks", "configuration", "budget"], ["mean", "stored", "samples", *COMPARED]
    expected = means(table).set_index(index).sort_index()
    given = summary.set_index(index).sort_index()
    if not given.index.equals(expected.index):
        return False
    same = (given[columns] - expected[columns]).abs() <= ROUNDED
    return bool((same | (given[columns].isna() & expected[columns].isna())).all(axis=None))


def means(table: pd.DataFrame) -> pd.DataFrame:
    """`kvlib.lab.results.summaries.summarise` without intervals, which is what takes its time."""
    sets = task_sets(table)
    cells = named(table).groupby(["model", "configuration", "budget", "task"], sort=False)
    cells = cells.agg(
        mean=("value", "mean"), samples=("value", "size"), bytes=("stored_bytes", "sum"), full=("full_bytes", "sum"),
        **{column: (column, "mean") for column in COMPARED},
    ).reset_index()  # fmt: skip
    parts = []
    for name, chosen in sets.items():
        group = cells[cells["task"].isin(chosen)].groupby(["model", "configuration", "budget"], sort=False)
        averaged = {column: lambda values: values.mean(skipna=False) for column in ("mean", *COMPARED)}
        whole = group.agg(averaged | {"samples": "sum", "bytes": "sum", "full": "sum"}).reset_index()
        parts.append(whole.assign(tasks=name, stored=whole["bytes"] / whole["full"]))
    return pd.concat(parts)
