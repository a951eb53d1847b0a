"""What the cells of one model say together.

Several cells may decide one claim. If *every* cell has to be in the region, "inside" needs no correction, because all
tests have to succeed (an intersection-union test: Berger, Technometrics 24, 1982), but "outside" needs only one of
them, so these p-values are corrected (Holm). If *some* cell has to be, it is the other way round.
"""

from dataclasses import dataclass

import numpy as np

from kvlib.lab import statistics
from kvlib.lab.claims.examining import Evidence, Result

LEVEL = 0.05
FINDINGS = ("inside", "opposite", "outside", "undecided")


@dataclass(frozen=True)
class Finding:
    """Where the statistic lies, one of `FINDINGS`; whether that is so across families too; p-values of both levels.

    A p-value is that of the likelier side: of being in the region or of being outside it.
    """

    where: str
    wide: bool
    p: float
    p_across: float | None

    @classmethod
    def of(cls, results: list[Result], primary: str) -> "Finding":
        here = [result.here for result in results]
        across = [result.across for result in results]
        where = conclude(here, primary)
        if None in across:
            return cls(where, False, likelier(here, primary), None)
        wide = where != "undecided" and conclude(across, primary) == where
        return cls(where, wide, likelier(here, primary), likelier(across, primary))


def corrected(cells: list[Evidence], primary: str, name: str) -> np.ndarray:
    """The p-values `name` of all cells; corrected where one cell is enough, see the module."""
    p_values = np.array([getattr(cell, name) for cell in cells])
    return statistics.holm(p_values) if one_is_enough(primary, name) else p_values


def one_is_enough(primary: str, name: str) -> bool:
    return primary.startswith("some") == (name == "support")


def together(cells: list[Evidence], primary: str, name: str) -> float:
    """The p-value of all cells together."""
    p_values = corrected(cells, primary, name)
    return float(p_values.min() if one_is_enough(primary, name) else p_values.max())


def likelier(cells: list[Evidence], primary: str) -> float:
    return min(together(cells, primary, name) for name in ("support", "against"))


def conclude(cells: list[Evidence], primary: str) -> str:
    """One of `FINDINGS`."""
    for finding, name in zip(FINDINGS, ("support", "opposite", "against")):
        if together(cells, primary, name) <= LEVEL:
            return finding
    return "undecided"


def deciding(results: list[Result], where: str, primary: str) -> Result:
    """The cell to show: the weakest where all had to agree on the finding, the strongest where one was enough."""
    name = "against" if where in ("opposite", "outside") else "support"
    choose = min if one_is_enough(primary, name) else max
    return choose(results, key=lambda result: getattr(result.here, name))
