"""Which samples are recomputed, and which differences from the table are chance."""

import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL, MEASURED
from kvlib.lab.results import verification
from kvlib.lab.results.study import Study

TASKS = list(tasks.CATALOGUE)
CONFIGURATIONS = tuple(Configuration("random", round(0.01 * i, 2)) for i in range(1, 41))


def study(task_count: int, samples: list[int]) -> Study:
    models = {f"model {i}": n for i, n in enumerate(samples)}
    return Study(tuple(TASKS[:task_count]), 512, CONFIGURATIONS[:1], models)


# Drawing


@given(st.integers(1, 18), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 400), st.integers(0, 99))
@settings(max_examples=300)
def test_samples_are_spread(task_count, samples, count, seed):
    asked = study(task_count, samples)
    drawn = verification.draw(asked, count, seed)
    everything = [(m, t, n) for (m, s), t in itertools.product(asked.models.items(), asked.tasks) for n in range(s)]
    assert len(set(drawn)) == len(drawn) == min(count, len(everything)) and set(drawn) <= set(everything)
    assert drawn == verification.draw(asked, 400, seed)[:count]
    # no task twice before every task once, and no cell twice before every cell once
    first = drawn[: task_count * len(samples)]
    rounds = [first[i : i + task_count] for i in range(0, len(first), task_count)]
    assert all(len({task for _, task, _ in one}) == len(one) for one in rounds)
    assert len({cell[:2] for cell in first}) == len(first)
    # models alternate
    counts = Counter(model for model, _, _ in rounds[0])
    assert max(counts.values()) - min(counts[m] for m in asked.models) <= 1
    # cells have equally many, unless one has no more
    cells = Counter(cell[:2] for cell in drawn)
    most = max(cells.values())
    for (model, n), task in itertools.product(asked.models.items(), asked.tasks):
        assert cells[model, task] >= min(n, most - 1)


def test_every_sample_can_be_the_first():
    asked = study(3, [4, 2])
    firsts = {verification.draw(asked, 1, seed)[0] for seed in range(300)}
    assert len(firsts) == 3 * (4 + 2)


# Comparing


SAME = 0.3


def tables(values: np.ndarray, task: str = "needle") -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table whose values are all the same, and one that differs from it by `values`, (samples, configurations).

    Not 0 or 1, which stand for answers: a mean over configurations is neither.
    """
    rows = [
        {**dict.fromkeys(MEASURED, 1), "model": "m", "task": task, "length": 512, "protocol": "prompt", "sample": i}
        | {"method": "random", "arguments": "{}", "budget": float(j), "value": SAME + value}
        for (i, j), value in np.ndenumerate(values)
    ]
    again = pd.DataFrame(rows)
    return again.assign(value=SAME, torch="", device="", key=""), again


def compare(values: np.ndarray) -> float:
    return verification.compare(*tables(values))


def changed(samples: int, configurations: int, *places) -> np.ndarray:
    """Zeros, but 1 at `places`, each an index."""
    values = np.zeros((samples, configurations))
    for place in places:
        values[place] = 1
    return values


@pytest.mark.parametrize("samples", [*range(1, 12), 40, 200])
def test_one_or_two_samples_that_tipped_are_chance(samples):
    """For some or for all of their configurations, in the same or in different directions."""
    for first, second in itertools.product([0, 0.01, 1], [0, 0.01, 1, -1]):
        values = np.zeros((samples, 10))
        values[0], values[-1] = first, second
        again = tables(values)[1].assign(value_recorded=SAME)
        verification.check_mean(again)


@pytest.mark.parametrize("samples", [4, 5, 8, 20, 200])
def test_a_configuration_that_is_always_better_is_not(samples):
    """Although 97.5 % of the rows agree."""
    with pytest.raises(ValueError, match=r"recomputed values differ by \+0.025 \[0.025, 0.025\] on average"):
        compare(changed(samples, 40, np.s_[:, 3]))
    with pytest.raises(ValueError, match=r"recomputed values differ by -0.025"):
        compare(-changed(samples, 40, np.s_[:, 3]))
    fewer = 4 if samples > 5 else 3
    with pytest.raises(ValueError, match="on average"):
        compare(changed(samples, 40, np.s_[:fewer, 3]))


def test_changes_in_both_directions_are_chance():
    values = changed(40, 40, np.s_[:10, 3])
    values[5:10] *= -1
    assert compare(values) == 1 - 10 / 1600


def test_few_samples_have_no_mean_but_rows():
    assert compare(changed(3, 40, np.s_[:, 3])) == 0.975
    with pytest.raises(ValueError, match="only 95.0% of 120 recomputed rows agree with the table"):
        compare(changed(3, 40, np.s_[:, 3:5]))


def test_agreement_is_at_least_97_percent():
    values = changed(50, 20, *((i, 0) for i in range(30)))
    values[:15] *= -1
    assert compare(values) == 0.97
    values[31] = changed(1, 20, (0, 0))
    with pytest.raises(ValueError, match="only 96.9% of 1000 recomputed rows agree"):
        compare(values)


@pytest.mark.parametrize("column", verification.EXACT)
def test_other_columns_are_exact(column):
    table, again = tables(np.zeros((1, 40)))
    table.loc[7, column] = 2
    with pytest.raises(ValueError, match=f"{column} differs from what the table records"):
        verification.compare(table, again)
    for side in (table, again):  # what nothing tells is the same on both sides
        side[column] = side[column].astype(float)
        side.loc[7, column] = np.nan
    assert verification.compare(table, again) == 1.0
    table.loc[7, column] = 1.0
    with pytest.raises(ValueError, match=f"{column} differs"):
        verification.compare(table, again)


@pytest.mark.parametrize(
    ("column", "rounded", "different"),
    [
        ("divergence", 8e-4, 8e-3),
        ("agreement", 1 / 64, 2 / 64),
        ("anchor_nats", 8e-4, 8e-3),
        ("free_bits", 1e-4, 1e-3),
        ("missed", 0, 1 / 64),
        ("spurious", 0, 1 / 64),
    ],
)
def test_what_is_compared_with_the_full_cache_is_rounded_on_both_sides(column, rounded, different):
    table, again = (side.assign(**{column: 1.0}) for side in tables(np.zeros((2, 40))))
    for sign in (1, -1):
        assert verification.compare(table, again.assign(**{column: 1 + sign * rounded})) == 1
        with pytest.raises(ValueError, match="only 0.0% of 80 recomputed rows agree"):
            verification.compare(table, again.assign(**{column: 1 + sign * different}))
    none = again.assign(**{column: np.nan})
    assert verification.compare(none, none) == 1
    for sides in ((table, none), (none, again)):
        with pytest.raises(ValueError, match=f"{column} is measured where the table has none"):
            verification.compare(*sides)


@pytest.mark.parametrize(("column", "value", "other"), [("outcome", "passed", "time"), ("end_bytes", 5, 6)])
def test_what_follows_from_written_text_may_tip_with_it(column, value, other):
    table, again = (side.assign(**{column: value}) for side in tables(np.zeros((2, 40))))
    again.loc[[7, 60], column] = other
    assert verification.compare(table, again) == 0.975
    again.loc[8, column] = other
    with pytest.raises(ValueError, match=r"only 96.2% of 80 recomputed rows agree"):
        verification.compare(table, again)


@pytest.mark.parametrize("column", [*CELL, "sample"])
def test_rows_of_other_cells_are_none(column):
    table, again = tables(np.zeros((2, 3)))
    table[column] = table[column].where(table.index != 1, {"length": 9, "budget": 9.0, "sample": 9}.get(column, "x"))
    with pytest.raises(ValueError, match="the table lacks 1 of 6 recomputed rows"):
        verification.compare(table, again)


@pytest.mark.parametrize(("task", "measure"), [("code_bits", "answers"), ("needle", "sinks")])
def test_rounding_of_bits_and_norms_is_no_difference_and_does_not_add_up(task, measure):
    """What another machine's sums move by, in every row and in one direction; twenty times that is a difference."""
    rounded = np.full((12, 4), SAME * 2e-5)
    assert verification.compare(*tables(rounded, task), measure) == 1
    with pytest.raises(ValueError, match="only 0.0% of 48 recomputed rows agree"):
        verification.compare(*tables(20 * rounded, task), measure)


@pytest.mark.parametrize("task", ["needle", "long_generation", "next_line"])
def test_other_values_are_the_same_or_not(task):
    with pytest.raises(ValueError, match="only 0.0% of 48 recomputed rows agree"):
        verification.compare(*tables(np.full((12, 4), SAME * 2e-5), task))
