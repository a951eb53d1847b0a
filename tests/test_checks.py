"""The checks of the exercises accept right answers and name what is wrong with others."""

import math

import pandas as pd
import pytest

import kvlib
from kvlib.lab import checks, summaries


def longest_prompt(memory, weights, layers, kv_heads, head_dim, width, budget):
    return max(0, math.floor((memory - weights) / (2 * layers * kv_heads * head_dim * width * budget)))


def change_of_output(weights, values, evicted):
    share = weights[evicted].sum()
    return share / (1 - share) * (weights @ values - weights[evicted] / share @ values[evicted])


def test_right_answers_pass(capsys):
    checks.check_longest_prompt(longest_prompt)
    checks.check_change_of_output(change_of_output)
    assert capsys.readouterr().out == "longest_prompt is right\nchange_of_output is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "longest_prompt returned None: is there a `return`?"),
        (lambda *a: 2 * longest_prompt(*a), "twice too many: keys and values both need memory"),
        (lambda *a: longest_prompt(*a) + 1, "rounded up"),
        (lambda *a: longest_prompt(*a[:-1], 1.0), "with a budget of 0.25: 2129920 tokens fit"),
        (lambda m, w, *a: (m - w) // (2 * math.prod(a[:4]) * a[4]), "no prompt has a negative length"),
    ],
)
def test_wrong_lengths(answer, message):
    with pytest.raises(AssertionError) as error:
        checks.check_longest_prompt(answer)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, v, e: ..., "returned Ellipsis"),
        (lambda w, v, e: -change_of_output(w, v, e), "the sign is reversed"),
        (lambda w, v, e: -(w[e] @ v[e]), "the remaining weights have to sum to 1 again"),
        (lambda w, v, e: sum(change_of_output(w, v, [j]) for j in e), "that is the sum of the single errors"),
        (lambda w, v, e: change_of_output(w, v, e)[None], "shape (1, 4), expected (head_dim,) = (4,)"),
    ],
)
def test_wrong_changes(answer, message):
    with pytest.raises(AssertionError) as error:
        checks.check_change_of_output(answer)
    assert message in str(error.value)


@pytest.fixture
def table() -> pd.DataFrame:
    """200 samples; snapkv is near the full cache from 0.4 on, random only at 0.8, knorm never."""
    right = {("full", 1.0): 200, ("snapkv", 0.2): 150, ("snapkv", 0.4): 196, ("snapkv", 0.8): 200}
    right |= {("random", 0.4): 20, ("random", 0.8): 197, ("knorm", 0.4): 100, ("knorm", 0.8): 183}
    rows = [(*cell, sample, float(sample < count)) for cell, count in right.items() for sample in range(200)]
    table = pd.DataFrame(rows, columns=["method", "budget", "sample", "value"])
    return summaries.named(table.assign(task="needle", arguments="{}"))


def test_smallest_budget(table, capsys):
    names = ("snapkv", "random", "knorm")
    assert [checks.smallest_budget(table, "needle", name, 0.1) for name in names] == [0.4, 0.8, None]
    checks.check_smallest_budget(checks.smallest_budget, table)
    assert capsys.readouterr().out == "smallest_budget is right\n"
    with pytest.raises(AssertionError, match="needle, snapkv: expected 0.4, found 0.2; too optimistic"):
        checks.check_smallest_budget(lambda *a: 0.2, table)
    with pytest.raises(AssertionError, match="needle, snapkv: expected 0.4, found None$"):
        checks.check_smallest_budget(lambda *a: None, table)


def test_a_mean_above_the_limit_is_not_enough(table):
    def careless(table, task, configuration, loss):
        means = table[table["task"] == task].groupby(["configuration", "budget"])["value"].mean()
        fine = means[configuration][means[configuration] > means["full"].item() - loss]
        return None if fine.empty else fine.index[0]

    with pytest.raises(AssertionError, match="needle, knorm: expected None, found 0.8; too optimistic"):
        checks.check_smallest_budget(careless, table)


# Methods

WRONG = {
    "columns": ("padding tokens in front", lambda self, view: view.positions * view.step.seen % 11.0),
    "this pass only": ("reading the prompt in chunks", lambda self, view: view.column_sums().sum(2)),
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(kvlib.registry, "METHODS", dict(kvlib.METHODS))
    monkeypatch.setattr(kvlib, "METHODS", kvlib.registry.METHODS)


@pytest.mark.parametrize("name", ["random", "streaming_llm", "snapkv", "knorm"])
def test_methods_of_the_library_pass(name, capsys):
    checks.check_method(name)
    assert capsys.readouterr().out.startswith(f"{name} keeps the contract")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_methods(name, registry):
    message, score = WRONG[name]
    kvlib.register("wrong")(type("Wrong", (kvlib.Method,), {"score": score, "__doc__": "Wrong."}))
    with pytest.raises(AssertionError, match=message):
        checks.check_method("wrong")


def test_wrong_budgets(registry):
    body = {"score": lambda self, view: view.positions.float(), "budgets": lambda self, view: view.lengths // 3}
    kvlib.register("wrong")(type("Wrong", (kvlib.Method,), body))
    with pytest.raises(AssertionError, match="budget 0.5 of 90 tokens is 45, kept are {.*30"):
        checks.check_method("wrong")


def test_forgotten_registration():
    with pytest.raises(AssertionError, match="no method 'nameless': is the class decorated"):
        checks.check_method("nameless")
