"""Intervals for means over samples and for paired differences between methods; tests, and what they can show.

There are two levels. `mean`, `paired_difference` and `paired_ratio` resample the samples of each task: they speak of
these tasks and other prompts of them. `across` takes the tasks themselves for a sample, and speaks of others like them.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, stats

RESAMPLES = 9999  # with these the limits of a 95 % interval are two of the draws, the 250th and the 9750th


@dataclass(frozen=True)
class Estimate:
    """A statistic with the limits of its interval and its bootstrap draws, sorted."""

    value: float
    low: float
    high: float
    draws: np.ndarray = field(repr=False, compare=False)

    def above(self, boundary: float) -> float:
        """Two-sided p-value against "not above the boundary"; at most 0.05 exactly if a 95 % interval lies above it."""
        return self._p_value((self.draws <= boundary).sum())

    def below(self, boundary: float) -> float:
        """Two-sided p-value against "not below the boundary"."""
        return self._p_value((self.draws >= boundary).sum())

    def _p_value(self, contrary: int) -> float:
        return min(1.0, 2 * (1 + int(contrary)) / (1 + len(self.draws)))


def mean(tasks, **options) -> Estimate:
    """Mean over tasks of the mean over samples: every task counts the same, however many samples it has.

    Args:
        tasks: the values of each task, so `[values]` for a single one.
        options: seed = 0, confidence = 0.95, resamples = RESAMPLES.

    Raises:
        ValueError: for what is no list of arrays `(samples,)`, for a task without samples, for values not finite.
    """
    return _bootstrap(_paired(tasks), lambda means: means[..., 0], **options)


def paired_difference(first, second, **options) -> Estimate:
    """Mean over tasks of the mean of `first - second` over the same samples; arguments as for `mean`.

    Raises:
        ValueError: as `mean`, and if the sides do not have the same tasks or a task not as many samples on both.
    """
    return _bootstrap(_paired(first, second), lambda means: means[..., 0] - means[..., 1], **options)


def paired_ratio(first, second, **options) -> Estimate:
    """Mean of `first` over mean of `second`, means taken over tasks of means; for work and bytes, not for scores.

    Raises:
        ValueError: as `paired_difference`, and for values of `second` that are not positive.
    """
    pairs = _paired(first, second)
    if any((pair[:, 1] <= 0).any() for pair in pairs):
        raise ValueError("a ratio needs positive values to divide by")
    return _bootstrap(pairs, lambda means: means[..., 0] / means[..., 1], scores=False, **options)


@dataclass(frozen=True)
class Across:
    """A statistic over tasks that stand for others like them: Student's t on one number a task."""

    value: float
    error: float
    freedom: int

    def above(self, boundary: float) -> float:
        """Two-sided p-value against "not above the boundary"; at most 0.05 exactly if a 95 % interval lies above it."""
        return self._p_value(self.value - boundary)

    def below(self, boundary: float) -> float:
        """Two-sided p-value against "not below the boundary"."""
        return self._p_value(boundary - self.value)

    def _p_value(self, distance: float) -> float:
        if not self.error:  # all tasks say the same
            return 0.0 if distance > 0 else 1.0
        return min(1.0, 2 * float(stats.t.sf(distance / self.error, self.freedom)))


def across(*sides, ratio: bool = False) -> Across | None:
    """The same statistic as `mean` (one side), `paired_difference` or, with `ratio`, `paired_ratio`, over other tasks.

    What varies is each task's mean; of a ratio, its part in the error (x - r y) / mean(y), the delta method. None for a
    single task, which says nothing about others.

    Raises:
        ValueError: as those functions.
    """
    means = np.array([pair.mean(0) for pair in _paired(*sides)]).T
    if means.shape[1] < 2:
        return None
    parts = means[0] - means[1] if len(means) == 2 else means[0]
    value = parts.mean()
    if ratio:
        value = means[0].mean() / means[1].mean()
        parts = (means[0] - value * means[1]) / means[1].mean()
    error = np.round(parts, 12).std(ddof=1) / parts.size**0.5
    return Across(round(float(value), 12), float(error), parts.size - 1)


def _paired(*sides) -> list[np.ndarray]:
    """The values of each task, `(samples, sides)`."""
    sides = [list(side) for side in sides]
    if len({len(side) for side in sides}) != 1 or not sides[0]:
        raise ValueError(f"tasks are needed, the same on both sides: {' and '.join(str(len(side)) for side in sides)}")
    tasks = []
    for values in zip(*sides):
        columns = [np.asarray(column, dtype=float) for column in values]
        if any(column.ndim != 1 for column in columns):
            raise ValueError("a list with the values of each task is needed: [values] for a single one")
        if len({len(column) for column in columns}) != 1 or not len(columns[0]):
            counts = " and ".join(str(len(column)) for column in columns)
            raise ValueError(f"a task needs samples, the same on both sides: {counts}")
        if not np.isfinite(columns).all():
            raise ValueError("values have to be finite")
        tasks.append(np.stack(columns, axis=1))
    return tasks


def _bootstrap(
    tasks, combine, scores: bool = True, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """Percentile bootstrap over the samples of every task; whole rows are drawn, so pairs stay together.

    Right or wrong answers that (almost) never differ leave a bootstrap nothing to draw: 200 of 200 would have the
    interval [1, 1], and four samples lost of 200 would count as certain where the exact test says p = 0.125. A share
    of one made-up sample in favour and of one against is therefore added to what is drawn from, not to the estimate
    (in the manner of Agresti and Min, Stat. Med. 24, 2005, for Wald's interval). Decisions are then close to those of
    the exact test of McNemar. Tasks have equal shares in the two samples, and of its own a task gets as much as its
    rows are right or wrong: a half-right answer among many does not change the rule for the others. Nothing says how
    other values vary where they do not, so 0.3 two hundred times has the interval [0.3, 0.3].
    """
    rng, weight, means = np.random.default_rng(seed), 1 / len(tasks), 0
    for rows in tasks:
        made_up = weight * np.isin(rows, (0, 1)).all(1).mean() if scores else 0
        means = means + weight * _resampled_means(rows, made_up, resamples, rng)
    # sums in another order differ in the last digits, which must not decide whether a draw equals a boundary
    draws = np.sort(np.round(combine(means), 12))
    value = combine(sum(rows.mean(0) for rows in tasks) * weight)
    rank = round((1 - confidence) / 2 * (resamples + 1))  # these order statistics agree with the p-values
    return Estimate(round(float(value), 12), float(draws[rank - 1]), float(draws[-rank]), draws)


def _resampled_means(rows: np.ndarray, made_up: float, resamples: int, rng) -> np.ndarray:
    """Means of resampled rows, `(resamples, columns)`.

    A resample of n rows holds each distinct row a multinomial number of times, so counts are drawn, not rows.
    """
    favour = np.eye(rows.shape[1])[0]  # right alone, or right where the other is wrong
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    distinct = np.concatenate([[favour, 1 - favour], distinct])
    counts = np.concatenate([[made_up, made_up], counts])
    return rng.multinomial(len(rows), counts / counts.sum(), size=resamples) @ distinct / len(rows)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of a count of wins if either side were as likely to win.

    12 of 16 gives 0.077, 13 of 16 gives 0.021. Without a win or a loss it is 1. Whoever says "most of 16" counts a tie
    as a loss: 10 wins and 6 ties are 10 of 16, and 0.45. Dropped, ties would make 10 of 10 of them.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def wins_needed(tasks: int, confidence: float = 0.95) -> int | None:
    """The smallest number of wins of so many tasks that the sign test tells from chance; None below six tasks."""
    most = range(tasks // 2 + 1, tasks + 1)
    return next((wins for wins in most if sign_test(wins, tasks - wins) <= 1 - confidence), None)


def holm(pvalues) -> np.ndarray:
    """Holm's step-down adjustment (Scand. J. Stat. 6, 1979): compare the result with the level itself.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than one before it. The
    chance of any false rejection stays below the level, whatever the dependence between the tests.
    """
    pvalues = np.asarray(pvalues, dtype=float)
    order = np.argsort(pvalues, kind="stable")
    steps = pvalues[order] * np.arange(len(pvalues), 0, -1)
    adjusted = np.empty_like(pvalues)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def detectable(n: int, disagreement: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """Smallest difference in exact match that n paired samples show with the given power.

    Args:
        disagreement: share ψ of samples that one side answers and the other does not.

    Returns:
        d > 0 with d √n = z₁ √ψ + z₂ √(ψ − d²), where z₁ and z₂ are the normal quantiles of (1 + confidence) / 2 and of
        the power (Connor, Biometrics 43, 1987, for the test of McNemar). A difference d needs a disagreement of at
        least d: where the formula asks for less, all of it points one way, and ψ = d. Infinite if even d = 1 is not
        enough.

    Raises:
        ValueError: for n < 1 or a disagreement outside [0, 1].
    """
    if n < 1 or not 0 <= disagreement <= 1:
        raise ValueError(f"n={n}, disagreement={disagreement}: at least one sample, and a share")

    def shortfall(d: float) -> float:
        psi = max(disagreement, d)
        return z1 * psi**0.5 + z2 * max(psi - d * d, 0) ** 0.5 - d * n**0.5

    z1, z2 = stats.norm.ppf([(1 + confidence) / 2, power])
    if shortfall(1.0) > 0:
        return float("inf")
    return float(optimize.brentq(shortfall, 1e-12, 1.0))


def detectable_shift(n: int, deviation: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """The same for a mean of any values with this standard deviation: (z₁ + z₂) · deviation / √n."""
    return float(stats.norm.ppf([(1 + confidence) / 2, power]).sum() * deviation / n**0.5)
