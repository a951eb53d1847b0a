"""What one cell says on one model: a statistic, its interval, and p-values for and against the claim."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from kvlib.lab import statistics
from kvlib.lab.claims.claim import Cell, Claim
from kvlib.lab.claims.samples import Missing, per_sample, rows_of

BYTES_AGREE = 0.02  # rounding to whole tokens per head makes methods differ by a per cent at small budgets


@dataclass(frozen=True)
class Result:
    """What a cell says on one model; `support` and `against` are p-values for inside and outside the claim's region."""

    text: str
    support: float
    against: float
    detectable: float | str
    label: str = ""
    n: int = 0
    clamped: float = 0.0
    protocol: str = ""


def examine(table: pd.DataFrame, claim: Claim, model: str, cell: Cell) -> Result:
    """The statistic of one cell on one model.

    Raises:
        Missing: if rows are missing or wrong, or the sides differ in protocol, samples or bytes.
    """
    found = [rows_of(table, claim, model, cell, configuration) for configuration in cell.configurations]
    protocols = sorted(set().union(*(side["protocol"] for side in found)))
    if len(protocols) > 1:
        raise Missing("there are rows of several protocols, and the claim names none")
    found = [per_sample(side, claim) for side in found]
    if not all(side.index.equals(found[0].index) for side in found):
        raise Missing("the two sides do not have the same samples")
    if claim.equal_bytes:
        first, second = (float(side[f"{claim.equal_bytes}_bytes"].mean()) for side in found)
        if not abs(first - second) <= BYTES_AGREE * second:
            raise Missing(f"{claim.equal_bytes} bytes are not equal: {first:.4g} and {second:.4g}")
    groups = [[side["measured"].xs(name).to_numpy() for name in cell.tasks] for side in found]
    result = count_wins(claim, groups) if claim.statistic == "win_count" else bootstrap(claim, groups)
    clamped = max(float(side["clamped"].mean()) for side in found)
    return replace(result, label=cell.label, n=len(found[0]), clamped=clamped, protocol=protocols[0])


def bootstrap(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
    """Mean, difference or ratio with its interval; the effect that so many samples can show."""
    function: Callable = {
        "mean": statistics.mean,
        "mean_difference": statistics.paired_difference,
        "ratio": statistics.paired_ratio,
    }[claim.statistic]
    try:
        estimate = function(*groups)
    except ValueError as error:  # a ratio to zero
        raise Missing(str(error)) from None
    support, against = evidence(claim.rule, estimate.above, estimate.below)
    sign = "+" if claim.statistic == "mean_difference" else ""
    value, low, high = (rounded(x) for x in (estimate.value, estimate.low, estimate.high))
    return Result(f"{value:{sign}.3f} [{low:.3f}, {high:.3f}]", support, against, smallest(claim, groups))


def rounded(x: float) -> float:
    """Three digits, and no -0.000."""
    return round(x, 3) + 0.0


def smallest(claim: Claim, groups: list[list[np.ndarray]]) -> float | str:
    """The smallest difference, or shift of a mean, that as many samples show with 80 % power.

    How much samples vary, as disagreement or variance, is taken from the data.
    """
    if claim.statistic == "ratio":
        return ""
    changes = groups[0] if len(groups) == 1 else [first - second for first, second in zip(*groups)]
    n = round(len(changes) ** 2 / sum(1 / len(change) for change in changes))  # all, if tasks have equally many
    exact_match = all(np.isin(group, (0, 1)).all() for side in groups for group in side)
    if len(groups) == 2 and exact_match:
        return statistics.detectable(n, float(np.mean([np.abs(change).mean() for change in changes])))
    variance = float(np.mean([change.var() for change in changes]))
    if exact_match:  # as in the bootstrap: 200 of 200 is not certainty
        variance = (variance * n + 0.5) / (n + 2)
    return statistics.detectable_shift(n, variance**0.5)


def count_wins(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
    """Tasks won and lost by mean, and the share of wins among them with its exact binomial interval."""
    changes = [round(float(first.mean() - second.mean()), 12) for first, second in zip(*groups)]
    wins, losses = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    ties = len(changes) - wins - losses
    needed = statistics.wins_needed(len(changes))
    tied, chance = f", {ties} tied" if ties else "", statistics.sign_test(wins, losses)
    text = f"{wins} of {len(changes)} won{tied} (p = {chance:.2g})"

    def test(alternative: str) -> Callable:
        def two_sided(share: float) -> float:
            one = stats.binomtest(wins, wins + losses, share, alternative).pvalue if wins + losses else 1.0
            return min(1.0, 2 * float(one))

        return two_sided

    support, against = evidence(claim.rule, test("greater"), test("less"))
    detectable = f"{needed} of {len(changes)}" if needed else f"none of {len(changes)}"
    return Result(text, support, against, detectable)


def evidence(rule: tuple[float, float], above: Callable, below: Callable) -> tuple[float, float]:
    """p-values for "the statistic lies in the region" and for "it lies outside"."""
    bounds = [(above, below, rule[0]), (below, above, rule[1])]
    finite = [(within(bound), beyond(bound)) for within, beyond, bound in bounds if np.isfinite(bound)]
    inside, outside = zip(*finite)
    return max(inside), min(outside)  # outside is on one side or on the other, and p-values are two-sided already
