"""Exercises of 02c_uncomp_stages."""

from itertools import pairwise

import torch

from kvlib.lab.checks import expect, number
from kvlib.lab.lessons.needles import ANSWER, PREFIX
from kvlib.methods.layer_groups import absolute_lengths, group_of, group_starts


def check_tokens_per_layer(function) -> None:
    """`function(scores, threshold, longest, shortest)`: how many tokens each layer goes on with, a list."""
    generator = torch.Generator().manual_seed(0)
    cases = {
        "[5, 6, 3, 4, 1]": ([5.0, 6.0, 3.0, 4.0, 1.0], 1.0, 100, 40),
        "scores that only rise": ([1.0, 2.0, 3.0], 1.0, 100, 40),
        "scores that glide down": ([9.0, 8.5, 8.0, 7.5, 7.0], 1.0, 100, 40),
    }
    drawn = (10 * torch.rand(12, generator=generator, dtype=torch.float64)).tolist()
    cases["twelve layers"] = drawn, 2.0, 1000, 128
    for name, (scores, threshold, longest, shortest) in cases.items():
        before = [*scores]
        found = function(scores, threshold, longest, shortest)
        expect(found is not None and found is not ..., f"tokens_per_layer returned {found!r}: is there a `return`?")
        expect(scores == before, "tokens_per_layer changes its argument, work on a copy")
        found, layers = list(found), len(scores)
        expect(len(found) == layers, f"{name}: one number for each of {layers} layers is expected, found {len(found)}")
        starts = group_starts(scores, threshold)
        expected = per_layer(starts, layers, longest, shortest)
        steps = [scores[i] - scores[i - 1] for i in range(1, layers)]
        others = {  # what is wrong -> where groups start then
            "; a group begins where the score falls, not where it rises": [step > threshold for step in steps],
            "; a rise begins no group": [abs(step) > threshold for step in steps],
        }
        others = {hint: [0, *(i + 1 for i, begun in enumerate(each) if begun)] for hint, each in others.items()}
        others["; a fall is measured from the layer before"] = from_start(scores, threshold)
        wrong = {hint: per_layer(each, layers, longest, shortest) for hint, each in others.items()}
        wrong |= {
            "; the layer whose score is lower begins the group": [*expected[1:], expected[-1]],
            "; deeper groups have fewer tokens": expected[::-1],
            "; the last group has `shortest` tokens: there is one step less than groups": [
                longest - group * ((longest - shortest) // len(starts)) for group in group_of(starts, layers)
            ],
        }
        hint = next((hint for hint, other in wrong.items() if found == other), "")
        hint = "; whole numbers of tokens" if any(value != int(value) for value in found) else hint
        expect(found == expected, f"{name}: {expected} is expected, found {found}{hint}")
    print("tokens_per_layer is right")


def per_layer(starts: list[int], layers: int, longest: int, shortest: int) -> list[int]:
    lengths = absolute_lengths(len(starts), longest, shortest)
    return [lengths[group] for group in group_of(starts, layers)]


def from_start(scores: list[float], threshold: float) -> list[int]:
    """Group starts if a fall is measured from where the group has begun."""
    starts = [0]
    for layer, score in enumerate(scores):
        if scores[starts[-1]] - score > threshold:
            starts.append(layer)
    return starts


def check_needle_score(function) -> None:
    """`function(answer, prefix, needle)`: 0 for nothing, 100 for the right answer, and no gain by talking on."""
    other = " visit twenty other places nobody had mentioned before and go home again happily by boat or by train"
    for prefix, right in ((PREFIX, ANSWER), ("The pass key of the old house in Trieste is", " blue river seven")):
        needle, words = f"{prefix}{right}.", right.split()

        def score(answer, prefix=prefix, needle=needle):
            return number(function(answer, prefix, needle), "needle_score")

        exact, empty = score(right), score("")
        message = f"the right answer has {exact:.1f}, 100 is expected"
        hint = "; a share of 1 is not asked for" if abs(exact - 1) < 1e-9 else ""
        expect(abs(exact - 100) < 1e-9, message + hint)
        hint = "; the words of the prefix were given, not found" if empty > 0 else ""
        expect(abs(empty) < 1e-9, f"an empty answer has {empty:.1f}, 0 is expected{hint}")
        said = " zebra" * 5
        expect(abs(score(said)) < 1e-9, f"{said!r} has {score(said):.1f}, 0 is expected: none of its words is right")
        shouted = right.upper() + "."
        expect(abs(score(shouted) - 100) < 1e-9, f"{shouted!r} has {score(shouted):.1f}: neither case nor stops matter")
        grown = [score(" " + " ".join(words[:count])) for count in range(len(words) + 1)]
        rising = all(later > earlier for earlier, later in pairwise(grown))
        expect(rising, f"each further right word has to count: {', '.join(f'{value:.0f}' for value in grown)}")
        expect(0 < score(right + other) < 99, f"the right answer with {len(other.split())} other words behind it has "
               f"{score(right + other):.1f}: whoever says everything has not found the needle")  # fmt: skip
        once, often = score(f" {words[-1]}"), score(f" {words[-1]}" * len(words))
        expect(often <= once, f"a right word said {len(words)} times has {often:.1f}, said once {once:.1f}")
    print("needle_score is right")
