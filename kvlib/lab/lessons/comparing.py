"""Two settings of a result table on the prompts that both have answered."""

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
        found[label] = {name: 100 * getattr(difference, name) for name in ("value", "low", "high")}
        found[label]["p"] = min(difference.above(0), difference.below(0))
        found[label] |= {"deviation": 100 * apart.std(), "prompts": len(both), "differ": int((apart != 0).sum())}
    return pd.DataFrame.from_dict(found, orient="index").astype({"prompts": int, "differ": int})
