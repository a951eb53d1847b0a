"""What one cell says on one model: a statistic, its interval, and p-values for and against the claim."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from kvlib.lab import statistics
from kvlib.lab.claims.claim import Cell, Claim
from kvlib.lab.claims.samples import Missing, per_sample, rows_of

NO_EFFECT = {"mean_difference": 0, "ratio": 1}
BYTES_AGREE = 0.02  # rounding to whole tokens per head makes methods differ by a per cent at small budgets


@dataclass(frozen=True)
class Evidence:
    """p-values: for the claim's region, for outside of it, for the other side of no effect at all."""

    support: float
    against: float
    opposite: float


@dataclass(frozen=True)
class Result:
    """What a cell says on one model: on these families, whose prompts may be others, and across families like them.

    n: what is counted or averaged, families in a count of wins and samples otherwise.
    """

    text: str
    here: Evidence
    across: Evidence | None
    detectable: float | str
    n: int
    families: int = 0
    label: str = ""
    clamped: float = 0.0
    protocol: str = ""


def examine(tables: Mapping[str, pd.DataFrame], claim: Claim, model: str, cell: Cell) -> Result:
    """The statistic of one cell on one model.

    Raises:
        Missing: if rows are missing or wrong, or the sides differ in samples or bytes, or in a protocol that they do
            not name.
    """
    found = [rows_of(tables[side.table], claim, model, cell, side) for side in cell.sides]
    protocols = list(dict.fromkeys(protocol for side in found for protocol in side["protocol"].unique()))
    if len(protocols) > 1 and not all(side.protocol for side in cell.sides):
        raise Missing("there are rows of several protocols, and the claim names none")
    found = [per_sample(side, claim) for side in found]
    if not all(side.index.equals(found[0].index) for side in found):
        raise Missing("the two sides do not have the same samples")
    if claim.equal_bytes:
        first, second = (float(side[f"{claim.equal_bytes}_bytes"].mean()) for side in found)
        if not abs(first - second) <= BYTES_AGREE * second:
            raise Missing(f"{claim.equal_bytes} bytes are not equal: {first:.4g} and {second:.4g}")
    groups = [[side["measured"].xs(name).to_numpy() for name in cell.tasks] for side in found]
    result = count_wins(claim, groups) if claim.statistic == "win_count" else estimated(claim, groups)
    clamped = max(float(side["clamped"].mean()) for side in found)
    return replace(
        result, label=cell.label, families=len(cell.tasks), clamped=clamped, protocol=" and ".join(protocols)
    )


def estimated(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
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
    across = statistics.across(*groups, ratio=claim.statistic == "ratio")
    sign = "+" if claim.statistic == "mean_difference" else ""
    value, low, high = (rounded(x) for x in (estimate.value, estimate.low, estimate.high))
    return Result(
        text=f"{value:{sign}.3f} [{low:.3f}, {high:.3f}]",
        here=evidence(claim, estimate),
        across=across and evidence(claim, across),
        detectable=smallest(claim, groups),
        n=sum(map(len, groups[0])),
    )


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


@dataclass(frozen=True)
class Share:
    """A share of so many families, with the exact binomial p-values."""

    count: int
    families: int

    def above(self, boundary: float) -> float:
        return self._p_value(boundary, "greater")

    def below(self, boundary: float) -> float:
        return self._p_value(boundary, "less")

    def _p_value(self, boundary: float, alternative: str) -> float:
        return min(1.0, 2 * float(stats.binomtest(self.count, self.families, boundary, alternative).pvalue))


def count_wins(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
    """Families won, a family being won if its own interval excludes 0; all others count against "most".

    Families are what is counted, so that there is one level only, the one across families.
    """
    estimates = [statistics.paired_difference([first], [second]) for first, second in zip(*groups)]
    wins, losses = sum(one.low > 0 for one in estimates), sum(one.high < 0 for one in estimates)
    families = len(estimates)
    needed = statistics.wins_needed(families)
    won, lost = Share(wins, families), Share(losses, families)
    found = replace(evidence(claim, won), opposite=evidence(claim, lost).support)
    text = f"{wins} of {families} won, {losses} lost (p = {statistics.sign_test(wins, families - wins):.2g})"
    detectable = f"{needed} of {families}" if needed else f"none of {families}"
    return Result(text, found, found, detectable, n=families)


def evidence(claim: Claim, estimate) -> Evidence:
    """From an estimate that tests whether it lies `above` or `below` a boundary; p-values are two-sided."""
    low, high = claim.rule
    tests = [(estimate.above, estimate.below, low), (estimate.below, estimate.above, high)]
    inside, outside = zip(*((within(b), beyond(b)) for within, beyond, b in tests if np.isfinite(b)))
    return Evidence(max(inside), min(outside), opposite(claim, estimate))


def opposite(claim: Claim, estimate) -> float:
    """p-value for the other side of no effect, where the claim is one of an effect."""
    none = NO_EFFECT.get(claim.statistic)
    low, high = claim.rule
    if none is not None and low >= none:
        return estimate.below(none)
    if none is not None and high <= none:
        return estimate.above(none)
    return 1.0
