"""What held-out code costs arms that were trained alike, but for a part of the method."""

import pandas as pd

from kvlib.lab import statistics
from kvlib.lab.plotting import COLORS

LOOKS = {  # of arms: colour, marker, dash; greens, that of AnchorCoder for the paper's own
    "D1": ("#000000", ".", ":"),
    "D2": ("#555555", "s", ":"),
    "T-4": ("#8fd3bd", "v", "--"),
    "TM-4": ("#5cbd9d", "<", "--"),
    "TL-4": ("#3fa98a", ">", "--"),
    "TML-4": (COLORS["anchorcoder"], "P", "-"),
    "TML-6": ("#02704f", "X", "-"),
    "TML-8": ("#014a34", "d", "-"),
}


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


def look(arm: str) -> dict:
    """Keyword arguments of `axes.plot`. arm: without the name of its base."""
    color, marker, dash = LOOKS[arm]
    return {"label": arm, "color": color, "marker": marker, "linestyle": dash}
