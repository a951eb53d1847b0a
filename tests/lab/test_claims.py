"""The ledger on small made tables: verdicts and their reasons, guards, and the files that show them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvlib import checksums, paths
from kvlib.anchored import LISTED
from kvlib.anchored.arms import ARMS
from kvlib.core import method as registry
from kvlib.lab import statistics, tasks
from kvlib.lab.claims import __main__ as command
from kvlib.lab.claims import attaining, examining, ledger, needed
from kvlib.lab.claims.claim import Claim, cells_of
from kvlib.lab.claims.deciding import Finding, deciding
from kvlib.lab.claims.examining import Evidence, Result
from kvlib.lab.claims.ledger import VERDICTS, plain
from kvlib.lab.claims.registered import EVIDENCE, PRIMARY, read, task_names
from kvlib.lab.claims.writing import write
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.studies import STUDIES

MODELS = ("minilm", "smollm2")
CLAIM = {
    "id": "one",
    "paper": "Paper",
    "arxiv": "2306.14040",
    "claim": "H2O beats random tokens.",
    "evidence": "ours",
    "registered": pd.Timestamp("2026-11-21").date(),
    "table": "small",
    "models": [*MODELS],
    "compare": {"first": {"method": "h2o", "budget": 0.2}, "second": {"method": "random", "budget": 0.2}},
    "tasks": ["needle", "label"],
    "length": 512,
    "statistic": "mean_difference",
    "rule": {"above": 0},
}
REVISIONS = {"new": {"when": pd.Timestamp("2026-11-29").date(), "removed": "the old protocol"}}
MARKED = """# Title

<!-- score -->
<!-- end of score -->

<!-- verdicts -->
anything
<!-- end of verdicts -->

The rest.
"""


def as_file(*claims, **more) -> str:
    return yaml.safe_dump({"claims": [*claims]} | more)


def rows(method, right, *, model="minilm", budget=0.2, task="needle", samples=40, arguments="{}", **columns):
    """The rows of a cell in which the first `right` samples are right."""
    fixed = {"model": model, "method": method, "budget": budget, "arguments": arguments, "task": task, "length": 512}
    bytes_ = {"stored_bytes": int(1000 * budget), "full_bytes": 1000}
    sample = np.arange(samples)
    table = pd.DataFrame({"sample": sample, "value": (sample < right).astype(float)})
    return table.assign(**(fixed | bytes_ | {"clamped": False, "protocol": "prompt"} | columns))


def both_models(*cells):
    """Cells `(method, right)` or `(method, right, columns)` on two tasks of both shipped models."""
    cells = [(*cell, {})[:3] for cell in cells]
    return pd.concat(
        rows(method, right, model=model, task=task, **more)
        for method, right, more in cells
        for model in MODELS
        for task in ("needle", "label")
    )


WINS = both_models(("h2o", 30), ("random", 10))


@pytest.fixture
def judged(tmp_path):
    """What the ledger says about one claim, `CLAIM` with changes, given the rows of its table."""

    def judge(table, revisions=None, **changes):
        if table is not None:
            table.to_parquet(tmp_path / "small.parquet")
        (tmp_path / "claims.yaml").write_text(as_file(CLAIM | changes, revisions=revisions))
        return ledger.ledger(read(tmp_path / "claims.yaml", tmp_path), tmp_path).iloc[0]

    return judge


@pytest.fixture(autouse=True)
def a_table_to_come(monkeypatch):
    monkeypatch.setattr("kvlib.lab.claims.registered.STUDIES", {"small": None})


# Verdicts


def test_both_models_have_to_agree(judged):
    row = judged(WINS)
    assert row["verdict"] == "holds" and row["models"] == "minilm; smollm2" and row["n"] == "80; 80"
    assert row["ours"].startswith("minilm: +0.500 [0.") and "; smollm2: +0.500 [0." in row["ours"]
    assert row["reason"] == "the mean difference is above 0 on minilm and smollm2"
    assert (row["length"], row["protocol"], row["theirs"]) == ("512", "prompt", "")
    turned = WINS.assign(method=WINS["method"].map({"h2o": "random", "random": "h2o"}))
    assert judged(turned)["verdict"] == "contradicted"
    assert judged(turned)["reason"] == "the mean difference is below 0 on minilm and smollm2"
    mixed = pd.concat([WINS[WINS["model"] == "minilm"], turned[turned["model"] == "smollm2"]])
    row = judged(mixed)
    assert row["verdict"] == "undecided here"
    assert row["reason"] == ("the mean difference is above 0 on minilm; the mean difference is below 0 on smollm2")


@pytest.mark.parametrize("model", MODELS)
def test_one_model_is_not_enough(judged, model):
    row = judged(WINS[WINS["model"] == model])
    (other,) = set(MODELS) - {model}
    assert row["verdict"] == "undecided here" and row["models"] == model
    expected = f"the mean difference is above 0 on {model}; {other}: no rows of h2o at 0.2, length 512"
    assert row["reason"] == expected


def test_models_may_have_different_numbers_of_samples(judged):
    """What can be shown is then what the one with fewer can show; without enough of it nothing is decided."""
    alone = {n: judged(both_models(("h2o", 3 * n // 4, {"samples": n}), ("random", n // 4, {"samples": n})))
             for n in (4, 40, 200)}  # fmt: skip
    for fewer, verdict in ((40, "holds"), (4, "undecided here")):
        sides = [rows(m, right * n // 4, samples=n, model=model, task=task) for model, n in zip(MODELS, (200, fewer))
                 for task in CLAIM["tasks"] for m, right in (("h2o", 3), ("random", 1))]  # fmt: skip
        row = judged(pd.concat(sides))
        assert row["verdict"] == verdict and row["models"] == "minilm; smollm2"
        assert row["n"] == "; ".join(alone[n]["n"].split("; ")[0] for n in (200, fewer))
        assert row["ours"].split("; ") == [alone[n]["ours"].split("; ")[i] for i, n in enumerate((200, fewer))]
        assert row["detectable"] == alone[fewer]["detectable"]


def test_other_models_do_not_count(judged):
    strangers = both_models(("h2o", 0), ("random", 40)).assign(model="seed1")
    assert judged(pd.concat([WINS, strangers]))["ours"] == judged(WINS)["ours"]


def test_few_differences_decide_nothing(judged):
    row = judged(both_models(("h2o", 12), ("random", 10)))
    assert row["verdict"] == "undecided here"
    assert row["reason"] == "the interval does not tell whether the mean difference is above 0 on minilm and smollm2"
    assert float(row["detectable"]) > 2 / 40  # and that is why


@given(st.lists(st.integers(0, 1), min_size=5, max_size=60), st.integers(1, 4))
def test_answers_never_vary_too_little_to_tell(right, tasks_):
    """No sample makes a mean so certain that a shift of less than an answer shows, not even one without a mistake."""
    claim = Claim("id", "paper", "claim", "ours", CLAIM["registered"], statistic="mean")
    values = np.array(right, dtype=float)
    samples = len(right) * tasks_
    found, turned, scores = (examining.smallest(claim, [[x] * tasks_]) for x in (values, 1 - values, 0.25 + values / 2))
    plain = statistics.detectable_shift(samples, values.std())
    assert found == pytest.approx(turned) and found > 1 / samples
    assert found > plain or values.mean() == 0.5  # as if a few were right and wrong by halves, which varies most
    assert scores == pytest.approx(plain / 2)  # other values tell how they vary


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ({"above": 0.3}, "holds"),
        ({"above": 0.7}, "contradicted"),
        ({"above": 0.5}, "undecided here"),
        ({"below": 0.7}, "holds"),
        ({"below": 0.3}, "contradicted"),
        ({"within": [0.3, 0.7]}, "holds"),
        ({"within": [0.3, 0.5]}, "undecided here"),
        ({"within": [-0.1, 0.1]}, "contradicted"),
        ({"within": [0.8, 0.9]}, "contradicted"),
    ],
)
def test_rules(judged, rule, verdict):
    row = judged(WINS, rule=rule)
    assert row["verdict"] == verdict
    low, high = (float(x) for x in row["ours"].split("[")[1].split("]")[0].split(", "))
    assert 0.3 < low < 0.5 < high < 0.7


def test_the_same_answers_are_equivalent_only_with_enough_samples(judged):
    same = {"statistic": "mean_difference", "rule": {"within": [-0.05, 0.05]}}
    assert judged(both_models(("h2o", 9), ("random", 9)), **same)["verdict"] == "holds"
    few = both_models(("h2o", 9, {"samples": 15}), ("random", 9, {"samples": 15}))
    assert judged(few, **same)["verdict"] == "undecided here"


def test_a_mean_of_one_side(judged):
    alone = {"compare": None, "value": {"method": "h2o", "budget": 0.2}, "statistic": "mean"}
    row = judged(WINS, **alone, rule={"above": 0.6})
    assert row["verdict"] == "holds" and row["ours"].startswith("minilm: 0.750 [0.")
    assert judged(WINS, **alone, rule={"below": 0.6})["verdict"] == "contradicted"


def test_tasks_weigh_the_same(judged):
    longer = pd.concat([rows(m, r, samples=400, model=model, task="label") for model in MODELS for m, r in
                        (("h2o", 0), ("random", 0))])  # fmt: skip
    row = judged(pd.concat([WINS[WINS["task"] == "needle"], longer]))
    assert row["ours"].startswith("minilm: +0.250") and row["n"] == "440; 440"


# Several cells


def result(support, against, opposite=1):
    evidence = Evidence(support, against, opposite)
    return Result("", evidence, evidence, 0.1, 1, label=f"{support}/{against}")


def conclude(results, primary):
    return Finding.of(results, primary).where


def test_where_every_cell_has_to_agree_only_the_opposite_is_corrected():
    assert conclude([result(0.04, 1), result(0.03, 1), result(0.02, 1)], "every task") == "inside"
    assert conclude([result(0.001, 1), result(0.06, 1)], "every task") == "undecided"
    assert conclude([result(1, 0.04), result(0.001, 1)], "every task") == "undecided"
    assert conclude([result(1, 0.02), result(0.001, 1)], "every task") == "outside"


def test_where_one_cell_is_enough_it_is_the_other_way_round():
    assert conclude([result(0.04, 1), result(1, 1)], "some budget") == "undecided"
    assert conclude([result(0.02, 1), result(1, 0.001)], "some budget") == "inside"
    assert conclude([result(1, 0.04), result(1, 0.03)], "some budget") == "outside"
    assert conclude([result(1, 0.04), result(1, 0.06)], "some budget") == "undecided"


def test_the_cell_that_is_shown_is_the_one_that_decides():
    weak, strong = result(0.04, 0.9), result(0.001, 0.99)
    assert deciding([strong, weak], "inside", "every task") is weak
    assert deciding([weak, strong], "inside", "some task") is strong
    weak, strong = result(0.9, 0.04), result(0.99, 0.001)
    assert deciding([weak, strong], "outside", "every task") is strong
    assert deciding([strong, weak], "outside", "some task") is weak


BY_BUDGET = both_models(
    *((method, right, {"budget": budget}) for budget, pair in ((0.2, (30, 10)), (0.4, (30, 29)), (0.8, (10, 30)))
      for method, right in zip(("h2o", "random"), pair))
)  # fmt: skip
OPEN = {"compare": {"first": {"method": "h2o"}, "second": {"method": "random"}}}


def test_budgets(judged):
    row = judged(BY_BUDGET, **OPEN, budgets=[0.2, 0.4, 0.8], primary="every budget")
    assert row["verdict"] == "contradicted" and row["ours"].startswith("minilm at 0.8: -0.500")
    assert row["reason"].endswith("smollm2: of 3 cells 1 inside, 1 outside")
    assert judged(BY_BUDGET, **OPEN, budgets=[0.2, 0.4], primary="every budget")["verdict"] == "undecided here"
    assert judged(BY_BUDGET, **OPEN, budgets=[0.2, 0.4, 0.8], primary="some budget")["verdict"] == "holds"
    row = judged(BY_BUDGET, **OPEN, budgets=[0.2, 0.1], primary="every budget")
    assert row["verdict"] == "not testable here"
    assert row["reason"] == "no rows of h2o at 0.1, length 512 (budgets there: 0.2, 0.4, 0.8)"


def test_tasks_one_by_one(judged):
    lost = WINS.copy()
    lost.loc[(lost["task"] == "label") & (lost["method"] == "h2o"), "value"] = 0.0
    assert judged(lost)["verdict"] == "holds, on these families only"  # +0.25 over both, +0.75 and -0.25
    row = judged(lost, primary="every task", tasks="all")
    assert row["verdict"] == "contradicted, on these families only" and row["ours"].startswith(
        "minilm on label: -0.250"
    )
    assert judged(lost, primary="some task")["verdict"] == "holds, on these families only"


# Win counts


FOURTEEN = sorted(tasks.FAMILIES)[:14]


def by_family(wins: int, ties: int = 0) -> pd.DataFrame:
    """Fourteen families: the first side wins so many, ties some and loses the rest."""
    outcome = ["win"] * wins + ["tie"] * ties + ["lose"] * (14 - wins - ties)
    right = {"win": (30, 10), "tie": (21, 20), "lose": (10, 30)}  # a lead of one is no win
    return pd.concat(
        rows(method, right[how][side], model=model, task=task)
        for model in MODELS
        for task, how in zip(FOURTEEN, outcome)
        for side, method in enumerate(("h2o", "random"))
    )


COUNTED = {"statistic": "win_count", "rule": {"above": 0.5}, "tasks": FOURTEEN, "models": ["minilm"]}


@pytest.mark.parametrize(
    ("wins", "ties", "p", "of_ours", "of_papers"),
    [
        (11, 0, 0.057, "undecided here", "undecided here"),
        (12, 0, 0.013, "holds", "reproduced here"),
        (9, 5, 0.42, "undecided here", "undecided here"),  # without ties: 9 of 9
        (10, 3, 0.18, "undecided here", "undecided here"),
        (2, 0, 0.013, "contradicted", "opposite here"),
        (2, 12, 0.013, "contradicted", "not reproduced here"),
        (0, 14, 0.00012, "contradicted", "not reproduced here"),
    ],
)
def test_what_a_win_count_is_worth(judged, wins, ties, p, of_ours, of_papers):
    """Ties are no wins; families are counted, so that nothing is for these families only."""
    row = judged(by_family(wins, ties), **COUNTED)
    assert row["verdict"] == of_ours and row["n"] == "14" and row["detectable"] == "12 of 14"
    assert row["ours"].startswith(f"minilm: {wins} of 14 won, {14 - wins - ties} lost (p = {p:.2g})")
    assert judged(by_family(wins, ties), **COUNTED, evidence="abstract")["verdict"] == of_papers


def test_few_families_show_no_majority(judged):
    row = judged(WINS, **COUNTED | {"tasks": ["needle", "label"]})
    assert row["verdict"] == "undecided here" and row["detectable"] == "none of 2"


# Words


@pytest.mark.parametrize("primary", ["mean over tasks", "every task", "some task"])
@pytest.mark.parametrize("evidence", ["abstract", "ours"])
@pytest.mark.parametrize(
    ("right", "rule", "where"),
    [
        (30, {"above": 0}, "inside"),
        (0, {"above": 0}, "opposite"),
        (11, {"above": 0}, "undecided"),
        (11, {"above": 0.5}, "outside"),  # less than claimed, and not the opposite
        (0, {"above": 0.5}, "opposite"),
        (0, {"above": -0.05}, "outside"),  # no loss was claimed, which has no opposite
        (30, {"below": 0}, "opposite"),
        (30, {"within": [-0.1, 0.1]}, "outside"),
    ],
)
def test_words(judged, right, rule, where, evidence, primary):
    """Contradicted are claims of ours, and of papers those that are universal."""
    word = {"inside": "reproduced", "outside": "not reproduced"}.get(where, where) + " here"
    if evidence == "ours" and where != "undecided":
        word = "holds" if where == "inside" else "contradicted"
    elif primary == "every task" and where in ("opposite", "outside"):
        word = "contradicted"
    table = both_models(("h2o", right), ("random", 10))
    row = judged(table, rule=rule, evidence=evidence, primary=primary, models=["minilm"])
    single = "" if primary == "mean over tasks" or where == "undecided" else ", on these families only"
    assert row["verdict"] == word + single
    assert row["source"] == EVIDENCE[evidence]


def families_that_differ(gains) -> pd.DataFrame:
    """Fourteen families, in which the first side is right `gains` times more often of 40."""
    return pd.concat(
        rows(method, 20 + gain * (method == "h2o"), model=model, task=task)
        for model in MODELS
        for task, gain in zip(FOURTEEN, gains)
        for method in ("h2o", "random")
    )


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([8] * 7 + [12] * 7, "holds"),
        ([20] * 3 + [0] * 11, "holds, on these families only"),  # three of fourteen: others might have none
        ([20] * 3 + [-20] * 3 + [0] * 8, "undecided here"),
        ([-20] * 3 + [0] * 11, "contradicted, on these families only"),
    ],
)
def test_two_levels(judged, gains, verdict):
    row = judged(families_that_differ(gains), tasks=FOURTEEN)
    assert row["verdict"] == verdict
    assert (float(row["p"]) <= 0.05) == (verdict != "undecided here")
    assert (float(row["p_across"]) <= 0.05) == (verdict == "holds")


def test_both_models_have_to_agree_across_families(judged):
    wide, narrow = (families_that_differ(gains) for gains in ([8] * 7 + [12] * 7, [20] * 3 + [0] * 11))
    mixed = pd.concat([wide[wide["model"] == MODELS[0]], narrow[narrow["model"] == MODELS[1]]])
    row = judged(mixed, tasks=FOURTEEN)
    assert row["verdict"] == "holds, on these families only" and float(row["p_across"]) > 0.05


def test_one_family_says_nothing_about_others(judged):
    row = judged(WINS, tasks=["needle"])
    assert row["verdict"] == "holds, on this family only" and row["p_across"] == ""


def test_holm_over_all_claims(tmp_path):
    WINS.to_parquet(tmp_path / "small.parquet")
    bounds = {"a": -0.1, "b": 0.3, "c": 0.37, "d": 0.5}
    claims = [CLAIM | {"id": name, "rule": {"above": bound}} for name, bound in bounds.items()]
    missing = CLAIM | {"id": "e", "length": 9}
    (tmp_path / "claims.yaml").write_text(as_file(*claims, missing))
    row = ledger.ledger(read(tmp_path / "claims.yaml", tmp_path), tmp_path).set_index("id")
    p = row["p"][:4].astype(float)
    assert row["holm"][:4].astype(float).tolist() == pytest.approx(statistics.holm(p).tolist(), rel=0.1)  # two digits
    assert p["c"] <= 0.05 < float(row.loc["c", "holm"]) and (row.loc["e", ["p", "holm", "holm_across"]] == "").all()


# Rules that cannot be met


def as_claim(statistic="mean", expected=0.05, rule=(-np.inf, 0.1)):
    described = ("id", "paper", "claim", "ours", CLAIM["registered"])
    return Claim(*described, statistic=statistic, expected=expected, rule=rule)


@pytest.mark.parametrize(
    ("claim", "families", "samples", "met"),
    [
        (as_claim(), 1, 200, True),
        (as_claim(), 1, 100, False),
        (as_claim(expected=0.11), 1, 10**6, False),  # outside the rule: no number is enough
        (as_claim(expected=0.085), 1, 200, False),
        (as_claim(expected=0.085), 16, 200, True),
        (as_claim("mean_difference", 0.0, (-0.05, np.inf)), 1, 50, True),  # at best nothing differs
        (as_claim("mean_difference", 0.0032, (0, np.inf)), 8, 200, False),
        (as_claim("mean_difference", 0.0032, (0, np.inf)), 16, 200, True),
        (as_claim("mean_difference", 0.0, (0, np.inf)), 16, 200, False),
        (as_claim("win_count", 12 / 16, (0.5, np.inf)), 16, 200, False),
        (as_claim("win_count", 13 / 16, (0.5, np.inf)), 16, 200, True),
        (as_claim("win_count", 13 / 16, (0.5, np.inf)), 8, 200, False),
        (as_claim(expected=None), 1, 1, True),
    ],
)
def test_rules_that_can_be_met(claim, families, samples, met):
    assert (attaining.obstacle(claim, families, samples) == "") == met


@pytest.mark.parametrize("share", [0.02, 0.05, 0.08, 0.3])
def test_a_rule_that_can_be_met_is_met_four_times_in_five(share):
    """At the closest boundary that is not refused, by the ledger's own test."""
    rng, samples = np.random.default_rng(0), 300
    bounds = np.linspace(share, 1, 2000)
    bound = next(b for b in bounds if not attaining.obstacle(as_claim(expected=share, rule=(-np.inf, b)), 1, samples))
    met = [statistics.mean([rng.random(samples) < share], resamples=999).below(bound) <= 0.05 for _ in range(300)]
    assert 0.6 < np.mean(met) < 0.95  # less for few right answers, since two more are made up


def test_the_ledger_asks_again_when_rows_are_there(judged):
    """Families and samples that were not known when the claim was written."""
    row = judged(WINS, expected=0.02)
    assert row["verdict"] == "not testable here" and row["reason"].startswith(
        "the rule cannot be met: 0.02 is expected"
    )
    assert judged(WINS, expected=0.4)["verdict"] == "holds"


def test_families_in_natural_language(monkeypatch):
    monkeypatch.setattr(tasks, "NATURAL", {name: tasks.find(name) for name in ("needle", "label")})
    assert task_names("natural") == ("label", "needle") and task_names("natural few-shot") == ("label",)


# Guards


def test_equal_bytes(judged):
    equal = {"equal_bytes": "stored"}
    assert judged(WINS, **equal)["verdict"] == "holds"
    near = WINS.assign(stored_bytes=np.where(WINS["method"] == "h2o", 204, 200))
    assert judged(near, **equal)["verdict"] == "holds"
    far = WINS.assign(stored_bytes=np.where(WINS["method"] == "h2o", 205, 200))
    row = judged(far, **equal)
    assert row["verdict"] == "not testable here" and row["ours"] == ""
    assert row["reason"] == "stored bytes are not equal: 205 and 200"
    assert judged(far)["verdict"] == "holds"  # only where the claim asks for it
    assert judged(WINS, equal_bytes="read")["reason"] == "the table has no column read_bytes"
    assert judged(far.assign(read_bytes=7), equal_bytes="read")["verdict"] == "holds"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[t["method"] != "random"], "no rows of random at 0.2, length 512"),
        (lambda t: t[(t["task"] != "label") | (t["method"] == "h2o")], "no rows of random at 0.2, length 512 on label"),
        (lambda t: t.assign(length=256), "no rows of h2o at 0.2, length 512"),
        (lambda t: t.assign(budget=0.3), "no rows of h2o at 0.2, length 512 (budgets there: 0.3)"),
        (lambda t: t.assign(arguments='{"kernel": 9}'), "no rows of h2o at 0.2, length 512"),
        (lambda t: t.drop(columns="arguments"), "small.parquet has no column arguments"),
        (lambda t: t.assign(arguments="?"), "small.parquet holds values of another type than results have"),
        (lambda t: t.assign(value="yes"), "small.parquet holds values of another type than results have"),
        (lambda t: pd.concat([t, t.head(1)]), "minilm: the table has rows twice"),
        (lambda t: t.assign(value=t["value"].where(t["sample"] != 3)), "the table has rows without a value"),
        (lambda t: t[(t["sample"] != 3) | (t["method"] == "h2o")], "the two sides do not have the same samples"),
        (
            lambda t: t.assign(protocol=t["method"]),
            "there are rows of several protocols, and the claim names none",
        ),
        (lambda t: t.head(0), "no rows of h2o at 0.2, length 512"),
    ],
)
def test_what_a_table_lacks_is_said_and_never_raised(judged, change, reason):
    row = judged(change(WINS))
    assert reason in row["reason"]
    if not row["reason"].startswith("the mean"):
        assert row["verdict"] == "not testable here"


def test_no_table_or_a_broken_one(judged, tmp_path):
    assert judged(None)["reason"] == "there is no table small.parquet yet"
    (tmp_path / "small.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    assert judged(None)["reason"] == "small.parquet is not a readable table"
    assert judged(None)["verdict"] == "not testable here"


def test_text_where_bytes_belong(judged):
    assert "holds no numbers" in judged(WINS.assign(stored_bytes="many"), equal_bytes="stored")["reason"]


def test_protocols_are_never_pooled(judged):
    decoded = both_models(("h2o", 10), ("random", 30)).assign(protocol="decoded")
    table = pd.concat([WINS, decoded])
    assert judged(table)["verdict"] == "not testable here"
    assert judged(table, protocol="prompt")["verdict"] == "holds"
    row = judged(table, protocol="decoded")
    assert row["verdict"] == "contradicted" and row["protocol"] == "decoded"


def test_rows_of_another_protocol_that_are_gone(judged):
    """What was registered before a revision asks for rows that may not be kept."""
    old = {"before": {"protocol": "decoded"}, "revised": ["new"]}
    row = judged(WINS, revisions=REVISIONS, **old)
    assert row["verdict"] == "holds"
    assert row["reason"].endswith("as registered before: not testable here (rows of the protocol decoded are not kept)")
    assert judged(WINS, protocol="decoded")["reason"] == "rows of the protocol decoded are not kept"


def test_seeds_are_averaged_within_their_sample(judged):
    row = judged(pd.concat([WINS.assign(seed=0), WINS.assign(seed=1)]))
    assert row["n"] == "80; 80" and row["verdict"] == "holds"


def test_arguments_match_whatever_their_order(judged):
    wide = rows("snapkv", 30, arguments='{"window": 16, "kernel": 15}')
    table = pd.concat([WINS, *(wide.assign(model=m, task=t) for m in MODELS for t in ("needle", "label"))])
    first = {"method": "snapkv", "budget": 0.2, "arguments": {"kernel": 15, "window": 16}}
    assert judged(table, compare=CLAIM["compare"] | {"first": first})["verdict"] == "holds"
    first = first | {"arguments": {"kernel": 15}}
    assert (
        "no rows of snapkv (kernel=15) at 0.2" in judged(table, compare=CLAIM["compare"] | {"first": first})["reason"]
    )


def test_clamped_rows_are_mentioned(judged):
    row = judged(WINS.assign(clamped=WINS["sample"] < 10))
    assert row["reason"].endswith("minilm: 25% of rows clamped; smollm2: 25% of rows clamped")


# What the papers claim


@dataclasses.dataclass(frozen=True)
class Hosted(registry.METHODS["h2o"]):
    host: str = "h2o"


def test_claims_of_the_four_papers_can_be_said(monkeypatch, tmp_path):
    """A win count, a small loss, bytes and work, equal reads at every budget, an equivalence, a wall clock."""
    for name in ("vatp", "uncomp", "tidaldecode", "anchorcoder"):
        monkeypatch.setitem(registry.METHODS, name, Hosted)
    base = {name: CLAIM[name] for name in ("registered", "table", "models", "length")} | {"evidence": "secondary"}
    said = lambda **more: base | {"paper": more["id"], "claim": f"{more['id']} wins."} | more  # noqa: E731
    full = {"method": "full", "budget": 1.0}
    claims = [
        said(
            id="vatp-12-of-16", statistic="win_count", rule={"above": 0.5}, tasks="families", equal_bytes="stored",
            compare={"first": {"method": "vatp", "budget": 0.5, "arguments": {"host": "h2o"}},
                     "second": {"method": "h2o", "budget": 0.5}},
            published={"value": "12 of 16 tasks", "source": "Table 1 by a reading note, LLaMA2-7B-chat"},
        ),
        said(
            id="uncomp-loss", statistic="mean_difference", rule={"above": -0.0141}, tasks="code",
            compare={"first": {"method": "uncomp", "budget": 0.05}, "second": full},
            published={"value": "1.41 points", "source": "abstract"},
        ),
        said(id="uncomp-bytes", statistic="mean", measure="stored", rule={"below": 0.06}, tasks="code",
             value={"method": "uncomp", "budget": 0.05}),
        said(id="uncomp-prefill", statistic="ratio", measure="prefill", rule={"below": 1 / 1.6}, tasks="code",
             compare={"first": {"method": "uncomp", "budget": 0.05}, "second": full}),
        said(
            id="tidaldecode-every-budget", statistic="mean_difference", rule={"above": 0}, tasks=["needle"],
            equal_bytes="read", primary="every budget", budgets=[32, 64],
            compare={"first": {"method": "tidaldecode"}, "second": {"method": "h2o"}},
        ),
        said(id="tidaldecode-lossless", statistic="mean_difference", rule={"within": [-0.02, 0.02]}, tasks="code",
             compare={"first": {"method": "tidaldecode", "budget": 64}, "second": full}),
        {name: value for name, value in base.items() if name not in ("table", "models", "length")}
        | {"id": "tidaldecode-latency", "paper": "TidalDecode", "claim": "Decoding is 2.1 times faster.",
           "testable": False, "reason": "a wall clock"},
        said(id="anchorcoder-bytes", statistic="mean", measure="stored", rule={"below": 0.3}, tasks="code",
             value={"method": "anchorcoder", "budget": 0.5}),
    ]  # fmt: skip
    (tmp_path / "claims.yaml").write_text(as_file(*claims))
    few = ["completion", "cross_file", "needle"]

    def cell(method, right, budget, stored, names=few, **more):
        more = {"budget": budget, "stored_bytes": stored, "read_bytes": stored, "samples": 200, **more}
        return [rows(method, right, model=model, task=task, **more) for model in MODELS for task in names]

    table = pd.concat(
        [
            *cell("full", 190, 1.0, 1000, prefill_flops=200),
            *cell("uncomp", 190, 0.05, 50, prefill_flops=100),
            *cell("vatp", 150, 0.5, 500, tasks.FAMILIES, arguments='{"host": "h2o"}'),
            *cell("h2o", 140, 0.5, 500, tasks.FAMILIES),
            *(table for budget in (32, 64) for table in cell("tidaldecode", 190, budget, budget)),
            *(table for budget in (32, 64) for table in cell("h2o", 100, budget, budget)),
        ]
    )
    table.to_parquet(tmp_path / "small.parquet")
    made = ledger.ledger(read(tmp_path / "claims.yaml", tmp_path), tmp_path).set_index("id")
    assert made["verdict"].to_dict() == {
        "anchorcoder-bytes": "not testable here",
        "tidaldecode-every-budget": "reproduced here, on this family only",
        "tidaldecode-latency": "not testable here",
        "tidaldecode-lossless": "reproduced here",
        "uncomp-bytes": "reproduced here",
        "uncomp-loss": "reproduced here",
        "uncomp-prefill": "reproduced here",
        "vatp-12-of-16": "reproduced here",
    }
    assert made.loc["vatp-12-of-16", "theirs"] == "12 of 16 tasks (Table 1 by a reading note, LLaMA2-7B-chat)"
    assert made.loc["uncomp-prefill", "ours"].startswith("minilm: 0.500 [0.500, 0.500]")
    assert made.loc["tidaldecode-latency", "reason"] == "a wall clock"


# Claims that are not well formed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tabel": "x"}, "one: unknown field 'tabel'; did you mean 'table'?"),
        ({"table": "smal"}, "unknown table 'smal'; did you mean 'small'?"),
        ({"tasks": ["nedle"]}, "unknown task 'nedle'; did you mean 'needle'?"),
        ({"tasks": "everything"}, "tasks is a list, all, families, natural or a group"),
        ({"tasks": ["needle", "needle"]}, "tasks names one twice"),
        ({"tasks": []}, "tasks is a list"),
        ({"rule": {"over": 0}}, "unknown rule 'over'"),
        ({"rule": 0}, "a rule is one of above, below, within, not 0"),
        ({"rule": {"above": 0, "below": 1}}, "a rule is one of"),
        ({"rule": {"above": "1e-3"}}, "above: '1e-3' is not what it needs"),
        ({"rule": {"within": 0.1}}, "within: 0.1 is not what it needs"),
        ({"rule": {"within": [0.1, -0.1]}}, "within: [0.1, -0.1] is empty"),
        ({"evidence": None}, "lacks evidence"),
        ({"evidence": "rumour"}, "unknown evidence 'rumour'"),
        ({"claim": ""}, "lacks claim"),
        ({"registered": "soon"}, "registered is 'soon', not a date"),
        ({"arxiv": 2306.1404}, "arxiv is 2306.1404, not a text: put it in quotes"),
        ({"published": 12}, "published holds a value and a source"),
        ({"published": {"value": 12}}, "published holds a value and a source"),
        ({"published": {"value": 12, "source": ""}}, "published holds a value and a source"),
        ({"statistic": "median"}, "unknown statistic 'median'"),
        ({"statistic": "mean"}, "mean needs `value`"),
        ({"statistic": "win_count"}, "decided by the share of wins, above a bound between 0 and 1"),
        ({"statistic": "win_count", "primary": "every task"}, "win_count counts over all tasks"),
        ({"statistic": "win_count", "rule": {"below": 0.5}}, "above a bound between 0 and 1"),
        ({"measure": "speed"}, "unknown measure 'speed'"),
        ({"models": ["minilm2"]}, "unknown independent model 'minilm2'; did you mean 'minilm'?"),
        ({"models": "minilm"}, "models is a list"),
        ({"tasks": "natural gossip"}, "unknown group 'gossip'"),
        ({"revised": ["twice"]}, "unknown revision 'twice'"),
        ({"before": {"budgets": [0.1]}}, "`before` needs a revision"),
        ({"expected": "much"}, "expected is a share, not 'much'"),
        ({"expected": 0.01, "samples": 50}, "the rule cannot be met: 0.01 is expected, 0.01 inside the boundary, and"),
        ({"primary": "each task"}, "unknown primary 'each task'"),
        ({"primary": "every budget"}, "go together"),
        ({"budgets": [0.2]}, "go together"),
        ({"primary": "every budget", "budgets": [0.2]}, "no side leaves its budget to `budgets`"),
        ({"primary": "every budget", "budgets": 0.2}, "budgets is a list of budgets, not 0.2"),
        ({"value": {"method": "h2o", "budget": 0.2}}, "needs either `compare`"),
        ({"compare": {"first": {"method": "h2o", "budget": 0.2}}}, "compare holds first and second"),
        ({"equal_bytes": True}, "equal_bytes is stored or read, not True"),
        ({"length": 0.5}, "length is 0.5, not a number of tokens"),
        ({"reason": "because"}, "unknown field 'reason'"),
        ({"testable": "no"}, "testable is true or false, not 'no'"),
    ],
)
def test_what_is_wrong_with_a_claim(tmp_path, change, message):
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | change))
    with pytest.raises(ValueError) as error:
        read(tmp_path / "claims.yaml", tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"method": "h20", "budget": 0.2}, "unknown method 'h20'; did you mean 'h2o'?"),
        ({"method": "h2o", "budget": 2.5}, "budget=2.5"),
        ({"method": "h2o"}, "h2o needs a budget"),
        ({"budget": 0.2}, "a side needs a method"),
        ({"method": "h2o", "budget": 0.2, "kernel": 3}, "unknown field 'kernel'"),
        ({"method": "snapkv", "budget": 0.2, "arguments": {"kernel": 4}}, "kernel=4: an odd number"),
        ({"method": "snapkv", "budget": 0.2, "arguments": {"colonel": 5}}, "colonel"),
    ],
)
def test_what_is_wrong_with_a_side(tmp_path, side, message):
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | {"compare": CLAIM["compare"] | {"first": side}}))
    with pytest.raises(ValueError) as error:
        read(tmp_path / "claims.yaml", tmp_path)
    assert message in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "claims.yaml"
    file.write_text(as_file(CLAIM, CLAIM, CLAIM | {"id": "two", "table": "none"}, "text", {"id": "three"}))
    with pytest.raises(ValueError) as error:
        read(file, tmp_path)
    assert str(error.value).splitlines() == [
        "claims.yaml:",
        "two: unknown table 'none'; known: small",
        "claim 4: not a claim with fields: 'text'",
        "three: lacks paper, claim, evidence, registered, table, models, tasks, length, statistic, rule",
        "one: this id is used 2 times",
    ]
    file.write_text("- id: [")
    with pytest.raises(ValueError, match="claims.yaml is not YAML"):
        read(file, tmp_path)
    file.write_text("id: one")
    with pytest.raises(ValueError, match="holds no list of claims"):
        read(file, tmp_path)
    described = {name: CLAIM[name] for name in ("id", "paper", "claim", "evidence", "registered")}
    file.write_text(as_file(described | {"testable": False}))
    with pytest.raises(ValueError, match="one: lacks reason"):
        read(file, tmp_path)


# Files


@pytest.fixture
def place(tmp_path):
    """Claims, results and a README, as arguments of `write`."""
    WINS.to_parquet(tmp_path / "small.parquet")
    later = CLAIM | {"id": "another", "claim": "a | b", "rule": {"above": 0.9}, "evidence": "abstract"}
    later["paper"] = "VATP"
    later |= {"revised": ["narrowed"], "before": {"rule": {"above": 0}}}
    revisions = {"narrowed": {"when": pd.Timestamp("2026-11-28").date(), "removed": "more than nothing"}}
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | {"front": True}, later, revisions=revisions))
    (tmp_path / "README.md").write_text(MARKED)
    return {"claims": tmp_path / "claims.yaml", "results": tmp_path, "readme": tmp_path / "README.md"}


def stale(place):
    return write(**place, dry=True)[1]


def test_written_files_are_fresh_until_something_changes(place):
    assert stale(place)
    write(**place)
    assert not stale(place)
    readme, table = place["readme"].read_text(), place["results"] / "ledger.csv"
    page = (place["claims"].parent / "VERDICTS.md").read_text()
    score, verdicts = readme.split("<!-- end of score -->\n\n<!-- verdicts -->\n")
    assert score.splitlines()[:2] == ["# Title", ""] and score.splitlines()[3:] == [
        "| claims of | all | reproduced | not reproduced | opposite | undecided | not testable |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| [VATP](https://arxiv.org/abs/2306.14040) | 1 | 0 | 1 | 0 | 0 | 0 |",
        "| together | 1 | 0 | 1 | 0 | 0 | 0 |",
    ]
    assert verdicts.startswith("- On minilm and smollm2: 1 claims of papers and the field: ")
    assert readme.endswith("<!-- end of verdicts -->\n\nThe rest.\n") and "anything" not in readme
    assert "| [Paper](https://arxiv.org/abs/2306.14040): H2O beats random tokens. | – | minilm: +0.5" in readme
    assert r"a \| b" not in readme and r"a \| b (the abstract was read, not the paper) |" in page
    papers, ours = page.split("## Of papers and of the field")[1].split("## Of ours, controls among them")
    ours, revisions = ours.split("## Revisions")
    assert r"a \| b" in papers and "H2O beats random tokens" not in papers and "H2O beats random tokens" in ours
    assert "**not reproduced here** (revised: narrowed): the mean difference is below 0.9" in papers
    assert "as registered before: reproduced here (minilm: +0.500" in papers
    assert "- *narrowed* (2026-11-28): more than nothing" in revisions
    assert "minilm and smollm2; label, needle; 512 tokens; protocol prompt; h2o 20% against random 20%" in papers
    assert pd.read_csv(table)["id"].tolist() == ["another", "one"]
    assert checksums.problems(place["results"]) == [] and set(checksums.listed(place["results"])) == {
        "VERDICTS.md", "claims.yaml", "ledger.csv"
    }  # fmt: skip

    place["readme"].write_text(readme.replace("1 holds", "2 holds"))
    assert stale(place)
    write(**place)
    assert place["readme"].read_text() == readme
    table.write_text(table.read_text().replace("not reproduced", "reproduced"))
    assert stale(place)
    write(**place)
    WINS.assign(value=1 - WINS["value"]).to_parquet(place["results"] / "small.parquet")
    assert stale(place)


def test_the_ledger_is_the_same_each_time(place):
    """Neither the order of claims and rows nor other claims change a line, but for the correction for all of them."""
    write(**place)
    first = pd.read_csv(place["results"] / "ledger.csv")
    file = yaml.safe_load(place["claims"].read_text())
    file["claims"] = [*file["claims"][::-1], CLAIM | {"id": "third", "rule": {"below": 0.2}}]
    place["claims"].write_text(yaml.safe_dump(file))
    WINS.sample(frac=1, random_state=0).to_parquet(place["results"] / "small.parquet")
    write(**place)
    again = pd.read_csv(place["results"] / "ledger.csv")
    kept, holm = again[again["id"] != "third"], ["holm", "holm_across"]
    pd.testing.assert_frame_equal(kept.drop(columns=holm), first.drop(columns=holm))
    assert (kept["holm"] > first["holm"]).all()


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- verdicts -->",
        "<!-- end of verdicts -->\n<!-- verdicts -->",
        MARKED + MARKED,
    ],
)
def test_a_readme_without_its_markers_is_left_alone(place, text):
    place["readme"].write_text(text)
    with pytest.raises(ValueError, match="README.md needs a line <!-- verdicts --> and, after it"):
        write(**place)
    assert place["readme"].read_text() == text and not (place["results"] / "ledger.csv").exists()


def test_the_command(place, monkeypatch, capsys):
    for name in ("CLAIMS", "README"):
        monkeypatch.setattr(command, name, place["claims" if name == "CLAIMS" else "readme"])
    monkeypatch.setattr(ledger.paths, "RESULTS", place["results"])
    monkeypatch.setattr("sys.argv", ["ledger", "--check"])
    with pytest.raises(
        SystemExit, match="ledger.csv, VERDICTS.md, README.md: not what claims and tables say now: make ledger"
    ):
        command.main()
    monkeypatch.setattr("sys.argv", ["ledger"])
    command.main()
    printed = capsys.readouterr().out.splitlines()[-4:]
    assert printed[:2] == ["holds: H2O beats random tokens. [one]", "not reproduced here: a | b [another]"]
    assert printed[2].endswith("1 claims of ours and controls: 1 holds (1 of them across families).")
    monkeypatch.setattr("sys.argv", ["ledger", "--check"])
    command.main()
    assert capsys.readouterr().out.splitlines() == printed
    place["readme"].write_text("no markers")
    with pytest.raises(SystemExit, match="README.md needs"):
        command.main()


def test_another_models_verdicts(place, monkeypatch, capsys, tmp_path):
    """From a folder of its own; nothing is written."""
    place["claims"].write_text(as_file(CLAIM | {"models": ["smollm2"]}, CLAIM | {"id": "two", "models": ["minilm"]}))
    monkeypatch.setattr(command, "CLAIMS", place["claims"])
    folder = tmp_path / "own"
    folder.mkdir()
    WINS[WINS["model"] == "minilm"].assign(model="Own-8B").to_parquet(folder / "small.parquet")
    monkeypatch.setattr("sys.argv", ["ledger", "--model", "Own-8B", "--results", str(folder)])
    command.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0].startswith("holds (Own-8B: +0.500 [0.")
    assert printed[1].startswith("- On Own-8B: 1 claims of ours and controls: 1 holds")
    assert [file.name for file in folder.iterdir()] == ["small.parquet"]


# What tables have to hold


@dataclasses.dataclass(frozen=True)
class Made:
    """As much of a study as tells what its table holds."""

    tasks: tuple
    everything: tuple
    models: dict
    length: int = 512
    protocol: str = "asked"

    def samples(self, model, task, configuration):
        return self.models[model]


@pytest.fixture
def asked(tmp_path):
    """Claims that ask for 100 and 200 samples of some of the same cells."""
    host = {"arguments": {"sinks": 0, "host": "h2o"}}
    one = CLAIM | {"protocol": "asked", "samples": 100, "models": ["minilm"]}
    two = one | {"id": "two", "samples": 200, "tasks": ["needle"], "primary": "every budget", "budgets": [0.2, 0.5]}
    two |= {"compare": {"first": {"method": "vatp"} | host, "second": {"method": "h2o", "budget": 0.2}}}
    (tmp_path / "claims.yaml").write_text(as_file(one, two))
    return read(tmp_path / "claims.yaml", tmp_path)


def test_what_claims_need(asked):
    found = needed.needed(asked)
    assert (found[["table", "model", "length", "protocol"]] == ["small", "minilm", 512, "asked"]).all(axis=None)
    vatp = ("vatp", '{"host": "h2o", "sinks": 0}')
    columns = (found[name] for name in ("method", "arguments", "budget", "task", "samples"))
    assert set(zip(*columns)) == {
        ("h2o", "{}", 0.2, "label", 100),
        ("h2o", "{}", 0.2, "needle", 200),  # for the claim that asks for more
        ("random", "{}", 0.2, "label", 100),
        ("random", "{}", 0.2, "needle", 100),
        (*vatp, 0.2, "needle", 200),
        (*vatp, 0.5, "needle", 200),
    }


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, {("h2o", "needle"): 100, ("vatp", "needle"): 100}),  # 100 samples of the 200
        ({"models": {"minilm": 200}}, {}),
        ({"models": {"minilm": 200, "smollm2": 5}}, {}),
        ({"models": {"minilm": 200}, "tasks": ("needle",)}, {("h2o", "label"): 0, ("random", "label"): 0}),
        ({"models": {"minilm": 200}, "length": 1024}, "all"),
        ({"models": {"minilm": 200}, "protocol": "later"}, "all"),
        ({"models": {"smollm2": 200}}, "all"),
    ],
)
def test_what_studies_lack(asked, change, missing):
    """Arguments are the same in any order."""
    sides = [
        ("h2o", 0.2, "{}"),
        ("random", 0.2, "{}"),
        *(("vatp", b, '{"sinks": 0, "host": "h2o"}') for b in (0.2, 0.5)),
    ]
    study = {"tasks": ("needle", "label"), "models": {"minilm": 100}}
    study = Made(everything=tuple(Configuration(*side) for side in sides), **study | change)
    wanted = needed.needed(asked)
    lacking = needed.lacking(wanted, needed.held({"small": study, "other": study}))
    found = {(row.method, row.task): row.held for row in lacking.itertuples()}
    assert found == (missing if missing != "all" else {(row.method, row.task): 0 for row in wanted.itertuples()})
    assert len(needed.lacking(wanted, needed.held({"other": study}))) == len(wanted)


def test_needs_in_words(asked):
    assert needed.listed(needed.needed(asked)) == [
        "small minilm 512 asked, 100 samples of each of label:",
        "    h2o: 0.2",
        "small minilm 512 asked, 100 samples of each of label, needle:",
        "    random: 0.2",
        "small minilm 512 asked, 200 samples of each of needle:",
        "    h2o: 0.2",
        "    vatp (host=h2o, sinks=0): 0.2 0.5",
    ]


def test_exact_lines_are_those_of_similarity_one(judged):
    table = pd.concat(
        [rows("h2o", 10).replace({"value": {0.0: 0.9}}), rows("random", 0).replace({"value": {0.0: 0.99}})]
    )
    one = {"models": ["minilm"], "tasks": ["needle"]}
    assert judged(table, measure="exact", **one)["ours"].startswith("minilm: +0.250 [")
    assert judged(table, **one)["ours"].startswith("minilm: -0.065 [")


# Sides that are models


def of_arm(model, right, method="anchorcoder", protocol="planted"):
    return rows(method, right, model=model, budget=1.0, protocol=protocol)


def side(model, method="anchorcoder", **more):
    return {"method": method, "budget": 1.0, "model": model} | more


ARM = {"models": ["minilm"], "tasks": ["needle"], "protocol": "planted"}


def test_models_are_compared_with_each_other(judged):
    table = pd.concat([of_arm("minilm-T-4", 10), of_arm("minilm-D2", 30), of_arm("minilm-TML-4", 20)])
    row = judged(table, compare={"first": side("minilm-D2"), "second": side("minilm-T-4")}, **ARM)
    assert row["verdict"] == "holds, on this family only" and row["ours"].startswith("minilm: +0.500 [")
    assert "; minilm-D2 under anchorcoder 100% against minilm-T-4 under anchorcoder 100%" in row["scope"]
    row = judged(table, compare={"first": side("minilm-TML-4"), "second": side("minilm-T-4")}, **ARM)
    assert row["ours"].startswith("minilm: +0.250 [")
    row = judged(table, compare={"first": side("minilm-T0"), "second": side("minilm-T-4")}, **ARM)
    assert row["verdict"] == "not testable here"
    assert row["reason"] == "no rows of minilm-T0, anchorcoder at 1, length 512"


def test_sides_of_two_tables(judged, tmp_path, monkeypatch):
    """With protocols of their own, which both have to name."""
    monkeypatch.setattr("kvlib.lab.claims.registered.STUDIES", {"small": None, "other": None})
    others = pd.concat([of_arm("minilm-D1", right, m, "bytes") for m, right in (("h2o", 5), ("full", 40))])
    compare = {"first": side("minilm-T-4"), "second": side("minilm-D1", "h2o", table="other", protocol="bytes")}
    row = judged(of_arm("minilm-T-4", 25), compare=compare, **ARM)
    assert row["reason"] == "there is no table other.parquet yet"
    others.to_parquet(tmp_path / "other.parquet")
    row = judged(of_arm("minilm-T-4", 25), compare=compare, **ARM)
    assert row["ours"].startswith("minilm: +0.500 [") and row["protocol"] == "planted and bytes"
    row = judged(of_arm("minilm-T-4", 25), compare=compare, equal_bytes="stored", **ARM)
    assert plain(row["verdict"]) == "holds"
    others.assign(stored_bytes=900).to_parquet(tmp_path / "other.parquet")
    row = judged(of_arm("minilm-T-4", 25), compare=compare, equal_bytes="stored", **ARM)
    assert row["reason"].startswith("stored bytes are not equal")
    del compare["second"]["protocol"]
    row = judged(of_arm("minilm-T-4", 25), compare=compare, **(ARM | {"protocol": ""}))
    assert row["reason"] == "there are rows of several protocols, and the claim names none"
    compare["first"]["protocol"] = "planted"  # one side is not enough
    assert judged(of_arm("minilm-T-4", 25), compare=compare, **(ARM | {"protocol": ""}))["reason"] == row["reason"]
    row = judged(of_arm("minilm-T-4", 25), compare=compare, **ARM)
    assert row["reason"] == "rows of the protocol planted are not kept"


def test_what_sides_need(tmp_path):
    compare = {"first": side("minilm-T-4"), "second": side("minilm-D1", "h2o", table="small", protocol="bytes")}
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | ARM | {"compare": compare, "samples": 7}))
    cells = needed.needed(read(tmp_path / "claims.yaml", tmp_path))
    found = cells[["model", "method", "protocol", "samples"]].itertuples(index=False, name=None)
    assert sorted(found) == [("minilm-D1", "h2o", "bytes", 7), ("minilm-T-4", "anchorcoder", "planted", 7)]


def test_a_trained_model_is_no_other_model(tmp_path):
    real = {"models": ["smollm2"], "tasks": ["needle"], "protocol": "planted"}
    trained = CLAIM | real | {"id": "trained", "compare": dict.fromkeys(("first", "second"), side("smollm2-D2"))}
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | {"models": ["smollm2"]}, trained))
    claims = read(tmp_path / "claims.yaml", tmp_path)
    assert [(claim.id, claim.models) for claim in ledger.of_model(claims, "mine")] == [("one", ("mine",))]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "minilm-T-5", "unknown model 'minilm-T-5'"),
        ("table", "other", "unknown table 'other'"),
        ("protocol", 3, "protocol is 3, not a text"),
        ("share", 1, "unknown field 'share'"),
    ],
)
def test_sides_that_are_refused(tmp_path, field, value, message):
    compare = {"first": side("minilm-T-4"), "second": side("minilm-D1") | {field: value}}
    (tmp_path / "claims.yaml").write_text(as_file(CLAIM | ARM | {"compare": compare}))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "claims.yaml", tmp_path)


# What is registered


def test_registered_claims(monkeypatch):
    """They are well formed whatever tables there are, and each has a verdict with a reason.

    The committed ledger is as fresh as `make check` says; judging them all anew takes as long as hundreds of tests.
    """
    monkeypatch.undo()
    claims = read()
    assert len(claims) >= 15 and {claim.evidence for claim in claims} <= set(EVIDENCE)
    assert all(claim.primary in PRIMARY and (claim.reason or cells_of(claim, ("needle",))) for claim in claims)
    table = pd.read_csv(paths.RESULTS / "ledger.csv", keep_default_na=False)
    assert sorted(table["id"]) == sorted(claim.id for claim in claims)
    assert set(table["verdict"].map(plain)) <= set(VERDICTS) and (table["reason"] != "").all()


def test_studies_have_the_cells_of_registered_claims(monkeypatch):
    """Or a claim waits for rows that nobody makes; those of an arm are made when it has been trained."""
    monkeypatch.undo()
    claims, trained = read(), pd.read_csv(LISTED)["arm"]
    assert all(claim.protocol and claim.samples and claim.tasks for claim in claims if claim.table)
    lacking = needed.lacking(needed.needed(claims), needed.held(STUDIES))
    lacking = lacking[~lacking["model"].isin(set(ARMS) - set(trained))]
    assert lacking.empty, "\n".join(needed.listed(lacking))
