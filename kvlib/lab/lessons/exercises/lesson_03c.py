"""Exercises of 03c_anchors_against_eviction."""

import math

from kvlib.lab.checks import expect
from kvlib.lab.statistics import sign_test

SOLVED = (  # by the first, by the second; the first pair tells all wrong ways apart
    ([1, 1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0, 0, 1]),
    ([1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]),
    ([1, 0, 1, 0], [0, 1, 1, 0]),
    ([1, 0, 1], [1, 0, 1]),
    ([1] * 12 + [0], [0] * 12 + [1]),
)


def check_mcnemar(function) -> None:
    """`function(first, second)`: what only the first solves, what only the second does, and the exact p."""
    for first, second in SOLVED:
        given = [*first], [*second]
        found = function(*given)
        expect(found is not None and found is not ..., f"mcnemar returned {found!r}: is there a `return`?")
        expect(given == ([*first], [*second]), "mcnemar changes its arguments, work on copies")
        case = f"{first} and {second}"
        expect(isinstance(found, tuple) and len(found) == 3, f"{case}: three values are expected, found {found!r}")
        a, b, p = (float(value) for value in found)
        only, other = (sum(x > y for x, y in zip(*pair)) for pair in ((first, second), (second, first)))
        counts = {
            (only, other): "",
            (other, only): "; the first comes first",
            (sum(first), sum(second)): "; what both solve counts for neither",
            (first.count(0), second.count(0)): "; these are failures of each",
        }
        expect((a, b) == (only, other), f"{case}: {(only, other)} are expected, found {(a, b)}{counts.get((a, b), '')}")
        expected, tosses = sign_test(only, other), only + other
        tail = sum(math.comb(tosses, k) for k in range(min(only, other) + 1)) / 2**tosses
        hints = {
            "; both sides count: twice the tail": tail,
            "; p is at most 1": 2 * tail,
            "; the tail goes up to the smaller count and has it": 2 * tail
            - 2 * math.comb(tosses, min(only, other)) / 2**tosses,
            "; problems that both or neither solve are left out": sign_test(only, len(first) - only),
            "; the smaller count is the tail, not the larger": 2 * (1 - tail),
        }
        near = [hint for hint, wrong in hints.items() if abs(wrong - expected) > 1e-12 and abs(p - wrong) < 1e-12]
        message = f"{case}: p = {expected:.5f} is expected, found {p:.5f}"
        expect(abs(p - expected) < 1e-12, message + "".join(near[:1]))
    print("mcnemar is right")
