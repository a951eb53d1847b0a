"""Exercises of 05_traps."""

import torch

from kvlib.lab.checks import expect

# Exercise 1


def check_kept_tokens(function) -> None:
    """`function(tokens, ratio)`: how many tokens stay if the share `ratio` is to go."""
    cases = [(8, 0.9), (100, 0.9), (300, 0.9), (11, 0.7), (11, 0.75), (1000, 0.9999), (64, 0.0), (1, 0.5), (7, 0.2)]
    for tokens, ratio in cases:
        found = function(tokens, ratio)
        expect(found is not None and found is not ..., f"kept_tokens returned {found!r}: is there a `return`?")
        case = f"{tokens} tokens, {ratio:g} of them to go: "
        expect(isinstance(found, int), f"{case}{found!r} is no whole number")
        expect(found >= 1, f"{case}nothing would stay, and a softmax over nothing is NaN")
        expect(found <= tokens, f"{case}{found} are more than there are")
        exact = (1 - ratio) * tokens
        hint = ""
        if found == int(exact):
            hint = f": `int` cuts {exact!r}"
        elif abs(found - ratio * tokens) <= 0.5:
            hint = ": that is how many go"
        right = abs(found - exact) <= 0.5 or found == 1 > exact
        expect(right, f"{case}{max(1, round(exact))} should stay, not {found}{hint}")
    print("kept_tokens is right")


# Exercise 2: functions that keep tokens, one of them right


def by_sorting(score, count: int, window: int):
    """The right one: the window, and before it the highest scores, ties to the earlier; in text order."""
    score = score.clone()
    score[:, score.shape[1] - window :] = torch.inf
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort().values


def by_loops(score, count: int, window: int):
    """The same, token by token."""
    rows, start = [], score.shape[1] - window
    for row in score.tolist():
        best = sorted(range(start), key=lambda place: (-row[place], place))[: count - window]
        rows.append(sorted([*best, *range(start, len(row))]))
    return torch.tensor(rows)


def short_window(score, count, window):
    return by_sorting(score, count, max(0, window - 1))


def endless_window(score, count, window):
    score = score.clone()
    score[:, -window:] = torch.inf
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort().values


def weak_sentinel(score, count, window):
    score = score.clone()
    score[:, score.shape[1] - window :] = score.max()
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort().values


def unsorted(score, count, window):
    score = score.clone()
    score[:, score.shape[1] - window :] = torch.inf
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def later_of_equals(score, count, window):
    last = score.shape[1] - 1
    score = score.clone()
    score[:, score.shape[1] - window :] = torch.inf
    return (last - score.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :count]).sort().values


def lowest(score, count, window):
    return by_sorting(-score, count, window)


def one_for_all(score, count, window):
    return by_sorting(score.mean(0, keepdim=True), count, window).expand(len(score), -1)


def in_place(score, count, window):
    kept = by_sorting(score, count, window)
    score[:, score.shape[1] - window :] = torch.inf
    return kept


def window_on_top(score, count, window):
    return by_sorting(score, min(count + window, score.shape[1]), window)


def first_stays(score, count, window):
    score = score.clone()
    score[:, 0] = torch.inf
    return by_sorting(score, count, window)


BROKEN = {
    lowest: "the lowest scores stay",
    window_on_top: "the window is not counted in `count`",
    short_window: "one token of the window may go",
    endless_window: "a window of 0 protects every token",
    weak_sentinel: "the window gets the highest score that there is, which others may have, too",
    later_of_equals: "of equal scores the later one stays",
    unsorted: "places are in the order of scores",
    one_for_all: "all heads keep the tokens of their mean score",
    in_place: "the caller's scores are overwritten",
    first_stays: "token 0 stays whatever its score",
}


def check_examine(examine) -> None:
    """`examine(keep)` raises for each of the broken functions and for none of the right ones."""
    for right in (by_sorting, by_loops):
        try:
            examine(right)
        except Exception as error:
            said = f"{type(error).__name__} {error}".strip()
            raise AssertionError(f"examine refuses a `keep` that is right: {said}") from None
    for number, broken in enumerate(BROKEN, 1):
        try:
            examine(broken)
        except Exception:
            continue
        missed = f"examine lets broken function {number} of {len(BROKEN)} pass: {BROKEN[broken]}"
        raise AssertionError(missed)
    print(f"examine is right: it finds all {len(BROKEN)} broken functions, and passes the right ones")
