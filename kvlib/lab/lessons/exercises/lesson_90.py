"""Exercises of 90_comparison."""

import itertools
import math

from kvlib.lab.checks import expect, number

ENTRIES = (  # bits, entries that share a scale and a zero, tokens, tokens that stay in 16 bits
    (2, 32, 2048, 128),
    (4, 32, 2048, 0),
    (8, 64, 1000, 250),
    (3, 128, 512, 512),
)
SETTINGS = (  # name, share of bytes, answers; no two are equal in both
    [("a", 0.2, 0.5), ("b", 0.5, 0.5), ("c", 0.1, 0.3), ("d", 0.2, 0.4), ("e", 1.0, 0.6), ("f", 0.9, 0.3)],
    [("x", 0.5, 0.2)],
    [("low", 0.1, 0.9), ("high", 0.9, 0.1)],
    [("i", 0.3, 0.0), ("j", 0.1, 0.0), ("k", 0.7, 0.2), ("l", 0.6, 0.2)],
)


ANSWERED = (  # even and odd prompts in turn; of the first all wrong ways give other numbers
    {
        "luck": [1, 0, 1, 0, 1, 1, 1, 0, 0, 0],
        "best of all": [1, 1, 1, 1, 0, 1, 1, 0, 0, 1],
        "best of the odd": [0, 1, 0, 1, 1, 1, 0, 1, 0, 1],
        "worst": [0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
    },
    {"one": [0, 1, 1, 0]},
    {"b": [0, 1, 0, 0, 1, 1, 0], "a": [1, 0, 1, 1, 1, 0, 0]},
)


def check_share(function) -> None:
    """`function(bits, group, tokens, raw)`: bytes of a store of codes, as a share of 16 bits an entry."""
    for bits, group, tokens, raw in ENTRIES:
        found = number(function(bits, group, tokens, raw), "share")
        coded, rest = (bits + 32 / group) / 16, raw / tokens
        expected = coded * (1 - rest) + rest
        hints = {
            bits / 16 * (1 - rest) + rest: "; every group has a scale and a zero of 16 bits each",
            (bits + 16 / group) / 16 * (1 - rest) + rest: "; a scale and a zero: two numbers of 16 bits a group",
            (bits + 32) / 16 * (1 - rest) + rest: "; scale and zero are shared by the entries of a group",
            coded: "; the newest tokens stay in 16 bits",
            coded + rest: "; tokens that stay in 16 bits have no codes",
            (bits + 32 / group) / 32 * (1 - rest) + rest: "; the full cache has 16 bits an entry",
            1 - expected: "; asked for is what is stored, not what is saved",
            16 * expected: "; a share of the 16 bits is asked for, not the bits",
        }
        near = (hint for wrong, hint in hints.items() if wrong != expected and math.isclose(found, wrong))
        case = f"{bits} bits, groups of {group}, {raw} of {tokens} tokens in 16 bits"
        message = f"{case}: {expected:.4f} is expected, found {found:.4f}{next(near, '')}"
        expect(math.isclose(found, expected, rel_tol=1e-9), message)
    print("share is right")


def check_front(function) -> None:
    """`function(settings)`: names of the settings that no other beats, by bytes."""
    for settings in SETTINGS:
        for order in itertools.islice(itertools.permutations(settings), 0, 720, 97):
            given = [*order]
            found = function(given)
            expect(found is not None and found is not ..., f"front returned {found!r}: is there a `return`?")
            expect(given == [*order], "front changes its argument, work on a copy")
            found, names = [*found], [name for name, *_ in settings]
            expect(all(name in names for name in found), f"names are expected, found {found}")
            expected = unbeaten(settings)
            strict = [x[0] for x in settings if not any(y[1] < x[1] and y[2] > x[2] for y in settings)]
            hints = {
                tuple(sorted(strict)): "; with as many answers fewer bytes beat more, with as many bytes more answers",
                (max(settings, key=lambda x: x[2])[0],): "; the best one is not all: fewer bytes are worth something",
                (min(settings, key=lambda x: x[1])[0],): "; the smallest one is not all",
                tuple(sorted(set(names) - set(expected))): "; these are the beaten ones",
            }
            case = f"{[*order]}: {expected} are expected, found {found}"
            if sorted(found) != sorted(expected):
                expect(False, case + hints.get(tuple(sorted(found)), ""))
            expect(found == expected, f"{case}; in the order of their bytes, the fewest first")
    print("front is right")


def unbeaten(settings) -> list[str]:
    def beats(one, other) -> bool:
        return one[1] <= other[1] and one[2] >= other[2] and one[1:] != other[1:]

    kept = [x for x in settings if not any(beats(y, x) for y in settings)]
    return [name for name, *_ in sorted(kept, key=lambda x: x[1])]


def check_honest(function) -> None:
    """`function(values)`: the setting that is best on even prompts, its mean there, and its mean on odd ones."""
    for values in ANSWERED:
        given = {name: [*each] for name, each in values.items()}
        found = function(given)
        expect(found is not None and found is not ..., f"honest returned {found!r}: is there a `return`?")
        expect(given == values, "honest changes its argument, work on a copy")
        expect(isinstance(found, tuple) and len(found) == 3, f"three values are expected, found {found!r}")
        name, seen, unseen = found
        means = {key: (mean(each[0::2]), mean(each[1::2]), mean(each)) for key, each in values.items()}
        best = max(means, key=lambda key: means[key][0])
        expected = (best, *means[best][:2])
        wrong = {
            max(means, key=lambda key: means[key][2]): "; who is best is asked of the even prompts alone",
            max(means, key=lambda key: means[key][1]): "; that is who is best on the odd prompts",
            min(means, key=lambda key: means[key][0]): "; that is the worst",
        }
        expect(name == best, f"{best!r} is expected, found {name!r}{wrong.get(name, '')}")
        hints = {
            (means[best][1], means[best][0]): "; first the mean where it was chosen",
            (means[best][0], means[best][0]): "; the second mean is over the odd prompts",
            (means[best][0], means[best][2]): "; the second mean is over the odd prompts alone",
            (means[best][0], max(m[1] for m in means.values())): "; the one that was chosen, not the best of the odd",
        }
        message = f"means {expected[1:]} are expected, found {(seen, unseen)}"
        same = math.isclose(float(seen), expected[1]) and math.isclose(float(unseen), expected[2])
        expect(same, message + hints.get((float(seen), float(unseen)), ""))
    print("honest is right")


def mean(values) -> float:
    return sum(values) / len(values)
