"""Exercises of 03b_anchors_in_depth."""

import math

from kvlib.lab.checks import expect, number
from kvlib.methods.anchors import offsets

LINES = ((1, 8), (2, 8), (5, 8), (12, 8), (20, 3), (12, 32), (100, 8))  # tokens, heads


def check_head_places(function) -> None:
    """`function(tokens, heads)`: which token of a line each head sees its anchor at, counted from 0, ascending."""
    for tokens, heads in LINES:
        found, case = function(tokens, heads), f"{tokens} tokens, {heads} heads"
        expect(found is not None and found is not ..., f"head_places returned {found!r}: is there a `return`?")
        found = [int(place) for place in found]
        expect(len(found) == heads, f"{case}: {len(found)} places, one for each head is expected")
        expected = offsets(tokens, heads).tolist()
        hints = {
            "; tokens are counted from 0": [place + 1 for place in expected],
            "; places ascend with the heads": expected[::-1],
            "; most heads stand at the line's end": shared(tokens, heads, lambda i, n=tokens: (n + 1 - i) ** 3),
            "; shares go by the cube of a token's number": shared(tokens, heads, lambda i: i**2),
            "; shares go by the cube, not by the number itself": shared(tokens, heads, lambda i: i),
            "; shares are not all the same": shared(tokens, heads, lambda i: 1),
            "; of equal remainders the earlier token comes first": shared(tokens, heads, lambda i: i**3, late=True),
            "; what rounding leaves goes to the largest remainders, not to the last token": last_takes(tokens, heads),
            "; what rounding leaves goes to the largest remainders, not to the first tokens": first_take(tokens, heads),
        }
        near = [hint for hint, wrong in hints.items() if wrong != expected and found == wrong]
        expect(found == expected, f"{case}: {expected} is expected, found {found}{''.join(near[:1])}")
    print("head_places is right")


def counts(tokens: int, heads: int, weight) -> tuple[list[int], list[float]]:
    """Whole shares of every token, and remainders, in units of the sum of weights."""
    weights = [weight(i) for i in range(1, tokens + 1)]
    both = [divmod(heads * w, sum(weights)) for w in weights]
    return [share for share, _ in both], [rest for _, rest in both]


def spelt(shares: list[int]) -> list[int]:
    return [place for place, share in enumerate(shares) for _ in range(share)]


def shared(tokens: int, heads: int, weight, late: bool = False) -> list[int]:
    shares, rest = counts(tokens, heads, weight)
    order = sorted(range(tokens), key=lambda i: (-rest[i], -i if late else i))
    for i in order[: heads - sum(shares)]:
        shares[i] += 1
    return spelt(shares)


def last_takes(tokens: int, heads: int) -> list[int]:
    shares, _ = counts(tokens, heads, lambda i: i**3)
    shares[-1] += heads - sum(shares)
    return spelt(shares)


def first_take(tokens: int, heads: int) -> list[int]:
    shares, _ = counts(tokens, heads, lambda i: i**3)
    for i in range(heads - sum(shares)):
        shares[i] += 1
    return spelt(shares)


A = 3  # the anchor in the cases below
CHOICES = (  # what a model would choose in place of each token, and the tokens
    ([5, 6, A, 7, A, A, 8, 9], [5, 6, A, 7, 8, A, A, 9]),
    ([A, 5, 5, A], [5, 5, A, A]),
    ([5, A, 6, A, 5, 5], [5, 5, 5, A, 5, 5]),
    ([5, 6, 7, 8], [5, A, A, 9]),
)


def check_emission(function) -> None:
    """`function(chosen, right, anchor)`: shares of anchors missed, and of other tokens where one is invented."""
    for chosen, right in CHOICES:
        given = [*chosen], [*right]
        found = function(*given, A)
        expect(found is not None and found is not ..., f"emission returned {found!r}: is there a `return`?")
        expect(given == ([*chosen], [*right]), "emission changes its arguments, work on copies")
        expect(len(found) == 2, f"emission returned {found!r}, a pair is expected: missed, spurious")
        found = tuple(map(float, found))
        pairs = list(zip(chosen, right))
        due, others = [c for c, r in pairs if r == A], [c for c, r in pairs if r != A]
        lost, made = sum(c != A for c in due), sum(c == A for c in others)
        expected = lost / len(due), made / len(others)
        wrong = sum(c != r for c, r in pairs if r != A)
        hints = {
            "; missed comes first": expected[::-1],
            "; missed is a share of the anchors that are due, spurious one of all other tokens": (
                lost / len(pairs),
                made / len(pairs),
            ),
            "; shares, not counts": (lost, made),
            "; spurious is a share of the tokens that are no anchors": (expected[0], made / len(due)),
            "; of what is chosen that is a share, asked for was one of what is right": (
                lost / max(1, sum(c != A for c in chosen)),
                made / max(1, chosen.count(A)),
            ),
            "; that is how many are found": (1 - expected[0], expected[1]),
            "; a wrong token is not spurious unless it is an anchor": (expected[0], wrong / len(others)),
            "; percent were not asked for": (100 * expected[0], 100 * expected[1]),
        }
        near = [hint for hint, other in hints.items() if not close(other, expected) and close(found, other)]
        case = f"chosen {chosen}, right {right}, anchor {A}"
        rounded = tuple(round(x, 4) for x in found)
        expect(close(found, expected), f"{case}: {expected} is expected, found {rounded}{''.join(near[:1])}")
    print("emission is right")


def close(one, other) -> bool:
    return all(math.isclose(x, y, abs_tol=1e-9) for x, y in zip(one, other))


SCORED = (  # scores of words, and which of them stand in the line; the first tells all wrong ways apart
    ([0.8, 0.0, 0.5, 0.2, 0.9, 0.4, 0.1], [1, 1, 1, 1, 1, 0, 0]),
    ([0.9, 0.1, 0.8, 0.3], [1, 0, 0, 1]),
    ([0.1, 0.7, 0.2, 0.6, 0.5], [0, 1, 0, 0, 0]),
    ([-2.0, -0.1, -1.0, -3.0, -0.5, -0.2], [1, 1, 0, 0, 0, 0]),
)


def check_recall(function) -> None:
    """`function(scores, wanted)`: the share of the wanted words among as many words as are wanted, the best first."""
    for scores, wanted in SCORED:
        given = [*scores], [*wanted]
        found = number(function(*given), "recall")
        expect(given == ([*scores], [*wanted]), "recall changes its arguments, work on copies")
        ranked, count = sorted(range(len(scores)), key=lambda i, s=scores: -s[i]), sum(wanted)

        def share(places, of=count, wanted=wanted):
            return sum(wanted[place] for place in places) / of

        expected = share(ranked[:count])
        above = [place for place, score in enumerate(scores) if score > 0.5]
        hints = {
            "; of the wanted words that is a share, not of all words": share(ranked[:count], len(scores)),
            "; as many words as the line has, not the best one alone": share(ranked[:1]),
            "; the best words have the highest scores": share(ranked[::-1][:count]),
            "; a share, not a count": share(ranked[:count], 1),
            "; as many words as the line has, not all that score above one half": share(above),
            "; these are the first words, not the best": share(range(count)),
            "; that is 1 if all of them are found": float(share(ranked[:count]) == 1),
        }
        near = [hint for hint, other in hints.items() if abs(other - expected) > 1e-9 and abs(found - other) < 1e-9]
        message = f"scores {scores}, wanted {wanted}: {expected:.3f} is expected, found {found:.3f}"
        expect(abs(found - expected) < 1e-9, message + "".join(near[:1]))
    print("recall is right")
