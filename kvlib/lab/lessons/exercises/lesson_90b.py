"""Exercises of 90b_carrying_over."""

import math

import numpy as np
from scipy import stats

from kvlib.lab.checks import expect, number

ANSWERS = (  # of the same settings on two models; the second case has equal ones, for which the short formula is wrong
    ([0.5, 0.3, 0.2, 0.1], [0.3, 0.5, 0.2, 0.1]),
    ([0.5, 0.0, 0.2, 0.2, 0.9, 0.0], [0.8, 0.1, 0.1, 0.4, 0.7, 0.1]),
    ([0.1, 0.7, 0.3, 0.31, 0.32], [0.9, 0.2, 0.85, 0.3, 0.8]),
)
INTERVALS = (  # of the same pairs on two models
    [(2, 6), (-9, -1), (-3, 4), (1, 3), (-8, -2), (5, 9), (-1, 1), (4, 7)],
    [(1, 9), (-5, -2), (2, 6), (-4, -1), (3, 7), (-2, 1), (-6, 2), (-3, -1)],
)
ON_MODELS = (  # answers of settings, model by model; of the first all wrong rules choose or say something else
    (
        {"first": 0.5, "middle": 0.47, "steady": 0.38, "last": 0.05, "mean": 0.46, "second": 0.1},
        {"first": 0.3, "middle": 0.5, "steady": 0.75, "last": 0.1, "mean": 0.7, "second": 0.85},
    ),
    ({"a": 0.2, "b": 0.3}, {"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}),
    ({"alone": 0.4},),
)


def check_rank_correlation(function) -> None:
    """`function(first, second)`: Spearman's rank correlation of two lists, equal values sharing the mean rank."""
    for first, second in ANSWERS:
        given = [*first], [*second]
        found = number(function(*given), "rank_correlation")
        expect(given == (first, second), "rank_correlation changes its argument, work on a copy")
        expected = stats.spearmanr(first, second).statistic
        ranks = {name: [stats.rankdata(x, name) for x in given] for name in ("average", "ordinal", "min")}
        apart, n = ((ranks["average"][0] - ranks["average"][1]) ** 2).sum(), len(first)
        hints = {
            np.corrcoef(first, second)[0, 1]: "; ranks are compared, not the answers themselves",
            np.corrcoef(*ranks["ordinal"])[0, 1]: "; equal answers share the mean of their ranks",
            np.corrcoef(*ranks["min"])[0, 1]: "; equal answers share the mean of their ranks, not the smallest",
            1 - 6 * apart / (n * (n**2 - 1)): "; with equal ranks the short formula is not exact",
            np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]: "; argsort says who is at a rank, not whose rank",
            stats.kendalltau(first, second).statistic: "; that counts pairs in the same order (Kendall)",
            -expected: "; both are ranked in the same direction",
        }
        near = (hint for wrong, hint in hints.items() if math.isclose(found, wrong, abs_tol=1e-9))
        message = f"{first} and {second}: {expected:.4f} is expected, found {found:.4f}"
        expect(math.isclose(found, expected, abs_tol=1e-9), message + next(near, ""))
    print("rank_correlation is right")


def check_turned(function) -> None:
    """`function(first, second)`: of pairs, how many are surely the same way round, surely turned, and not sure."""
    cases = [INTERVALS, INTERVALS[::-1], ([(0, 2), (1, 2)], [(-3, -1), (-3, 0)]), ([(1, 2)], [(1, 2)])]
    for first, second in cases:
        given = [*first], [*second]
        found = function(*given)
        expect(found is not None and found is not ..., f"turned returned {found!r}: is there a `return`?")
        expect(given == (first, second), "turned changes its argument, work on a copy")
        found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        expect(len(found) == 3, f"three numbers are expected (same, turned, not sure), found {found}")
        both, expected = list(zip(first, second)), counted(first, second)
        middles = [sum(one) * sum(other) > 0 for one, other in both]
        either = [any(low > 0 or high < 0 for low, high in pair) for pair in both]
        apart = sum(one[1] < other[0] or other[1] < one[0] for one, other in both)
        falls = sum(one[0] > 0 and other[1] < 0 for one, other in both)
        hints = {
            (expected[1], expected[0], expected[2]): "; first those that are the same way round",
            (sum(middles), len(both) - sum(middles), 0): "; a pair whose interval holds 0 is not sure",
            (
                sum(x and y for x, y in zip(middles, either)),
                sum(not x and y for x, y in zip(middles, either)),
                len(both) - sum(either),
            ): "; both intervals have to leave 0 out, not one of them",
            (expected[0], apart, len(both) - expected[0] - apart): "; intervals that are apart may have the same sign",
            (expected[0], falls, len(both) - expected[0] - falls): "; a pair may turn either way",
            counted(first, second, touching=True): "; an interval that ends at 0 holds it",
            tuple(x / len(both) for x in expected): "; how many, not their shares",
        }
        case = f"{first} and {second}: {expected} is expected, found {found}"
        expect(found == expected, case + hints.get(found, ""))
    print("turned is right")


def counted(first, second, touching: bool = False) -> tuple[int, int, int]:
    def side(low, high) -> int:
        return (low >= 0) - (high <= 0) if touching else (low > 0) - (high < 0)

    products = [side(*one) * side(*other) for one, other in zip(first, second)]
    return products.count(1), products.count(-1), products.count(0)


def check_safest(function) -> None:
    """`function(models)`: the setting whose greatest regret over models is smallest, and that regret."""
    for models in ON_MODELS:
        given = [dict(each) for each in models]
        found = function(given)
        expect(found is not None and found is not ..., f"safest returned {found!r}: is there a `return`?")
        expect(given == [*models], "safest changes its argument, work on a copy")
        expect(isinstance(found, tuple) and len(found) == 2, f"a setting and its regret are expected, found {found!r}")
        regrets = {name: [max(each.values()) - each[name] for each in models] for name in models[0]}
        greatest = {name: max(each) for name, each in regrets.items()}
        best = min(greatest, key=greatest.get)
        name, regret = found
        wrong = {
            max(greatest, key=greatest.get): "; that one has the greatest regret of all",
            max(models[0], key=models[0].get): "; that is the best of the first model",
            max(models[0], key=lambda x: min(each[x] for each in models)): "; a regret is asked for, not an answer",
            min(regrets, key=lambda x: sum(regrets[x])): "; the greatest regret counts, not the mean",
        }
        expect(name == best, f"{best!r} is expected, found {name!r}{wrong.get(name, '')}")
        hints = {
            sum(regrets[best]) / len(models): "; the greatest of its regrets, not their mean",
            min(regrets[best]): "; the greatest of its regrets, not the smallest",
            1 - min(each[best] for each in models): "; a regret is what the best setting of that model has more, not 1",
        }
        near = (hint for value, hint in hints.items() if math.isclose(float(regret), value, abs_tol=1e-9))
        message = f"{best!r}: a regret of {greatest[best]:.3f} is expected, found {float(regret):.3f}"
        expect(math.isclose(float(regret), greatest[best], abs_tol=1e-9), message + next(near, ""))
    print("safest is right")
