"""Intervals against simulated truth, tests against enumeration, what n samples can show against simulated power."""

from fractions import Fraction
from functools import cache
from itertools import product
from math import comb, inf

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvlib.lab.statistics import (
    RESAMPLES,
    Estimate,
    across,
    detectable,
    detectable_shift,
    holm,
    mean,
    paired_difference,
    paired_ratio,
    sign_test,
    wins_needed,
)


def answers(rng, samples: int, only_first: float, only_second: float, both: float = 0.3):
    """Right (1) and wrong (0) answers of two sides that disagree at the given rates."""
    u = rng.random(samples)
    first = (u < only_first) | (u > 1 - both)
    second = ((u >= only_first) & (u < only_first + only_second)) | (u > 1 - both)
    return first.astype(float), second.astype(float)


# Intervals


def scipys(function, *sides) -> tuple[float, float]:
    """The limits of scipy's percentile bootstrap, which draws rows."""
    rng = np.random.default_rng(0)
    made = stats.bootstrap(sides, function, paired=True, method="percentile", vectorized=True, rng=rng)
    return tuple(made.confidence_interval)


def test_one_task_is_the_plain_bootstrap():
    """Of answers and of scores that take as many values as there are samples."""
    rng = np.random.default_rng(1)
    for first, second in (answers(rng, 400, 0.2, 0.1), rng.normal(5, 1, (2, 400))):
        found = mean([first])
        assert found.value == pytest.approx(first.mean())
        assert (found.low, found.high) == pytest.approx(scipys(np.mean, first), abs=0.01)
        found = paired_difference([first], [second])
        assert found.value == pytest.approx((first - second).mean())
        assert (found.low, found.high) == pytest.approx(scipys(np.mean, first - second), abs=0.01)
    found = paired_ratio([first], [second])
    assert found.value == pytest.approx(first.mean() / second.mean())

    def ratio(x, y, axis):
        return x.mean(axis) / y.mean(axis)

    assert (found.low, found.high) == pytest.approx(scipys(ratio, first, second), abs=0.01)


def test_any_sequence_holds_values():
    """Columns of tables with an index of their own, lists, booleans."""
    right = [True, False, True, True]
    expected = paired_difference([np.array(right, dtype=float)], [np.zeros(4)])
    assert paired_difference([pd.Series(right, index=[4, 3, 2, 1])], [[0, 0, 0, 0]]) == expected
    assert mean(np.array([right, right])).value == 0.75  # a row per task


def test_every_task_counts_the_same():
    """Not every sample: one task has a hundred times as many."""
    found = mean([np.ones(1000), np.zeros(10)])
    assert found.value == 0.5 and 0.45 < found.low < 0.5 < found.high < 0.65
    found = paired_difference([np.ones(1000), np.zeros(10)], [np.zeros(1000), np.ones(10)])
    assert found.value == 0
    assert paired_ratio([[2, 2], [6]], [[1, 1], [1]]).value == 4


def test_tasks_of_different_levels_do_not_widen_the_interval():
    """Samples are drawn within their task, so that only the spread within tasks counts."""
    rng = np.random.default_rng(2)
    groups = [rng.normal(level, 1, 100) for level in (0, 50, 100)]
    found = mean(groups)
    width = 2 * 1.96 / np.sqrt(300)
    assert found.high - found.low == pytest.approx(width, rel=0.15)


def test_pairs_stay_together():
    """The same shift on very different samples is known exactly; drawing the sides apart would not see it."""
    base = np.random.default_rng(3).normal(0, 10, 60)
    found = paired_difference([base + 0.5], [base])
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert paired_ratio([3 * (base + 100)], [base + 100]).low == pytest.approx(3)


@pytest.mark.parametrize("samples", [(50,), (200,), (50, 50, 50), (30, 120)], ids=str)
@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0.05, 0), (0.05, 0.05), (0.02, 0), (0.3, 0), (0.5, 0.1), (0.97, 0.0), (0.03, 0.5)]
)
def test_intervals_of_differences_cover_the_truth(samples, only_first, only_second):
    rng, runs = np.random.default_rng(4), 300
    found = []
    for seed in range(runs):
        pairs = [answers(rng, n, only_first, only_second, both=0.03) for n in samples]
        found.append(paired_difference(*zip(*pairs), resamples=399, seed=seed))
    truth = round(only_first - only_second, 12)
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)
    variance = only_first + only_second - truth**2  # of a difference
    made_up = 2 / len(samples)  # samples for each task
    width = 2 * 1.96 * np.sqrt(sum((variance + made_up / n) / n for n in samples)) / len(samples)
    assert np.mean([one.high - one.low for one in found]) < 1.25 * width


@cache
def all_answers(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits for 0, 1, ... right answers."""
    found = [mean([np.repeat([1, 0], [right, samples - right])], resamples=1999) for right in range(samples + 1)]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


@pytest.mark.parametrize("samples", [50, 200])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9, 0.97, 0.995])
def test_intervals_of_means_cover_the_truth(samples, share):
    """How often they do, exactly: there are only so many counts of right answers."""
    low, high = all_answers(samples)
    chances = stats.binom.pmf(np.arange(samples + 1), samples, share)
    assert 0.95 <= chances[(low <= share) & (share <= high)].sum() < 0.999


@pytest.mark.parametrize("samples", [50, 200])
def test_intervals_of_means_are_near_the_exact_ones(samples):
    """Those of Clopper and Pearson, which are known to be a little wide."""
    low, high = all_answers(samples)
    exact = [stats.binomtest(right, samples).proportion_ci() for right in range(samples + 1)]
    assert low == pytest.approx(np.array([one.low for one in exact]), abs=2 / samples)
    assert high == pytest.approx(np.array([one.high for one in exact]), abs=2 / samples)
    assert ((high - low)[1:-1] > 0).all() and (high - low).mean() < np.mean([one.high - one.low for one in exact])


def test_intervals_of_other_scores_cover_the_truth():
    """Scores between 0 and 1, which take as many values as there are samples."""
    rng, runs = np.random.default_rng(6), 200
    found = [mean([rng.beta(2, 5, 80), rng.beta(5, 2, 80)], resamples=399) for _ in range(runs)]
    assert np.mean([one.low <= 0.5 <= one.high for one in found]) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)


def test_no_disagreement_is_not_certainty():
    same = paired_difference([np.ones(200)], [np.ones(200)])
    assert same.value == 0 and -0.025 < same.low < 0 < same.high < 0.025
    assert 0.97 < mean([np.ones(200)]).low < 1
    for value in (0.3, 2.0):  # not right or wrong: nothing says how such values vary
        assert mean([np.full(200, value)]) == Estimate(value, value, value, None)
        assert paired_difference([np.full(200, value)], [np.full(200, value)]) == Estimate(0, 0, 0, None)
    stored = paired_difference([np.ones(200)], [np.full(200, 0.25)])  # all bytes against a quarter
    assert stored == Estimate(0.75, 0.75, 0.75, None)


def test_a_half_right_answer_does_not_make_the_others_certain():
    """The share of made-up samples follows the share of rows that are right or wrong."""
    widths = []
    for half in (0, 1, 100, 199):
        same = np.repeat([0.5, 1.0], [half, 200 - half])
        found = paired_difference([same], [same])
        assert found.value == 0 and found.low == -found.high
        widths.append(found.high)
    assert widths[0] == widths[1] == 0.015 > widths[2] > widths[3] == 0
    many = np.concatenate([np.linspace(0.1, 0.9, 40), np.ones(160)])  # also among many distinct values
    assert 0.01 <= paired_difference([many], [many]).high <= 0.015


def test_a_ratio_of_ones_is_certain():
    """Made-up samples are for scores."""
    assert paired_ratio([np.ones(20)], [np.ones(20)]) == Estimate(1, 1, 1, None)


@pytest.mark.parametrize(("wins", "losses"), [(4, 0), (5, 0), (6, 0), (9, 2), (10, 2), (20, 10), (40, 22)])
def test_decisions_are_near_those_of_the_exact_test(wins, losses):
    """A plain bootstrap calls 4 of 4 significant (p = 0.04 instead of 0.125)."""
    first, second = np.zeros(200), np.zeros(200)
    first[:wins] = second[wins : wins + losses] = 1
    exact = stats.binomtest(wins, wins + losses).pvalue
    assert paired_difference([first], [second]).above(0) == pytest.approx(exact, abs=0.02)
    both = paired_difference(np.split(first, 4), np.split(second, 4))  # tasks share the two made-up samples
    assert both.above(0) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("resamples", [199, 399, RESAMPLES])
@given(seed=st.integers(0, 2**16), continuous=st.booleans())
@settings(max_examples=15)
def test_intervals_and_p_values_say_the_same(confidence, resamples, seed, continuous):
    """At and between the draws about both limits, where one rank more or less would decide otherwise."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0.1, 1, (2, 40)) if continuous else answers(rng, 40, 0.3, 0.2)
    found = paired_difference([first], [second], resamples=resamples, confidence=confidence)
    level, rank = round(1 - confidence, 12), round((1 - confidence) / 2 * (resamples + 1))
    near = np.concatenate([found.draws[rank - 4 : rank + 3], found.draws[-rank - 3 : -rank + 4 or None]])
    for at in (*near, *((near[1:] + near[:-1]) / 2), 0.0):
        assert (found.above(at) <= level) == (found.low > at)
        assert (found.below(at) <= level) == (found.high < at)
    mirrored = paired_difference([second], [first], resamples=resamples)
    assert mirrored.value == -found.value


def test_same_seed_same_interval():
    groups = [np.random.default_rng(7).random(50) for _ in range(3)]
    first, again, other = (mean(groups, seed=seed) for seed in (0, 0, 1))
    assert (first.low, first.high) == (again.low, again.high) != (other.low, other.high)


@pytest.mark.parametrize("confidence", [0.8, 0.9])
def test_other_confidence(confidence):
    first, second = answers(np.random.default_rng(8), 100, 0.3, 0.2)
    usual, found = (paired_difference([first], [second], confidence=level) for level in (0.95, confidence))
    assert found.value == usual.value and usual.low < found.low < found.high < usual.high
    assert np.mean(found.draws < found.low) <= (1 - confidence) / 2 <= np.mean(found.draws <= found.low)
    assert np.mean(found.draws > found.high) <= (1 - confidence) / 2 <= np.mean(found.draws >= found.high)


def test_an_estimate_shows_no_draws():
    assert repr(mean([[2, 2]])) == "Estimate(value=2.0, low=2.0, high=2.0)"


def test_what_is_not_a_list_of_tasks():
    for statistic in (mean, lambda values: paired_difference(values, values)):
        with pytest.raises(ValueError, match=r"values of each task is needed: \[values\] for a single one"):
            statistic(np.ones(3))
        with pytest.raises(ValueError, match="tasks are needed"):
            statistic([])
        with pytest.raises(ValueError, match="a task needs samples"):
            statistic([np.ones(2), []])
        with pytest.raises(ValueError, match="values have to be finite"):
            statistic([[0.5, np.nan]])  # every comparison with it would be false, and every p-value tiny


def test_sides_have_to_pair_up():
    with pytest.raises(ValueError, match="a task needs samples, the same on both sides: 3 and 2"):
        paired_difference([np.ones(3)], [np.ones(2)])
    with pytest.raises(ValueError, match="the same on both sides: 2 and 1"):
        paired_difference([np.ones(3)] * 2, [np.ones(3)])
    with pytest.raises(ValueError, match="positive values to divide by"):
        paired_ratio([np.ones(3)], [np.array([1, 0, 1])])


# Tests


@pytest.mark.parametrize(("wins", "losses"), [(12, 4), (13, 3), (4, 12), (8, 8), (3, 0), (16, 0)])
def test_sign_test_against_all_outcomes(wins, losses):
    """The share of all sequences of wins and losses that are as one-sided, counted."""
    total = wins + losses
    as_extreme = sum(comb(total, w) for w in range(total + 1) if abs(2 * w - total) >= abs(wins - losses))
    assert sign_test(wins, losses) == pytest.approx(float(Fraction(as_extreme, 2**total)))


def test_what_a_count_is_worth():
    assert round(sign_test(12, 4), 2) == 0.08
    assert sign_test(0, 0) == 1
    assert wins_needed(16) == 13 and wins_needed(6) == 6 and wins_needed(5) is None
    for tasks in range(6, 40):
        needed = wins_needed(tasks)
        assert sign_test(needed, tasks - needed) <= 0.05 < sign_test(needed - 1, tasks - needed + 1)


def reference_holm(pvalues, level):
    """Rejections, word for word: go up the sorted p-values and stop at the first above level / those not yet tested."""
    rejected = [False] * len(pvalues)
    for done, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        if pvalues[i] * (len(pvalues) - done) > level:
            break
        rejected[i] = True
    return rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_procedure_rejects(pvalues, level):
    adjusted = holm(pvalues)
    assert (adjusted <= level).tolist() == reference_holm(pvalues, level)
    assert (adjusted >= np.array(pvalues)).all() and (adjusted <= 1).all()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]).tolist() == [0.2]


# What n samples can show


@pytest.mark.parametrize(
    ("n", "disagreement"), [(200, 0.2), (200, 0.02), (50, 0.4), (600, 0.3), (200, 0.0), (100, 0.9)]
)
def test_detectable_effects_are_found_four_times_in_five(n, disagreement):
    rng, runs = np.random.default_rng(8), 400
    effect = detectable(n, disagreement)
    total = max(disagreement, effect)
    found = []
    for _ in range(runs):
        pair = answers(rng, n, (total + effect) / 2, (total - effect) / 2, both=0)
        found.append(paired_difference([pair[0]], [pair[1]], resamples=1999).above(0) <= 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)


def test_detectable_shift_of_other_values():
    rng, effect = np.random.default_rng(9), detectable_shift(100, 2.0)
    found = [mean([rng.normal(effect, 2, 100)], resamples=399).above(0) <= 0.05 for _ in range(300)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


def test_detectable_is_monotone_and_says_when_nothing_is_enough():
    assert detectable(200, 0.1) < detectable(100, 0.1) < detectable(100, 0.3)
    assert detectable(200, 0.1) < detectable(200, 0.1, power=0.9)
    assert detectable(200, 0.1) < detectable(200, 0.1, confidence=0.99)
    assert detectable(200, 0.1) == pytest.approx(0.0622, abs=1e-4)  # d √200 = 1.960 √0.1 + 0.842 √(0.1 − d²)
    assert detectable(3, 0.5) == inf
    for n, disagreement in product((0, 10), (-0.1, 1.1)):
        with pytest.raises(ValueError, match="at least one sample, and a share"):
            detectable(n, disagreement)
    with pytest.raises(ValueError, match="n=0"):
        detectable(0, 0.5)


def test_one_fraction_among_many_cells_does_not_make_agreement_certain():
    """Two samples a task that agree everywhere prove little, also where one of them is half right twice."""
    groups = [np.zeros(2) for _ in range(15)] + [np.array([0.5, 0.0])]
    estimate = paired_difference(groups, groups)
    assert estimate.low < -0.02 and estimate.high > 0.02 and estimate.above(-0.001) > 0.05


# Across tasks


def test_across_tasks_is_students_t():
    """On one number a task, however many samples it has."""
    rng = np.random.default_rng(10)
    first, second = ([rng.normal(level, 1, n) for level, n in zip(rng.normal(shift, 1, 9), range(3, 12))]
                     for shift in (0.5, 0))  # fmt: skip
    for sides in ((first,), (first, second)):
        means = np.array([[values.mean() for values in side] for side in sides])
        changes = means[0] - means[1] if len(sides) == 2 else means[0]
        found = across(*sides)
        assert found.value == pytest.approx(changes.mean())
        for boundary in (-0.3, 0, 0.2, changes.mean() + 0.1):
            exact = stats.ttest_1samp(changes, boundary).pvalue
            likelier = found.above if changes.mean() > boundary else found.below
            other = found.below if changes.mean() > boundary else found.above
            assert likelier(boundary) == pytest.approx(exact) and other(boundary) == 1


def test_across_tasks_of_a_ratio():
    """The scale of either side changes the ratio and nothing else; the error is nearly that of leaving out tasks."""
    rng = np.random.default_rng(11)
    second = [rng.uniform(1, 3, 4) for _ in range(40)]
    first = [values * rng.uniform(0.4, 0.6) for values in second]
    found = across(first, second, ratio=True)
    scaled = across([10 * values for values in first], second, ratio=True)
    assert scaled.value == pytest.approx(10 * found.value) and scaled.error == pytest.approx(10 * found.error)
    assert scaled.above(4.7) == pytest.approx(found.above(0.47))
    x, y = (np.array([values.mean() for values in side]) for side in (first, second))
    without = [np.delete(x, i).mean() / np.delete(y, i).mean() for i in range(40)]
    assert found.error == pytest.approx(np.std(without) * 39**0.5 * (39 / 40) ** 0.5, rel=0.03)
    assert found.value == pytest.approx(x.mean() / y.mean()) and found.freedom == 39


@pytest.mark.parametrize("tasks", [3, 8, 16])
def test_across_tasks_is_wrong_one_time_in_twenty(tasks):
    """Where tasks differ, which resampled prompts of the same tasks do not show."""
    rng, runs, wrong, narrow = np.random.default_rng(12), 600, 0, 0
    for seed in range(runs):
        leads = rng.normal(0, 0.09, tasks).clip(-0.19, 0.19)
        pairs = [answers(rng, 100, 0.2 + lead, 0.2 - lead) for lead in leads]
        found = across(*zip(*pairs))
        wrong += min(found.above(0), found.below(0)) <= 0.05
        if seed < 60:
            one = paired_difference(*zip(*pairs), resamples=199, seed=seed)
            narrow += min(one.above(0), one.below(0)) <= 0.05
    assert wrong / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert narrow / 60 > 0.35


def test_across_one_task_is_nothing_and_equal_tasks_are_certain():
    assert across([np.ones(5)]) is None
    same = across([np.array([0.1, 0.2])] * 3, [np.zeros(2)] * 3)
    assert same.value == 0.15 and same.above(0) == 0 and same.below(0) == 1 and same.above(0.15) == 1
