"""Two settings of a result table on the prompts that both have answered, and estimates in percentage points."""

import pandas as pd

from kvlib.lab import statistics
from kvlib.lab.results import summaries


def changes(table: pd.DataFrame, comparisons: dict, tasks) -> pd.DataFrame:
    """Paired differences in percentage points with 95 % intervals over prompts, where both settings have a row.

    Args:
        table: rows of one study and model.
        comparisons: label -> (first, second, budget), the settings as in the column `configuration`.

    Returns:
        A row per label: value, low, high of first - second, the mean over tasks; p, two-sided, against no difference;
        deviation, the standard deviation of the differences of single prompts, in points; prompts; differ, on how many
        of them the two do.

    Raises:
        KeyError: for a setting that the table does not have.
    """
    cells = {
        cell: rows.set_index(["task", "sample"])["value"]
        for cell, rows in summaries.named(table).groupby(["configuration", "budget"])
    }
    found = {}
    for label, (first, second, budget) in comparisons.items():
        both = pd.concat([cells[first, budget], cells[second, budget]], axis=1, join="inner", keys=["first", "second"])
        sides = [[both.loc[task, side] for task in tasks] for side in both]
        difference, apart = statistics.paired_difference(*sides), both["first"] - both["second"]
        found[label] = points(difference)
        found[label]["p"] = min(difference.above(0), difference.below(0))
        found[label] |= {"deviation": 100 * apart.std(), "prompts": len(both), "differ": int((apart != 0).sum())}
    return pd.DataFrame.from_dict(found, orient="index").astype({"prompts": int, "differ": int})


def points(estimate: statistics.Estimate) -> dict[str, float]:
    """value, low and high of a share, in percent, or of a difference of shares, in percentage points."""
    return {name: 100 * getattr(estimate, name) for name in ("value", "low", "high")}


def by_prompt(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The values of one budget: a row per prompt, (task, sample); a column per setting, named as in `configuration`."""
    rows = summaries.named(table).query("budget == @budget")
    return rows.pivot(index=["task", "sample"], columns="configuration", values="value")


def tipped(first: pd.Series, second: pd.Series, gained: int, lost: int, seed: int) -> list[tuple[str, int]]:
    """Prompts, drawn, that the first setting answers and the second does not, and then of the other way round.

    Args:
        first, second: columns of `by_prompt`, whose values are 0 or 1. gained, lost: how many of each kind.

    Raises:
        ValueError: if there are fewer.
    """
    change = first - second
    drawn = [change[change == way].sample(count, random_state=seed) for way, count in ((1, gained), (-1, lost))]
    return [*pd.concat(drawn).index]
