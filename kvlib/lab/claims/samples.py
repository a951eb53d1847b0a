"""The samples of a result table that a claim is about."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib.lab.claims.claim import Cell, Claim, Side, named

MEASURES = {  # what is measured -> columns it needs, and how it follows from them
    "value": (["value"], lambda rows: rows["value"]),
    "exact": (["value"], lambda rows: (rows["value"] == 1).astype(float)),  # of lines judged by their similarity
    "stored": (["stored_bytes", "full_bytes"], lambda rows: rows["stored_bytes"] / rows["full_bytes"]),
    "read": (["read_bytes", "full_bytes"], lambda rows: rows["read_bytes"] / rows["full_bytes"]),
    "prefill": (["prefill_flops"], lambda rows: rows["prefill_flops"]),
}


class Missing(Exception):
    """What a table lacks to decide a claim."""


def load(results: Path, name: str) -> pd.DataFrame:
    """A result table. Raises `Missing`, saying what is wrong with it."""
    file = results / f"{name}.parquet"
    if not file.is_file():
        raise Missing(f"there is no table {file.name} yet")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError):  # pyarrow's errors are of these kinds
        raise Missing(f"{file.name} is not a readable table") from None
    texts = ["model", "method", "arguments", "task", "protocol"]
    needed = [*texts, "budget", "length", "sample", "value", "clamped"]
    if absent := [column for column in needed if column not in table]:
        raise Missing(f"{file.name} has no column {', '.join(absent)}")
    try:
        for text in table["arguments"].unique():
            json.loads(text)
        numbers = {"budget": float, "value": float, "clamped": bool}
        return table.astype(numbers | dict.fromkeys(texts, "category"))  # a million texts take seconds to compare
    except (TypeError, ValueError):
        raise Missing(f"{file.name} holds values of another type than results have") from None


def rows_of(table: pd.DataFrame, claim: Claim, model: str, cell: Cell, side: Side) -> pd.DataFrame:
    """The rows of one side on the tasks of a cell; `model` is the claim's, if the side has none of its own.

    Raises:
        Missing: if a task has none, naming the budgets that there are; if the table has none of the protocol.
    """
    configuration, model = side.configuration, side.model or model
    rows = table[
        (table["model"] == model) & (table["method"] == configuration.method) & (table["length"] == claim.length)
    ]
    wanted = json.loads(configuration.arguments)
    same = [text for text in rows["arguments"].unique() if json.loads(text) == wanted]
    rows = rows[rows["arguments"].isin(same) & rows["task"].isin(cell.tasks)]
    if side.protocol:
        if side.protocol not in set(table["protocol"]):
            raise Missing(f"rows of the protocol {side.protocol} are not kept")
        rows = rows[rows["protocol"] == side.protocol]
    found = rows[rows["budget"] == configuration.budget]
    lacking = sorted(set(cell.tasks) - set(found["task"]))
    if lacking or not cell.tasks:
        budgets = ", ".join(f"{budget:g}" for budget in sorted(rows["budget"].unique()))
        where = f" on {', '.join(lacking)}" if len(found) else f" (budgets there: {budgets})" if budgets else ""
        of = f"{side.model}, {named(configuration)}" if side.model else named(configuration)
        raise Missing(f"no rows of {of} at {configuration.budget:g}, length {claim.length}{where}")
    return found


def per_sample(rows: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """By task and sample, averaged over seeds because samples are what is resampled: the claim's measure as `measured`.

    Raises:
        Missing: if a row is there twice or has no value, or the table lacks a column.
    """
    identity = ["task", "sample", *(["seed"] if "seed" in rows else [])]
    if rows.duplicated(identity).any():
        raise Missing("the table has rows twice")
    needed, measured = MEASURES[claim.measure]
    equal = [f"{claim.equal_bytes}_bytes"] if claim.equal_bytes else []
    if absent := [name for name in (*needed, *equal) if name not in rows]:
        raise Missing(f"the table has no column {', '.join(absent)}")
    if not all(pd.api.types.is_numeric_dtype(rows[name]) for name in (*needed, *equal)):
        raise Missing(f"the table holds no numbers in {', '.join((*needed, *equal))}")
    rows = rows.assign(measured=measured(rows), task=rows["task"].astype(str))
    if not np.isfinite(rows["measured"]).all():
        raise Missing("the table has rows without a value")
    return rows.groupby(["task", "sample"], sort=True)[["measured", "clamped", *equal]].mean()
