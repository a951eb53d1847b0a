"""What lesson 90b asks of an order of settings, by hand; the checks of its exercises against wrong answers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_exercises import refused

from kvlib.lab import statistics
from kvlib.lab.lessons import field, rankings
from kvlib.lab.lessons.exercises import lesson_90b


def table(values: dict, samples: int = 2) -> pd.DataFrame:
    """Setting -> task -> the value of each of its prompts."""
    return pd.DataFrame(
        [
            {"configuration": name, "budget": 0.2, "task": task, "sample": sample, "value": float(value)}
            for name, tasks in values.items()
            for task, value in tasks.items()
            for sample in range(samples)
        ]
    )


RISING = {name: {"x": rank, "y": rank} for rank, name in enumerate("abcd")}
FALLING = {name: {"u": -rank, "v": -rank} for rank, name in enumerate("abcd")}


def test_a_setting_has_one_name_on_both_models():
    rows = pd.DataFrame({"configuration": ["cskv (calibration=minilm)", "kvzip"], "value": [1, 0]})
    assert rankings.of_both_models(rows)["configuration"].tolist() == ["cskv (calibration=smollm2)", "kvzip"]
    both = [rankings.of_both_models(field.rows(name)) for name in ("asked", "minilm, asked")]
    shared = set.intersection(*(set(rows["configuration"]) for rows in both))
    assert {"cskv (keys=0.5, values=0.5, calibration=smollm2)", "kvsharer (pairs=smollm2)", "kvzip"} <= shared


def test_means_count_families_alike():
    rows = table({"a": {"x": 1, "y": 0}})
    more = pd.concat([rows, table({"a": {"x": 1}}, samples=6)])
    assert rankings.means(more).tolist() == [0.5]


def test_agreement_of_equal_and_of_reversed_orders():
    first, second = table(RISING), table(FALLING)
    for by in ("task", "sample"):
        same = rankings.agreement(first, first, by, draws=5)
        assert same == {"value": 1, "low": 1, "high": 1, "settings": 4}
    assert rankings.agreement(first, second, "task", draws=5)["value"] == -1


def test_agreement_leaves_out_what_one_table_lacks():
    more = table(RISING | {"e": {"x": -1, "y": -1}})
    assert rankings.agreement(more, table(FALLING), "task", draws=3)["settings"] == 4


def test_no_group_is_on_both_sides():
    """Each family has an order of its own, the reverse of the other's: only disjoint halves disagree fully."""
    opposed = table({name: {"x": rank, "y": -rank} for rank, name in enumerate("abcd")})
    assert rankings.agreement(opposed, opposed, "task", draws=20)["high"] == -1


def test_agreement_is_over_lots():
    rng = np.random.default_rng(1)
    noisy = table({name: {task: rng.random() for task in "pqrstu"} for name in "abcdefgh"})
    found = rankings.agreement(noisy, noisy, "task")
    assert -1 <= found["low"] < found["value"] < found["high"] <= 1
    assert found == rankings.agreement(noisy, noisy, "task")
    assert found != rankings.agreement(noisy, noisy, "task", seed=1)


def test_pair_intervals_are_paired_and_in_order():
    values = {"a": [1, 1, 0, 1, 1, 0], "b": [0, 1, 0, 1, 0, 0], "c": [1] * 6}
    rows = pd.concat([table({name: {"x": 0}}, 6).assign(value=each) for name, each in values.items()])
    cells = [(name, 0.2) for name in "bca"]
    found = rankings.pair_intervals(rows.sample(frac=1, random_state=0), cells)
    assert [*found.index] == [(cells[0], cells[1]), (cells[0], cells[2]), (cells[1], cells[2])]
    gap = statistics.paired_difference([values["b"]], [values["a"]], resamples=999)
    assert found.iloc[1].tolist() == pytest.approx([100 * gap.low, 100 * gap.high])


# Exercises


def rank_correlation(first, second):
    return stats.spearmanr(first, second).statistic


def turned(first, second):
    return lesson_90b.counted(first, second)


def regrets(models):
    return {name: [max(each.values()) - each[name] for each in models] for name in models[0]}


def safest(models):
    greatest = {name: max(each) for name, each in regrets(models).items()}
    return min(greatest.items(), key=lambda item: item[1])


def test_right_answers_of_90b_pass(capsys):
    lesson_90b.check_rank_correlation(rank_correlation)
    lesson_90b.check_turned(turned)
    lesson_90b.check_turned(lambda *a: [*turned(*a)])
    lesson_90b.check_safest(safest)
    said = ["rank_correlation is right", *["turned is right"] * 2, "safest is right"]
    assert capsys.readouterr().out.splitlines() == said


def ranked(method):
    return lambda a, b: np.corrcoef(stats.rankdata(a, method), stats.rankdata(b, method))[0, 1]


def short_formula(a, b):
    apart = ((stats.rankdata(a) - stats.rankdata(b)) ** 2).sum()
    return 1 - 6 * apart / (len(a) * (len(a) ** 2 - 1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b: None, "rank_correlation returned None"),
        (lambda a, b: np.corrcoef(a, b)[0, 1], "ranks are compared, not the answers"),
        (ranked("ordinal"), "equal answers share the mean of their ranks"),
        (ranked("min"), "not the smallest"),
        (short_formula, "the short formula is not exact"),
        (lambda a, b: np.corrcoef(np.argsort(a), np.argsort(b))[0, 1], "who is at a rank, not whose rank"),
        (lambda a, b: stats.kendalltau(a, b).statistic, "pairs in the same order (Kendall)"),
        (lambda a, b: -rank_correlation(a, b), "ranked in the same direction"),
        (lambda a, b: (a.sort(), rank_correlation(a, b))[1], "changes its argument"),
        (lambda a, b: rank_correlation(a, b) ** 2, "is expected, found"),
    ],
)
def test_wrong_rank_correlations(answer, message):
    refused(lesson_90b.check_rank_correlation, message, answer)


def by_middle(first, second):
    same = sum(sum(one) * sum(other) > 0 for one, other in zip(first, second))
    return same, len(first) - same, 0


def sure_on_either(first, second):
    kinds = []
    for one, other in zip(first, second):
        if any(low > 0 or high < 0 for low, high in (one, other)):
            kinds.append(sum(one) * sum(other) > 0)
    return kinds.count(True), kinds.count(False), len(first) - len(kinds)


def with_turned(count):
    def answer(first, second):
        same, found = turned(first, second)[0], sum(count(*pair) for pair in zip(first, second))
        return same, found, len(first) - same - found

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "turned returned None"),
        (lambda *a: turned(*a)[1], "three numbers are expected"),
        (lambda *a: (turned(*a)[1], turned(*a)[0], turned(*a)[2]), "first those that are the same way round"),
        (by_middle, "whose interval holds 0 is not sure"),
        (sure_on_either, "both intervals have to leave 0 out"),
        (with_turned(lambda one, other: one[1] < other[0] or other[1] < one[0]), "may have the same sign"),
        (with_turned(lambda one, other: one[0] > 0 and other[1] < 0), "a pair may turn either way"),
        (lambda *a: lesson_90b.counted(*a, touching=True), "an interval that ends at 0 holds it"),
        (lambda *a: tuple(x / len(a[0]) for x in turned(*a)), "how many, not their shares"),
        (lambda a, b: (a.sort(), turned(a, b))[1], "changes its argument"),
        (lambda *a: (0, 0, len(a[0])), "is expected, found"),
    ],
)
def test_wrong_turns(answer, message):
    refused(lesson_90b.check_turned, message, answer)


def chosen(key, regret=max):
    def answer(models):
        name = min(models[0], key=lambda name: key(models, name))
        return name, regret(regrets(models)[name])

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m: None, "safest returned None"),
        (lambda m: safest(m)[0], "a setting and its regret are expected"),
        (chosen(lambda m, name: -max(regrets(m)[name])), "the greatest regret of all"),
        (chosen(lambda m, name: -m[0][name]), "the best of the first model"),
        (chosen(lambda m, name: -min(each[name] for each in m)), "a regret is asked for, not an answer"),
        (chosen(lambda m, name: sum(regrets(m)[name])), "the greatest regret counts, not the mean"),
        (lambda m: (safest(m)[0], np.mean(regrets(m)[safest(m)[0]])), "the greatest of its regrets, not their mean"),
        (lambda m: (safest(m)[0], min(regrets(m)[safest(m)[0]])), "the greatest of its regrets, not the smallest"),
        (lambda m: (safest(m)[0], 1 - min(each[safest(m)[0]] for each in m)), "has more, not 1"),
        (lambda m: (m[0].pop("mean", 0), safest(m))[1], "changes its argument"),
        (lambda m: (safest(m)[0], 0.321), "is expected, found"),
    ],
)
def test_wrong_choices(answer, message):
    refused(lesson_90b.check_safest, message, answer)
