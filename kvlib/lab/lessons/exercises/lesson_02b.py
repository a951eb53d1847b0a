"""Exercises of 02b_uncomp_parts."""

import itertools

import torch

from kvlib.lab.checks import expect, number
from kvlib.methods.head_groups import release

CURVES = {  # name -> (x, y): falling, as sorted eigenvalues are
    "a hyperbola": (torch.arange(1, 41).double(), 1 / torch.arange(1, 41).double()),
    "two straight pieces": (torch.arange(1, 13).double(), torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0.9, 0.8, 0.7])),
    "a curve above its chord": (torch.arange(1, 32).double(), (961 - torch.arange(1, 32).double() ** 2) / 10),
    "abscissas that are not evenly spaced": (
        torch.tensor([0.0, 1, 2, 3, 12]).double(),
        torch.tensor([6.0, 4, 3.4, 3, 0]),
    ),
    "a hyperbola on logarithmic ordinates": (torch.arange(1, 41).double(), -torch.arange(1, 41).double().log()),
}


def check_elbow(function) -> None:
    """`function(x, y)`: which point, counted from 1, is furthest from the line through the first and the last one."""
    for case, (x, y) in CURVES.items():
        x, y = x.clone(), y.double()
        given = x.clone(), y.clone()
        found = number(function(*given), "elbow")
        same = torch.equal(x, given[0]) and torch.equal(y, given[1])
        expect(same, "elbow changes its arguments, work on copies")
        gap = y - (y[0] + (x - x[0]) * (y[-1] - y[0]) / (x[-1] - x[0]))
        expected = int(gap.abs().argmax()) + 1
        steps = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        even = y - torch.linspace(y[0].item(), y[-1].item(), len(y), dtype=y.dtype)
        hints = {
            expected - 1: "; points are counted from 1",
            int(gap.argmin()) + 1: "; this curve is above its chord: the distance has no sign",
            int(gap.argmax()) + 1: "; this curve is below its chord: the distance has no sign",
            int((steps[1:] - steps[:-1]).abs().argmax()) + 2: "; that is where the slope changes most",
            int(even.abs().argmax()) + 1: "; the chord goes through x as it is given",
            int((y - y.mean()).abs().argmin()) + 1: "; the chord connects the ends, it is not the mean",
        }
        hint = next((hint for wrong, hint in hints.items() if found == wrong), "")
        expect(found == expected, f"{case}: point {expected} is expected, found {found:g}{hint}")
    print("elbow is right")


def check_group_budgets(function) -> None:
    """`function(mean, groups, spread, tokens)`: tokens that a head of each group keeps, the lowest group first."""
    for (mean, tokens), groups, spread in itertools.product(
        ((384, 4096), (102, 512), (37, 40), (262, 4096), (9, 10)), (1, 2, 3, 8), (0.0, 1 / 3, 2 / 3, 0.95)
    ):
        found = function(mean, groups, spread, tokens)
        expect(found is not None and found is not ..., f"group_budgets returned {found!r}: is there a `return`?")
        found = [float(budget) for budget in found]
        case = f"mean {mean}, {groups} groups, spread {spread:.2f}, {tokens} tokens"
        expect(len(found) == groups, f"{case}: {len(found)} numbers, one for each group is expected")
        expected = stepped(mean, groups, min(int(spread * mean), tokens - mean, mean - 1))
        plain = min(int(spread * mean), mean - 1)
        hints = {
            "; the lowest group comes first": expected[::-1],
            "; no head keeps more tokens than the prompt has, and the mean stays": stepped(mean, groups, plain),
            "; the largest is cut to the prompt, but the mean has to stay": [
                min(tokens, budget) for budget in stepped(mean, groups, plain)
            ],
            "; spread is a share of the mean, not a number of tokens": stepped(mean, groups, spread),
            "; the outer groups are spread x mean away from the mean, half of that is not it": stepped(
                mean, groups, min(int(spread * mean), tokens - mean) // 2
            ),
            "; whole numbers of tokens, rounded towards the mean": [
                mean + (2 * g - groups + 1) * min(spread * mean, tokens - mean, mean - 1) / max(1, groups - 1)
                for g in range(groups)
            ],
            "; rounded down on both sides the mean is lost: round towards it": [
                mean + (2 * g - groups + 1) * min(int(spread * mean), tokens - mean, mean - 1) // max(1, groups - 1)
                for g in range(groups)
            ],
            "; one group, or a spread of 0, leaves the mean": [mean * (1 - spread)] * groups,
        }
        near = [hint for hint, wrong in hints.items() if wrong != expected and found == [float(x) for x in wrong]]
        message = f"{case}: {expected} is expected, found {[round(budget, 2) for budget in found]}"
        expect(found == [float(budget) for budget in expected], message + "".join(near[:1]))
    print("group_budgets is right")


def stepped(mean: int, groups: int, furthest: float) -> list[int]:
    """Equal steps from `mean - furthest` to `mean + furthest`, rounded towards the mean."""
    return [mean + int((2 * group - groups + 1) * furthest / max(1, groups - 1)) for group in range(groups)]


def check_greedy(function) -> None:
    """`function(labels, groups)`: the release's group of each head, from its group in each window."""
    generator = torch.Generator().manual_seed(0)
    for windows, heads, groups in ((9, 8, 4), (5, 3, 3), (5, 8, 2), (7, 12, 3), (3, 8, 8), (4, 6, 1)):
        scores = torch.rand(windows, heads, generator=generator) + 0.5 * torch.rand(heads, generator=generator)
        scores = torch.tensor([[0.0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0, 1], [1, 2, 0]]) if heads == 3 else scores
        labels = release_labels(scores, groups)
        before = labels.clone()
        found = function(labels, groups)
        expect(found is not None and found is not ..., f"greedy returned {found!r}: is there a `return`?")
        expect(torch.equal(labels, before), "greedy changes its argument, work on a copy")
        found = [int(label) for label in found]
        case = f"{windows} windows, {heads} heads, {groups} groups"
        expect(len(found) == heads, f"{case}: {len(found)} numbers, one for each head is expected")
        sizes = [found.count(group) for group in range(groups)]
        message = f"{case}: groups of {sizes} heads, {heads // groups} in each are expected"
        most = labels.mode(0).values.tolist()
        unequal = "; that is the group of most windows, whose size is left to chance" if found == most else ""
        expect(sizes == [heads // groups] * groups, message + unequal)
        expected = release(scores, groups).tolist()
        mean = labels.double().mean(0)
        backwards = greedily((labels[None] == torch.arange(groups)[:, None, None]).sum(1).flip(0), groups)
        hints = {
            "; that is by the mean of the labels, not by counts": ordered(mean, groups),
            "; the lowest label is the lowest entropy": [groups - 1 - label for label in expected],
            "; groups choose from the lowest on": [groups - 1 - label for label in backwards],
            "; that is by one window": labels[0].tolist(),
        }
        near = [hint for hint, wrong in hints.items() if wrong != expected and found == wrong]
        expect(found == expected, f"{case}: {expected} is expected, found {found}{''.join(near[:1])}")
    print("greedy is right")


def release_labels(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """The group of each head in each window, `(windows, heads)`; groups are equally large."""
    return scores.argsort(dim=-1, stable=True).argsort(-1) // (scores.shape[-1] // groups)


def ordered(score: torch.Tensor, groups: int) -> list[int]:
    """The group of each head by its score alone."""
    return (score.argsort(stable=True).argsort() // (len(score) // groups)).tolist()


def greedily(votes: torch.Tensor, groups: int) -> list[int]:
    """From the first row of `votes` `(groups, heads)` on, each takes the heads with the most votes that are left."""
    found = [-1] * votes.shape[1]
    for group, row in enumerate(votes.tolist()):
        left = sorted((head for head, label in enumerate(found) if label < 0), key=lambda head: -row[head])
        for head in left[: len(found) // groups]:
            found[head] = group
    return found
