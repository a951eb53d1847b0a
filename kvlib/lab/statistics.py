"""Intervals for means over samples and for paired differences between methods."""

import numpy as np
from scipy import stats


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
