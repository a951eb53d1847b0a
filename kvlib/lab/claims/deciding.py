"""The verdict of one model, from the results of its cells.

Several cells may decide one claim. If *every* cell has to be in the region, "holds" needs no correction, because all
tests have to succeed (an intersection-union test: Berger, Technometrics 24, 1982), but "contradicted" needs only one of
them, so these p-values are corrected (Holm). If *some* cell has to be, it is the other way round.
"""

import numpy as np

from kvlib.lab import statistics
from kvlib.lab.claims.examining import Result

LEVEL = 0.05


def corrected(results: list[Result], primary: str) -> tuple[np.ndarray, np.ndarray]:
    """p-values for and against, corrected where one cell is enough; see the module about several cells."""
    support, against = (np.array([getattr(result, name) for result in results]) for name in ("support", "against"))
    if primary.startswith("some"):
        return statistics.holm(support), against
    return support, statistics.holm(against)


def conclude(results: list[Result], primary: str) -> str:
    """The verdict of one model."""
    support, against = (p_values <= LEVEL for p_values in corrected(results, primary))
    some = primary.startswith("some")
    if support.any() if some else support.all():
        return "holds"
    return "contradicted" if (against.all() if some else against.any()) else "inconclusive"


def deciding(results: list[Result], verdict: str, primary: str) -> Result:
    """The cell to show: the weakest where all had to agree on the verdict, the strongest where one was enough."""
    fails, some = verdict == "contradicted", primary.startswith("some")
    choose = max if fails == some else min
    return choose(results, key=lambda result: result.against if fails else result.support)
