"""Claims of speed: which rows they compare, the least and the most that blocks allow, and what follows."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.lab.claims import registered
from kvlib.lab.claims.ledger import ledger
from kvlib.lab.claims.samples import Missing
from kvlib.lab.claims.timing import Speed, Timed, examine
from kvlib.lab.claims.writing import scores

FACTS = {"model": "M", "dtype": "bfloat16", "device": "D", "torch": "2", "date": "2026-01-02", "blocks": 5}
ENTRY = {
    "id": "fast",
    "paper": "P",
    "claim": "It is twice as fast.",
    "evidence": "abstract",
    "registered": pd.Timestamp("2026-01-02").date(),
    "timed": {"table": "a_speed", "fast": {"method": "a"}, "slow": {"method": "stock"}},
    "rule": {"above": 2},
}


def write(folder, *rows) -> None:
    pd.DataFrame([FACTS | row for row in rows]).to_csv(folder / "a_speed.csv", index=False)


def row(method, ms, low, high, **more) -> dict:
    return {"method": method, "ms": ms, "ms_min": low, "ms_max": high, "batch": 1} | more


def judged(folder, **changes) -> pd.Series:
    claim = registered.parse(ENTRY | changes, {"a_speed"}, {})
    return ledger([claim], folder).iloc[0]


@pytest.mark.parametrize(
    "ms, said",
    [
        ((4.0, 3.9, 4.1), "reproduced here"),
        ((5.0, 4.5, 5.5), "undecided here"),
        ((6.0, 5.9, 6.1), "not reproduced here"),
        ((11.0, 10.5, 12.0), "opposite here"),
        ((9.99, 9.9, 10.2), "not reproduced here"),  # some blocks were faster than stock
    ],
)
def test_the_verdict_is_that_of_all_blocks(ms, said, tmp_path):
    write(tmp_path, row("a", *ms), row("stock", 10.0, 10.0, 10.0), row("b", 1.0, 1.0, 1.0))
    found = judged(tmp_path)
    assert found["verdict"] == said and found["n"] == "5" and found["p"] == found["holm"] == ""
    assert found["ours"] == f"{10 / ms[0]:.2f} [{10 / ms[2]:.2f}, {10 / ms[1]:.2f}]"
    assert found["scope"] == "M with random weights; bfloat16, D, torch 2, 2026-01-02; method a against method stock"


def test_the_interval_is_from_the_least_favourable_to_the_most(tmp_path):
    write(tmp_path, row("a", 2.0, 1.0, 4.0, batch=6), row("stock", 10.0, 8.0, 12.0, batch=3))
    sides = {"method": "a"}, {"method": "stock"}
    found, shared = (examine(tmp_path, Timed("a_speed", *sides, per_text=texts)) for texts in (False, True))
    assert (found.value, found.least, found.most) == (5, 2, 12)
    assert (shared.value, shared.least, shared.most) == (10, 4, 24)  # twice as many texts in a step


def test_a_row_that_took_turns_with_its_baseline_is_enough(tmp_path):
    """The ratio is of times: twice as fast is .5."""
    write(tmp_path, {"method": "a", "baseline": "stock", "ratio": 0.5, "ratio_min": 0.4, "ratio_max": 0.8, "pairs": 7})
    found = examine(tmp_path, Timed("a_speed", {"method": "a"}))
    assert (found.value, found.least, found.most, found.repeats) == (2, 1.25, 2.5, 7)
    timed = {"table": "a_speed", "fast": {"method": "a", "baseline": "stock"}}
    assert judged(tmp_path, timed=timed)["scope"].endswith("; method a against stock")


@pytest.mark.parametrize(
    "cells, lack",
    [
        ({"method": "c"}, "a_speed.csv has 0 rows of method c"),
        ({"model": "M"}, "a_speed.csv has 2 rows of model M"),
        ({"colour": "red"}, "a_speed.csv has no column colour"),
    ],
)
def test_one_row_has_to_fit(cells, lack, tmp_path):
    write(tmp_path, row("a", 1.0, 1.0, 1.0), row("stock", 1.0, 1.0, 1.0))
    with pytest.raises(Missing, match=re.escape(lack)):
        examine(tmp_path, Timed("a_speed", cells, {"method": "stock"}))
    found = judged(tmp_path, timed=ENTRY["timed"] | {"fast": cells})
    assert found["verdict"] == "not testable here" and found["reason"] == lack


def test_without_a_table_nothing_is_tested(tmp_path):
    assert judged(tmp_path)["reason"] == "there is no table a_speed.csv yet"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"timed": {"table": "a_speed"}}, "timed holds a table and fast"),
        ({"timed": {"table": "a_speed", "fast": {}}}, "fast is column: value"),
        ({"timed": ENTRY["timed"] | {"quick": {}}}, "timed holds a table and fast"),
        ({"timed": ENTRY["timed"] | {"per_text": 1}}, "per_text is true or false"),
        ({"timed": {"table": "a_speed", "fast": {"method": "a"}, "per_text": True}}, "there is no slow"),
        ({"timed": ENTRY["timed"] | {"table": "b_speed"}}, "a_speed"),
        ({"tasks": "all"}, "tasks"),
        ({"rule": None}, "lacks rule"),
    ],
)
def test_what_is_no_claim_of_speed(changes, why):
    with pytest.raises(ValueError, match=why):
        registered.parse(ENTRY | changes, {"a_speed"}, {})


def test_what_a_row_lacks_is_named(tmp_path):
    """Columns of times for two rows, of ratios for one; and values in them."""
    write(tmp_path, {"method": "a", "ms": 1.0}, {"method": "stock", "ms": 1.0})
    assert judged(tmp_path)["reason"] == "a_speed.csv has no column ms_max, ms_min"
    alone = {"table": "a_speed", "fast": {"method": "a"}}
    assert judged(tmp_path, timed=alone)["reason"].startswith("a_speed.csv has no column baseline, pairs, ratio")
    write(tmp_path, row("a", 1.0, np.nan, 1.0), row("stock", 1.0, 1.0, 1.0))
    assert judged(tmp_path)["reason"] == "a_speed.csv has no ms_min of method a"


def test_rows_of_different_machines_are_not_compared(tmp_path):
    write(tmp_path, row("a", 1.0, 1.0, 1.0), row("stock", 3.0, 3.0, 3.0, device="E", torch="3"))
    assert judged(tmp_path)["reason"] == "the rows compared differ in device, torch"


def test_reasons_say_where_it_lies(tmp_path):
    write(tmp_path, row("a", 4.0, 4.0, 4.0), row("slower", 20.0, 20.0, 20.0), row("stock", 10.0, 10.0, 10.0))
    assert judged(tmp_path)["reason"] == "it is above 2 times as fast"
    assert judged(tmp_path, rule={"above": 3})["reason"] == "it is below 3 times as fast"
    slower = ENTRY["timed"] | {"fast": {"method": "slower"}}
    assert judged(tmp_path, timed=slower)["reason"] == "it is slower"
    found = judged(tmp_path, rule={"below": 1})
    assert (found["verdict"], found["reason"]) == ("opposite here", "it is faster")


def test_a_compiled_comparison_says_so(tmp_path):
    write(tmp_path, row("a", 4.0, 4.0, 4.0, fused=True), row("stock", 10.0, 10.0, 10.0, fused=False))
    timed = ENTRY["timed"] | {"fast": {"method": "a", "fused": True}, "slow": {"method": "stock", "fused": False}}
    assert judged(tmp_path, timed=timed)["scope"].endswith("; method a, compiled against method stock")


def test_of_speed_nothing_is_said_across_families(tmp_path):
    write(tmp_path, row("a", 4.0, 4.0, 4.0), row("stock", 10.0, 10.0, 10.0))
    claim = registered.parse(ENTRY, {"a_speed"}, {})
    said = "- On M with random weights: 1 claims of papers and the field: 1 reproduced here."
    assert scores(ledger([claim], tmp_path)) == [said]


bounds = st.floats(0.1, 10).map(lambda x: round(x, 3))


@given(bounds, bounds, bounds)
def test_an_interval_lies_in_one_place(one, other, bound):
    least, most = sorted((one, other))
    speed = Speed((least + most) / 2, least, most, 5, pd.Series(dtype=object))
    above, below = speed.lies((bound, np.inf)), speed.lies((-np.inf, bound))
    assert above in ("inside", "undecided", "outside", "opposite")
    assert (above == "inside") == (least > bound) and (below == "inside") == (most < bound)
    assert (above == "undecided") == (least <= bound < most)
    assert (above == "opposite") == (most < 1 <= bound)
    assert (below == "opposite") == (bound <= 1 < least)
