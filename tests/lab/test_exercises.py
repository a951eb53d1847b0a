"""The checks of the exercises accept right answers and name what is wrong with others."""

import math

import pandas as pd
import pytest
import torch

import kvlib
from kvlib.lab import checks
from kvlib.lab.lessons import excerpts, scoring, value_norms
from kvlib.lab.lessons.exercises import lesson_00, lesson_01, lesson_11
from kvlib.lab.results import summaries
from kvlib.methods import vatp


def longest_prompt(memory, weights, layers, kv_heads, head_dim, width, budget):
    return max(0, math.floor((memory - weights) / (2 * layers * kv_heads * head_dim * width * budget)))


def change_of_output(weights, values, evicted):
    share = weights[evicted].sum()
    return share / (1 - share) * (weights @ values - weights[evicted] / share @ values[evicted])


def test_right_answers_pass(capsys):
    lesson_00.check_longest_prompt(longest_prompt)
    lesson_00.check_change_of_output(change_of_output)
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
        lesson_00.check_longest_prompt(answer)
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
        lesson_00.check_change_of_output(answer)
    assert message in str(error.value)


# 01_vatp


def limits(weight, value_norm, output_norm):
    return abs(1 - output_norm / value_norm) / (1 - weight), (1 + output_norm / value_norm) / (1 - weight)


def grouped_score(attention, values, weight):
    heads, group, _ = attention.shape
    parts = weight.view(len(weight), heads, group, -1).permute(1, 2, 3, 0)  # (kv_heads, group, head_dim, hidden)
    return (attention * (values[:, None] @ parts).abs().sum(-1)).mean(1)


def test_right_answers_of_the_second_lesson_pass(capsys):
    lesson_01.check_limits(limits)
    lesson_01.check_grouped_score(grouped_score)
    assert capsys.readouterr().out == "limits is right\ngrouped_score is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "limits returned None: is there a `return`?"),
        (lambda a, v, o: (0, 1 + o / v), "the other weights grow by 1 / (1 - a)"),
        (lambda a, v, o: ((1 - o / v) / (1 - a), limits(a, v, o)[1]), "a norm is not negative"),
        (lambda a, v, o: (0, limits(a, v, o)[1]), "the lower limit 0 is right but not sharp"),
        (lambda a, v, o: (limits(a, v, o)[0], 1e9), "the upper limit 1e+09 is right but not sharp"),
        (lambda a, v, o: (limits(a, v, o)[0], 1 / (1 - a)), "against v: the change is"),
    ],
)
def test_wrong_limits(answer, message):
    with pytest.raises(AssertionError) as error:
        lesson_01.check_limits(answer)
    assert message in str(error.value)


def reduced_first(attention, values, weight):
    return attention.sum(1) * grouped_score(torch.ones_like(attention), values, weight)


def interleaved(attention, values, weight):
    heads, group, _ = attention.shape
    other = weight.view(len(weight), group, heads, -1).transpose(1, 2).reshape(weight.shape)
    return grouped_score(attention, values, other)


def two_norm(attention, values, weight):
    parts = weight.view(len(weight), *attention.shape[:2], -1).permute(1, 2, 3, 0)
    return (attention * (values[:, None] @ parts).norm(dim=-1)).sum(1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, v, w: None, "grouped_score returned None"),
        (lambda a, v, w: grouped_score(a, v, w)[:, :3], "shape (2, 3), expected (kv_heads, tokens) = (2, 7)"),
        (lambda a, v, w: a.mean(1) * v.abs().sum(-1), "that is the norm before W_O"),
        (reduced_first, "reduced before multiplying"),
        (interleaved, "the columns of W_O are in that order"),
        (two_norm, "the 2-norm, asked for was the 1-norm"),
        (lambda a, v, w: -grouped_score(a, v, w), "expected tensor"),
    ],
)
def test_wrong_grouped_scores(answer, message):
    with pytest.raises(AssertionError) as error:
        lesson_01.check_grouped_score(answer)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def texts():
    """One held-out text, on the shipped model."""
    model, tokenizer = kvlib.load()
    prefix, whole = excerpts.read_code(model, tokenizer, "attr/_make.py", 128, 16)
    return model, {"a text": (whole, scoring.importance(model, prefix, "forced_sinks"), value_norms.norms(prefix))}


def per_query(attention, norms):
    return attention / torch.arange(attention.shape[-1], 0, -1)


def test_own_scores(texts, capsys):
    lesson_01.check_own_score(per_query, *texts)
    assert capsys.readouterr().out.startswith("a text: attention ")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, n: ..., "my_score returned Ellipsis"),
        (lambda a, n: a[0], "my_score: shape (8, 128), expected (16, 8, 128)"),
        (lambda a, n: scoring.forced(per_query(a, n), 1), "no token may be forced"),
        (lambda a, n: a.mul_(2), "changes its argument"),
        (lambda a, n: a, "with attention by"),
        (lambda a, n: per_query(a, n) * (torch.arange(a.shape[-1]) > 0), "your score needs them"),
    ],
)
def test_wrong_own_scores(texts, answer, message):
    model, parts = texts
    copies = {name: tuple(x.clone() if torch.is_tensor(x) else x for x in part) for name, part in parts.items()}
    with pytest.raises(AssertionError) as error:
        lesson_01.check_own_score(answer, model, copies)
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
    assert [lesson_00.smallest_budget(table, "needle", name, 0.1) for name in names] == [0.4, 0.8, None]
    lesson_00.check_smallest_budget(lesson_00.smallest_budget, table)
    assert capsys.readouterr().out == "smallest_budget is right\n"
    with pytest.raises(AssertionError, match="needle, snapkv: expected 0.4, found 0.2; too optimistic"):
        lesson_00.check_smallest_budget(lambda *a: 0.2, table)
    with pytest.raises(AssertionError, match="needle, snapkv: expected 0.4, found None$"):
        lesson_00.check_smallest_budget(lambda *a: None, table)


def test_a_mean_above_the_limit_is_not_enough(table):
    def careless(table, task, configuration, loss):
        means = table[table["task"] == task].groupby(["configuration", "budget"])["value"].mean()
        fine = means[configuration][means[configuration] > means["full"].item() - loss]
        return None if fine.empty else fine.index[0]

    with pytest.raises(AssertionError, match="needle, knorm: expected None, found 0.8; too optimistic"):
        lesson_00.check_smallest_budget(careless, table)


# 11_vatp_more


@pytest.fixture
def registered():
    """`METHODS` with classes under the names of the exercise; gone afterwards."""
    before = dict(kvlib.METHODS)

    def add(**classes):
        for name, cls in classes.items():
            kvlib.register(name)(type(name, (cls,), {"__module__": __name__}))

    yield add
    for name in set(kvlib.METHODS) - set(before):
        del kvlib.METHODS[name]


class Projected(vatp.OutputNorm):
    def importance(self, view, last=None):
        return view.column_sums(last) * view.state["norm"].movedim(-1, 2)


class Lifted(vatp.OutputNorm):
    def observe(self, view):
        norm = torch.linalg.vector_norm(view.new_value, 1, dim=-1)
        view.remember("norm", norm[..., None].expand(*norm.shape, view.groups))
        vatp.ForcedSinks.observe(self, view)


class OtherNorm(vatp.OutputNorm):
    def observe(self, view):
        norm = torch.linalg.vector_norm(view.new_value, 2, dim=-1)
        view.remember("norm", norm[..., None].expand(*norm.shape, view.groups))
        vatp.ForcedSinks.observe(self, view)


def test_right_halves_pass(registered, capsys):
    registered(one=Projected, other=Lifted)
    lesson_11.check_halves("one", "other")
    assert capsys.readouterr().out == "one and other are one step each\n"


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (vatp.OutputNorm, Lifted, r"one ranks by (A + 1e-4) ‖W_O v‖₁, both steps at once, not by A ‖W_O v‖₁"),
        (Projected, vatp.OutputNorm, r"other ranks by (A + 1e-4) ‖W_O v‖₁, both steps at once, not by (A + 1e-4) ‖v‖₁"),
        (vatp.VATP, Lifted, "one ranks by A ‖v‖₁, not by A ‖W_O v‖₁"),
        (Lifted, Projected, "one ranks by (A + 1e-4) ‖v‖₁, not"),
        (Projected, OtherNorm, "other ranks by something else"),
    ],
)
def test_wrong_halves(registered, one, other, message):
    registered(one=one, other=other)
    with pytest.raises(AssertionError) as error:
        lesson_11.check_halves("one", "other")
    assert message in str(error.value)


def chance(n, k, r):
    return (r + (k - r) ** 2 / (n - r)) / k


def test_right_chances_pass(capsys):
    lesson_11.check_chance(chance)
    assert capsys.readouterr().out == "chance is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, k, r: None, "chance"),
        (lambda n, k, r: k / n, "the recent tokens are the same for certain"),
        (lambda n, k, r: k * chance(n, k, r), "that is a number of tokens, not a share of k"),
        (lambda n, k, r: (r + (k - r) ** 2 / n) / k, "the others are chosen from n - r tokens"),
        (lambda n, k, r: 1 - chance(n, k, r), "n = 512, k = 102, r = 51: 0.5553 is expected, found 0.4447"),
    ],
)
def test_wrong_chances(answer, message):
    with pytest.raises(AssertionError) as error:
        lesson_11.check_chance(answer)
    assert message in str(error.value)


def test_halves_have_to_be_registered():
    with pytest.raises(AssertionError, match="no method 'nowhere'"):
        lesson_11.check_halves("nowhere", "vatp")


# Methods

WRONG = {
    "columns": ("padding tokens in front", lambda self, view: view.positions * view.step.seen % 11.0),
    "this pass only": ("reading the prompt in chunks", lambda self, view: view.column_sums().sum(2)),
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(kvlib.core.method, "METHODS", dict(kvlib.METHODS))
    monkeypatch.setattr(kvlib, "METHODS", kvlib.core.method.METHODS)


@pytest.mark.parametrize("name", ["random", "streaming_llm", "snapkv", "knorm"])
def test_methods_of_the_library_pass(name, capsys):
    checks.check_method(name)
    assert capsys.readouterr().out.startswith(f"{name} keeps the contract")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_methods(name, registry):
    message, score = WRONG[name]
    kvlib.register("wrong")(type("Wrong", (kvlib.Evictor,), {"score": score, "__doc__": "Wrong."}))
    with pytest.raises(AssertionError, match=message):
        checks.check_method("wrong")


def test_wrong_budgets(registry):
    body = {"score": lambda self, view: view.positions.float(), "budgets": lambda self, view: view.lengths // 3}
    kvlib.register("wrong")(type("Wrong", (kvlib.Evictor,), body))
    with pytest.raises(AssertionError, match="budget 0.5 of 90 tokens is 45, kept are {.*30"):
        checks.check_method("wrong")


def test_forgotten_registration():
    with pytest.raises(AssertionError, match="no method 'nameless': is the class decorated"):
        checks.check_method("nameless")
