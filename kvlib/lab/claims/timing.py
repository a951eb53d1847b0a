"""Claims of speed, decided by what `kvlib.lab.speed` has measured: how many times faster one row is than another.

There is no sample of prompts here. The interval goes from the least favourable of the repeated blocks to the most
favourable: of what is slow the least time by the greatest of what is fast, and the other way round.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib.lab.claims.claim import Timed
from kvlib.lab.claims.samples import Missing

FACTS = ("model", "dtype", "device", "torch", "date")
TIMES = ("ms", "ms_min", "ms_max", "blocks")  # of a row that is compared with another one
RATIOS = ("ratio", "ratio_min", "ratio_max", "pairs", "baseline")  # of one that took turns with its baseline
SCOPE = "{models}; {dtype}, {device}, torch {torch}, {date}; {fast} against {slow}"


@dataclass(frozen=True)
class Speed:
    """How many times faster, the least and the most of it, repeated blocks, and the row of what is fast."""

    value: float
    least: float
    most: float
    repeats: int
    row: pd.Series

    def lies(self, rule: tuple[float, float]) -> str:
        """Where the interval lies, one of `kvlib.lab.claims.deciding.FINDINGS`."""
        low, high = rule
        if low < self.least and self.most < high:
            return "inside"
        if self.least < high and low < self.most:
            return "undecided"
        return "opposite" if self.most < 1 <= low or high <= 1 < self.least else "outside"


def examine(results: Path, timed: Timed) -> Speed:
    """Raises `Missing` if the table, a column, or one row that fits, is not there; for rows of different machines."""
    if timed.slow is None:
        row = row_of(results, timed.table, timed.fast, RATIOS)
        return Speed(1 / row["ratio"], 1 / row["ratio_max"], 1 / row["ratio_min"], int(row["pairs"]), row)
    needed = (*TIMES, *(["batch"] if timed.per_text else []))
    fast, slow = (row_of(results, timed.table, side, needed) for side in (timed.fast, timed.slow))
    if differ := [name for name in ("device", "dtype", "torch") if fast[name] != slow[name]]:
        raise Missing(f"the rows compared differ in {', '.join(differ)}")
    texts = fast["batch"] / slow["batch"] if timed.per_text else 1
    pairs = ("ms", "ms"), ("ms_min", "ms_max"), ("ms_max", "ms_min")
    value, least, most = (texts * slow[one] / fast[other] for one, other in pairs)
    return Speed(value, least, most, int(fast["blocks"]), fast)


def row_of(results: Path, name: str, cells: dict, needed: tuple[str, ...]) -> pd.Series:
    """The one row with these cells, in which the facts and what is needed have values."""
    file = results / f"{name}.csv"
    if not file.is_file():
        raise Missing(f"there is no table {file.name} yet")
    table = pd.read_csv(file)
    if absent := sorted({*cells, *FACTS, *needed} - set(table)):
        raise Missing(f"{file.name} has no column {', '.join(absent)}")
    fits = np.logical_and.reduce([table[column] == value for column, value in cells.items()])
    wanted = ", ".join(f"{column} {value}" for column, value in cells.items())
    if fits.sum() != 1:
        raise Missing(f"{file.name} has {fits.sum()} rows of {wanted}")
    row = table[fits].iloc[0]
    if absent := [column for column in (*FACTS, *needed) if pd.isna(row[column])]:
        raise Missing(f"{file.name} has no {', '.join(absent)} of {wanted}")
    return row


def scope(timed: Timed, speed: Speed) -> str:
    """What was tested, in words."""
    facts = speed.row[["dtype", "device", "torch", "date"]]
    slow = speed.row["baseline"] if timed.slow is None else in_words(timed.slow)
    texts = ", time by texts" if timed.per_text else ""
    return SCOPE.format(models=models(speed), **facts, fast=in_words(timed.fast), slow=slow) + texts


def models(speed: Speed) -> str:
    return f"{speed.row['model']} with random weights"


def in_words(cells: dict) -> str:
    """The cells of a side but for what the scope says anyway; "compiled" if what lies between products is."""
    said = {column: value for column, value in cells.items() if column not in (*FACTS, "fused", "baseline")}
    words = [f"{column} {value}" for column, value in said.items()]
    return ", ".join([*words, *(["compiled"] if cells.get("fused") else [])])
