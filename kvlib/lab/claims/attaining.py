"""Whether a rule can be met at all: with so many samples, if the statistic is what the claim's source expects."""

import math

from kvlib.lab.claims.claim import Claim
from kvlib.lab.claims.deciding import LEVEL
from kvlib.lab.claims.examining import Share, evidence
from kvlib.lab.statistics import detectable_shift


def obstacle(claim: Claim, families: int, samples: int) -> str:
    """Why the expected value would decide nothing, or nothing.

    Of answers that are right or wrong, shares and differences of shares: the variance is the least that the expected
    value allows, that of a difference if one side is never wrong where the other is right.

    Args:
        samples: of each family.
    """
    expected = claim.expected
    if expected is None:
        return ""
    if claim.statistic == "win_count":
        wins = round(expected * families)
        met = evidence(claim, Share(wins, families)).support <= LEVEL
        return "" if met else f"{expected:g} is expected, {wins} wins of {families} families, which decide nothing"
    low, high = claim.rule
    distance = min(expected - low, high - expected)
    needed = detectable_shift(families * samples, math.sqrt(abs(expected) - expected**2))
    if distance > 0 and distance >= needed:
        return ""
    return (
        f"{expected:g} is expected, {distance:.3g} inside the boundary, "
        f"and {families * samples} samples show {needed:.3f} at best"
    )
