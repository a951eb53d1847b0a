"""Intervals for means over samples and for paired differences between methods; tests, and what they can show."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

RESAMPLES = 9999  # with these the limits of a 95 % interval are two of the draws, the 250th and the 9750th


def mean_interval(values, seed: int = 0, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of per-sample values with a percentile-bootstrap interval: (mean, low, high).

    Constant values have no spread to resample; the interval is then the exact binomial one when they are all 0 or all
    1, because "200 of 200" is not certainty.
    """
    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:
        if values[0] in (0.0, 1.0):
            exact = stats.binomtest(int(values.sum()), len(values)).proportion_ci(confidence)
            return float(values[0]), float(exact.low), float(exact.high)
        return (float(values[0]),) * 3
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(seed),
    )
    return float(values.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(first, second, seed: int = 0, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of `first - second` over the same samples with its bootstrap interval: (difference, low, high)."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"paired values need the same samples: {first.shape} and {second.shape}")
    difference = first - second
    if np.ptp(difference) == 0:
        return (float(difference[0]),) * 3
    return mean_interval(difference, seed, confidence)


# What the ledger decides with


@dataclass(frozen=True)
class Estimate:
    """A statistic with the limits of its interval and its bootstrap draws, sorted."""

    value: float
    low: float
    high: float
    draws: np.ndarray

    def above(self, boundary: float) -> float:
        """Two-sided p-value against "not above the boundary"; at most 0.05 exactly if a 95 % interval lies above it."""
        return self._p_value((self.draws <= boundary).sum())

    def below(self, boundary: float) -> float:
        """Two-sided p-value against "not below the boundary"."""
        return self._p_value((self.draws >= boundary).sum())

    def _p_value(self, contrary: int) -> float:
        return min(1.0, 2 * (1 + int(contrary)) / (1 + len(self.draws)))


def stratified_mean(groups, **options) -> Estimate:
    """Mean over groups of the mean over samples: every task counts the same, however many samples it has."""
    return _stratified([_columns(group) for group in groups], lambda means: means[..., 0], **options)


def stratified_difference(first, second, **options) -> Estimate:
    """Mean over groups of the paired mean difference `first - second`; both are lists of values, one per task.

    Raises:
        ValueError: if a group does not have the same number of samples on both sides.
    """
    pairs = [_columns(*pair) for pair in _zip(first, second)]
    return _stratified(pairs, lambda means: means[..., 0] - means[..., 1], **options)


def stratified_ratio(first, second, **options) -> Estimate:
    """Mean of `first` over mean of `second`, means taken over groups of means; for work and bytes, not for scores.

    Raises:
        ValueError: for groups that do not pair up, and for values of `second` that are not positive.
    """
    pairs = [_columns(*pair) for pair in _zip(first, second)]
    if any((pair[:, 1] <= 0).any() for pair in pairs):
        raise ValueError("a ratio needs positive values to divide by")
    return _stratified(pairs, lambda means: means[..., 0] / means[..., 1], **options)


def _columns(*sides) -> np.ndarray:
    """Values as columns, `(samples, sides)`."""
    sides = [np.asarray(side, dtype=float) for side in sides]
    if len({side.shape for side in sides}) != 1:
        raise ValueError(f"paired values need the same samples: {' and '.join(str(side.shape) for side in sides)}")
    return np.stack(sides, axis=1)


def _zip(first, second):
    first, second = list(first), list(second)
    if len(first) != len(second):
        raise ValueError(f"paired values need the same groups: {len(first)} and {len(second)}")
    return zip(first, second)


def _stratified(groups, combine, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """Percentile bootstrap over the samples of every group; whole rows are drawn, so pairs stay together.

    A resample of n rows holds each distinct row a multinomial number of times, so counts are drawn, not rows.

    Right or wrong answers that (almost) never differ leave a bootstrap nothing to draw: 200 of 200 would have the
    interval [1, 1], and four samples lost of 200 would count as certain where the exact test says p = 0.125. In groups
    of values that are 0 or 1, a share of one made-up sample in favour and of one against is therefore added to what is
    drawn from, not to the estimate (in the manner of Agresti and Min, Stat. Med. 24, 2005, for Wald's interval).
    Decisions are then close to those of the exact test of McNemar.
    """
    rng, weight = np.random.default_rng(seed), 1 / len(groups)
    made_up = [weight if np.isin(group, (0, 1)).all() else 0 for group in groups]
    means = sum(_resampled_means(group, extra, resamples, rng) for group, extra in zip(groups, made_up)) * weight
    # sums in another order differ in the last digits, which must not decide whether a draw equals a boundary
    draws = np.sort(np.round(combine(means), 12))
    value = combine(sum(group.mean(0) for group in groups) * weight)
    rank = round((1 - confidence) / 2 * (resamples + 1))  # these order statistics agree with the p-values
    return Estimate(round(float(value), 12), float(draws[rank - 1]), float(draws[-rank]), draws)


def _resampled_means(group: np.ndarray, made_up: float, resamples: int, rng) -> np.ndarray:
    """Means of resampled rows, `(resamples, columns)`."""
    rows, counts = np.unique(group, axis=0, return_counts=True)
    if len(rows) > 16:  # as many counts as rows: then drawing rows is faster
        drawn = rng.integers(len(group), size=(resamples, len(group)))
        return np.stack([column[drawn].mean(1) for column in group.T], axis=1)
    if made_up:
        favour = np.zeros(group.shape[1])
        favour[0] = 1  # right alone, or right where the other is wrong
        rows = np.concatenate([rows, [favour, 1 - favour]])
        counts = np.concatenate([counts, [made_up, made_up]])
    return rng.multinomial(len(group), counts / counts.sum(), size=resamples) @ rows / len(group)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of a count of wins if either side were as likely to win; ties are dropped, as is usual.

    12 of 16 gives 0.077, 13 of 16 gives 0.021. Without a win or a loss it is 1.
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
