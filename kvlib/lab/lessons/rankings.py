"""What lesson 90b asks of an order of settings: how much of it is left where something else is different."""

from itertools import combinations

import numpy as np
import pandas as pd

from kvlib.lab import statistics
from kvlib.lab.lessons.field import CELL


def of_both_models(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of minilm with its calibrations called as SmolLM2's, so that a setting has one name on both."""
    return table.assign(configuration=table["configuration"].str.replace("minilm", "smollm2"))


def means(table: pd.DataFrame) -> pd.Series:
    """The mean over families of each setting's mean, by configuration and budget."""
    return table.groupby([*CELL, "task"])["value"].mean().groupby(CELL).mean()


def agreement(first: pd.DataFrame, second: pd.DataFrame, by: str, draws: int = 200, seed: int = 0) -> dict:
    """Spearman's rank correlation of the settings of both tables, no prompt on both sides.

    In each draw half of the first table's groups, by lot, are ranked against the second table's other groups, which
    are all of them if it has others. The same table twice says what chance leaves of an order.

    Args:
        first, second: rows of equally many prompts in every group.
        by: the column that groups: "task" for families, "sample" for numbers of prompts within each family.

    Returns:
        value, low, high: the median over the draws and the ends of their middle 95 %; settings, how many.
    """
    one, other = (table.groupby([*CELL, by])["value"].mean().unstack(by) for table in (first, second))
    both = one.index.intersection(other.index)
    one, other, rng, found = one.loc[both], other.loc[both], np.random.default_rng(seed), []
    for _ in range(draws):
        half = rng.permutation(one.columns)[: one.shape[1] // 2]
        rest = other.drop(columns=half, errors="ignore")
        found.append(one[half].mean(axis=1).corr(rest.mean(axis=1), method="spearman"))
    low, value, high = np.quantile(found, (0.025, 0.5, 0.975))
    return {"value": value, "low": low, "high": high, "settings": len(both)}


def pair_intervals(table: pd.DataFrame, cells: list) -> pd.DataFrame:
    """95 % intervals of the paired difference of every two settings, in points; single ones, of 999 resamples.

    Args:
        cells: (configuration, budget) of each setting.

    Returns:
        A row per pair, in the order of `itertools.combinations`: low, high of the first minus the second.
    """
    values = {cell: rows.set_index(["task", "sample"])["value"].sort_index() for cell, rows in table.groupby(CELL)}
    sides = {cell: [rows.to_numpy() for _, rows in values[cell].groupby("task")] for cell in cells}
    found = {}
    for one, other in combinations(cells, 2):
        gap = statistics.paired_difference(sides[one], sides[other], resamples=999)
        found[one, other] = {"low": 100 * gap.low, "high": 100 * gap.high}
    return pd.DataFrame([*found.values()], index=pd.Index([*found], tupleize_cols=False))
