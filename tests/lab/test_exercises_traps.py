"""The checks of the exercises about silent failures accept right answers and name what is wrong with others."""

import json
import math

import pytest
import torch
from test_exercises import refused

from kvlib.lab.lessons.exercises import lesson_05
from kvlib.lab.notebooks import files
from kvlib.paths import NOTEBOOKS


def solution(cell: str) -> dict:
    """What a cell of the solutions defines."""
    cells = json.loads((NOTEBOOKS / "solutions" / "05_traps.ipynb").read_text())["cells"]
    names = {"torch": torch, "found": {}}
    (source,) = ["".join(each["source"]) for each in cells if each["id"] == cell]
    exec(source, names)
    return names


def test_right_answers_pass(capsys):
    lesson_05.check_kept_tokens(solution("kept-solution")["kept_tokens"])
    lesson_05.check_examine(solution("examine-solution")["examine"])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "kept_tokens is right",
        "examine is right: it finds all 10 broken functions, and passes the right ones",
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, r: None, "kept_tokens returned None: is there a `return`?"),
        (lambda n, r: int(n * (1 - r)), "8 tokens, 0.9 of them to go: nothing would stay"),
        (
            lambda n, r: max(1, int(n * (1 - r))),
            "100 tokens, 0.9 of them to go: 10 should stay, not 9: `int` cuts 9.99",
        ),
        (lambda n, r: round(n * (1 - r)), "1000 tokens, 0.9999 of them to go: nothing would stay"),
        (lambda n, r: max(1, math.ceil(n * (1 - r))), "11 tokens, 0.7 of them to go: 3 should stay, not 4"),
        (lambda n, r: max(1, round(n * r)), "8 tokens, 0.9 of them to go: 1 should stay, not 7: that is how many go"),
        (lambda n, r: max(1.0, n * (1 - r)), "8 tokens, 0.9 of them to go: 1.0 is no whole number"),
        (lambda n, r: max(2, round(n * (1 - r))), "8 tokens, 0.9 of them to go: 1 should stay, not 2"),
        (lambda n, r: max(1, n - int(r * n)), "11 tokens, 0.7 of them to go: 3 should stay, not 4"),
        (lambda n, r: n + 1, "9 are more than there are"),
    ],
)
def test_wrong_counts(answer, message):
    refused(lesson_05.check_kept_tokens, message, answer)


def drawn(heads=2, tokens=12, seed=0):
    return torch.rand(heads, tokens, generator=torch.Generator().manual_seed(seed))


def same(keep, score, count, window) -> None:
    assert keep(score, count, window).tolist() == lesson_05.by_loops(score, count, window).tolist()


def never(keep):
    keep(drawn(), 5, 2)


def always(keep):
    raise AssertionError("no")


def shapes(keep):
    assert keep(drawn(), 5, 2).shape == (2, 5)


def one_head(keep):
    for window in (0, 2):
        score = drawn(heads=1)
        before = score.clone()
        same(keep, score, 5, window)
        assert torch.equal(score, before)
    same(keep, torch.ones(1, 12), 5, 2)


def no_empty_window(keep):
    for window in (1, 2):
        same(keep, drawn(), 5, window)
        same(keep, torch.ones(2, 12), 5, window)
    score = drawn()
    keep(score, 5, 2)
    assert score.isfinite().all()


def no_ties(keep):
    for window in (0, 2):
        same(keep, drawn(), 5, window)


def as_sets(keep):
    for window in (0, 2):
        for score in (drawn(), torch.ones(2, 12)):
            kept, right = keep(score, 5, window), lesson_05.by_loops(score, 5, window)
            assert [set(row) for row in kept.tolist()] == [set(row) for row in right.tolist()]


def forgets_the_caller(keep):
    for window in (0, 2):
        for score in (drawn(), torch.ones(2, 12)):
            same(keep, score.clone(), 5, window)


def sorted_by_score(keep):
    kept = keep(drawn(), 5, 2).tolist()
    assert all(row != sorted(row) for row in kept)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda keep: None, "lets broken function 1 of 10 pass: the lowest scores stay"),
        (never, "lets broken function 1 of 10 pass: the lowest scores stay"),
        (always, "refuses a `keep` that is right: AssertionError no"),
        (shapes, "pass: the lowest scores stay"),
        (sorted_by_score, "refuses a `keep` that is right"),
        (no_empty_window, "pass: a window of 0 protects every token"),
        (no_ties, "pass: the window gets the highest score that there is, which others may have, too"),
        (as_sets, "pass: places are in the order of scores"),
        (one_head, "pass: all heads keep the tokens of their mean score"),
        (forgets_the_caller, "pass: the caller's scores are overwritten"),
    ],
)
def test_examinations_that_miss_something(answer, message):
    refused(lesson_05.check_examine, message, answer)


def test_stubs_are_refused():
    cells = files.read(NOTEBOOKS / "05_traps.ipynb")["cells"]
    for name, check in (("kept", lesson_05.check_kept_tokens), ("examine", lesson_05.check_examine)):
        names = {}
        (source,) = [cell["source"] for cell in cells if cell["id"] == f"{name}-stub"]
        exec(source.split("\n\n\n")[0], names)
        with pytest.raises(AssertionError):
            check(next(value for key, value in names.items() if callable(value) and key != "__builtins__"))
