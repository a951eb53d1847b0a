"""Bits of arms on the same files, by hand."""

import pandas as pd
import pytest

from kvlib.lab.lessons import arms
from kvlib.lab.plotting import COLORS


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [("T-4", "a", 1000, 1.1), ("T-4", "b", 3000, 1.2), ("D2", "b", 3000, 1.0), ("D2", "a", 1000, 1.0)]
    return pd.DataFrame(rows, columns=["arm", "file", "characters", "bits"])


def test_more_bits_by_hand(table):
    """Long files count more, and files are paired in whatever order they stand."""
    found = arms.more_bits(table, {"TAA": ("T-4", "D2"), "the reverse": ("D2", "T-4")})
    assert found.loc["TAA", "value"] == pytest.approx(100 * ((1100 + 3600) / 4000 - 1))
    assert found.loc["the reverse", "value"] == pytest.approx(100 * (4000 / 4700 - 1))
    assert found["files"].tolist() == [2, 2]
    low, high = found.loc["TAA", ["low", "high"]]
    assert [low, high] == pytest.approx([10, 20])  # one file alone, drawn twice


def test_arms_that_read_other_files(table):
    with pytest.raises(ValueError, match="TAA: not the same files"):
        arms.more_bits(table[:-1], {"TAA": ("T-4", "D2")})


def test_looks():
    assert arms.look("TML-4")["color"] == COLORS["anchorcoder"] and arms.look("TML-4")["label"] == "TML-4"
    drawn = [tuple(arms.look(name).values())[1:] for name in arms.LOOKS]
    assert len(set(drawn)) == len(drawn)
