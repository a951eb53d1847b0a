"""Exercises of 02_uncomp."""

import math
from itertools import pairwise

import torch

from kvlib.lab.checks import expect, number
from kvlib.lab.lessons.needles import ANSWER, PREFIX
from kvlib.methods.entropy import entropy, spectrum
from kvlib.methods.layer_groups import absolute_lengths, group_of, group_starts

MODELS = {"Llama-3-8B": (32, 8), "Llama-2-7B": (32, 32), "SmolLM2": (9, 3)}  # name -> query heads, KV heads


def check_native_share(function) -> None:
    """`function(kept, prompt, query_heads, kv_heads)`: what a set per query head takes, a share of the native cache."""
    for (name, (query_heads, kv_heads)), (kept, prompt) in (
        (model, sizes) for model in MODELS.items() for sizes in ((384, 8096), (512, 4096), (1000, 600))
    ):
        found = number(function(kept, prompt, query_heads, kv_heads), "native_share")
        each, group = min(kept, prompt) / prompt, query_heads / kv_heads
        hints = {
            each: "; that is a share of a cache with a copy for each query head, which no model stores",
            each / group: "; a group of query heads shares one KV head, so their sets take more and not less",
            kept / prompt * group: "; no head keeps more tokens than the prompt has",
            100 * each * group: "; a share of 1 is asked for, not percent",
            each * query_heads: "; the native cache has a set for each KV head",
        }
        expected = each * group
        hint = next((hint for wrong, hint in hints.items() if abs(found - wrong) < 1e-9), "")
        message = f"{name}, {kept} of {prompt} tokens: {expected:.4f} is expected, found {found:.4f}{hint}"
        expect(abs(found - expected) < 1e-9, message)
    print("native_share is right")


def check_matrix_entropy(function) -> None:
    """`function(tokens, k)`: truncated entropy in nats of `(tokens, d)`, by the steps of the lesson."""
    generator = torch.Generator().manual_seed(0)
    for n, d, k in ((40, 8, 2), (40, 8, 8), (5, 8, 3), (5, 8, 8)):
        scales = torch.linspace(3, 0.5, d, dtype=torch.float64)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales + 2
        before, case = x.clone(), f"{n} tokens, d = {d}, k = {k}"
        found = number(function(x, k), "matrix_entropy")
        expect(torch.equal(x, before), "matrix_entropy changes its argument, work on a copy")
        expect(not math.isnan(found), f"{case}: NaN; eigenvalues can be 0, or a little below by rounding: 0 ln 0 is 0")
        centred = x - x.mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True)
        expected = truncated(unit, k)
        wrong = {
            "; tokens are centred first": truncated(x / x.norm(dim=1, keepdim=True), k),
            "; rows are divided by their norms": truncated(centred, k),
            "; centre first, then divide by the norms": truncated(*recentred(x), k),
            "; the k eigenvalues are not divided by their sum": entropy(spectrum(x), k, renormalised=True).item(),
            "; in nats: the natural logarithm": expected / math.log(2),
            "; not divided by ln d": expected / math.log(d),
            "; the k largest eigenvalues": entropy(spectrum(x).flip(-1), k).item(),
            "; only the k largest eigenvalues count": entropy(spectrum(x)).item(),
            "; eigenvalues, not singular values": truncated_singular(unit, k),
            "; the mean over tokens, not the sum": entropy(spectrum(x) * n, k).item(),
            "; that is the effective rank, the entropy is its logarithm": math.exp(expected),
            "; an entropy has a minus in front": -expected,
        }
        hint = next((hint for hint, other in wrong.items() if abs(found - other) < 1e-8), "")
        message = f"{case}: {expected:.6f} is expected, found {found:.6f}{hint}"
        expect(abs(found - expected) < 1e-8, message)
    print("matrix_entropy is right")


def truncated(rows: torch.Tensor, k: int) -> float:
    """Entropy of the k largest eigenvalues of the second moment of rows as they are, divided by its trace."""
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).flip(-1)
    return entropy(values / values.sum(), k).item()


def truncated_singular(rows: torch.Tensor, k: int) -> float:
    values = torch.linalg.svdvals(rows)
    return entropy(values / values.sum(), min(k, len(values))).item()


def recentred(x: torch.Tensor) -> tuple[torch.Tensor]:
    """Rows divided by their norms first, and centred then."""
    unit = x / x.norm(dim=1, keepdim=True)
    return (unit - unit.mean(0),)


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
