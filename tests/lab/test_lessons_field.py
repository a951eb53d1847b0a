"""What lessons 90 and 90b compare: joined tables, shares, fronts, paired differences, maps by depth."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_exercises import refused

import kvlib
from kvlib.lab import statistics, tasks
from kvlib.lab.lessons import field
from kvlib.lab.lessons.exercises import lesson_90
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.summaries import named
from kvlib.lab.tasks.natural.words import GOLDEN


@pytest.fixture(scope="module")
def asked() -> pd.DataFrame:
    return field.rows("asked")


@pytest.mark.parametrize("kind", field.TABLES)
def test_all_settings_have_answered_the_same_prompts(kind):
    found, study = field.rows(kind), STUDIES[field.TABLES[kind][0]]
    prompts = found.groupby(field.CELL)[["task", "sample"]].apply(lambda cell: frozenset(map(tuple, cell.to_numpy())))
    (samples,) = study.models.values()
    assert prompts.nunique() == 1 and prompts.iloc[0] == {(t, n) for t in study.tasks for n in range(samples)}
    assert found["model"].nunique() == 1 and found["protocol"].nunique() == 1
    assert not found.duplicated([*field.CELL, "task", "sample"]).any()


def test_no_control_of_another_lesson_is_in_the_comparison(asked):
    own = {named(pd.DataFrame([vars(c)]))["configuration"].iloc[0] for c in STUDIES["90_real"].everything}
    assert set(asked["configuration"]) == own | {*field.OLDER} - {"adakv"}  # whose window there is 8


def test_every_method_of_the_comparison_has_a_kind(asked):
    kinds = [name for names in field.KINDS.values() for name in names.split()]
    assert len(kinds) == len(set(kinds)) and set(kinds) <= set(kvlib.METHODS)
    assert set(asked["method"]) - {"full"} <= set(kinds)


def test_a_share_is_measured_in_16_bits_where_codes_are_stored(asked):
    shares = field.shares(asked)
    assert shares["full", 1.0] == 1 and shares["snapkv", 0.2] == pytest.approx(0.2, abs=0.001)
    wide = asked.query("configuration == 'int8'")
    assert shares["int8", 1.0] == pytest.approx((64 + 2) / 128, abs=1e-3)  # 64 codes and a scale of 16 bits
    assert wide["stored_bytes"].sum() / wide["full_bytes"].sum() < 0.3  # of 32 bits


def test_a_summary_is_the_mean_of_family_means_and_knows_its_settings(asked):
    some = asked[asked["configuration"].isin(["kvzip", "full"])]
    found = field.summary(some)
    part = some.query("configuration == 'kvzip' and budget == 0.2").groupby("task")["value"].mean().mean()
    row = found.loc["kvzip", 0.2]
    assert row["mean"] == pytest.approx(part) and row["low"] < row["mean"] < row["high"]
    assert (row["label"], row["kind"], row["method"]) == ("KVzip", "a second reading", "kvzip")


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("kvzip", {}, "KVzip"),
        ("kvzip", {"prompt_ids": [1, 2]}, "KVzip, asked to repeat"),
        ("kivi", {}, "KIVI, 2 bits"),
        ("kivi", {"bits": 4}, "KIVI, 4 bits"),
        ("think", {"ratio": 0.7}, "ThinK, 30% of keys"),
        ("cskv", {"keys": 0.75, "values": 0.75, "calibration": "x"}, "CSKV, 75%, activations"),
        ("kvsharer", {"pairs": "x"}, "KVSharer, dissimilar first"),
        ("kvsharer", {"pairs": "x", "order": "random"}, "KVSharer, random first"),
        ("combined", {"evictor": "snapkv", "store": "kivi"}, "SnapKV + KIVI, 2 bits"),
        ("combined", {"evictor": "snapkv", "reader": "loki", "read": 0.1}, "SnapKV + read by Loki"),
        ("vatp", {"host": "h2o"}, "VATP on H2O"),
        ("adakv", {"window": 8}, "Ada-KV"),
        ("snapkv", {"window": 8, "kernel": 15}, "SnapKV, tuned"),
        ("zipvl", {"tau": 0.5}, "ZipVL's rule, τ = 0.5"),
        ("tidaldecode", {"heads": "all"}, "TidalDecode, heads=all"),
    ],
)
def test_settings_as_in_print(method, arguments, expected):
    assert field.label(method, json.dumps(arguments)) == expected


def test_labels_tell_the_settings_of_a_budget_apart(asked):
    labels = field.summary(asked.drop_duplicates([*field.CELL, "task"])).reset_index()
    assert not labels.duplicated(["label", "budget", "share"]).any()


points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9, unique=True)


@given(points)
def test_the_front_is_what_nothing_beats(settings):
    table = pd.DataFrame(settings, columns=["share", "mean"])
    found = {tuple(row) for row in field.front(table).itertuples(index=False)}
    assert found == {
        one for one in settings if not any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in settings)
    }


def small() -> pd.DataFrame:
    """Two families of four prompts, answered by three settings."""
    right = {"a": [1, 1, 0, 1, 1, 0, 0, 0], "b": [0, 1, 0, 1, 0, 0, 0, 1], "c": [1] * 8}
    return pd.DataFrame(
        [
            {"configuration": name, "budget": 0.5, "task": "xy"[i // 4], "sample": i % 4, "value": float(value)}
            for name, values in right.items()
            for i, value in enumerate(values)
        ]
    )


def test_differences_are_paired_and_corrected():
    pairs = {"a − b": (("a", 0.5), ("b", 0.5)), "a − c": (("a", 0.5), ("c", 0.5))}
    found = field.differences(small(), pairs)
    assert found["value"].tolist() == [12.5, -50] and found[["more", "fewer"]].to_numpy().tolist() == [[2, 1], [0, 4]]
    alone = [statistics.paired_difference([[1, 1, 0, 1], [1, 0, 0, 0]], other) for other in OTHERS]
    assert found["low"].tolist() == pytest.approx([100 * gap.low for gap in alone])
    assert found["p"].tolist() == statistics.holm([min(g.above(0), g.below(0)) for g in alone]).tolist()


OTHERS = ([[0, 1, 0, 1], [0, 0, 0, 1]], [[1] * 4, [1] * 4])


def test_maps_by_family_and_by_depth():
    cells = {"A": ("a", 0.5), "C": ("c", 0.5)}
    assert field.by_family(small(), cells).to_numpy().tolist() == [[75, 25], [100, 100]]
    table = small().replace({"task": {"x": "number", "y": "saying"}})  # depths of samples 0 to 3: 0, .62, .24, .85
    found = field.by_depth(table, cells, 2)
    assert list(found) == ["0–50 %", "50–100 %"] and found.loc["A"].tolist() == [50, 100]


@pytest.mark.parametrize("task", field.ONE_PLACE)
def test_answers_stand_where_the_samples_number_says(task):
    tokenizer = kvlib.load("minilm")[1]
    for number in (2, 5):
        prompt = tasks.sample(task, 2048, number, tokenizer=tokenizer)
        answer = prompt.answer.strip()
        at = prompt.context.index(answer)
        assert at / len(prompt.context) == pytest.approx(number * GOLDEN % 1, abs=0.1)


def test_drawings_have_a_point_for_every_setting(asked):
    found = field.summary(asked[asked["configuration"].isin(["full", "kvzip", "h2o"])])
    figure, (left, right) = plt.subplots(1, 2)
    field.draw(left, found, {"kvzip": "kvzip", "nobody": "h2o"})
    assert len(left.lines[0].get_xdata()) == len(found) - 1
    some = found.drop(index="full", level="configuration")
    field.beside(right, {"one": some, "other": some}, found.loc["full", 1.0])
    assert [tick.get_text() for tick in right.get_yticklabels()] == some["label"].tolist()
    plt.close(figure)


# Exercises


def share(bits, group, tokens, raw):
    return (1 - raw / tokens) * (bits + 32 / group) / 16 + raw / tokens


def front(settings):
    return lesson_90.unbeaten(settings)


def honest(values):
    best = max(values, key=lambda name: lesson_90.mean(values[name][0::2]))
    return best, lesson_90.mean(values[best][0::2]), lesson_90.mean(values[best][1::2])


def test_right_answers_of_90_pass(capsys):
    lesson_90.check_share(share)
    lesson_90.check_front(front)
    lesson_90.check_honest(honest)
    assert capsys.readouterr().out == "share is right\nfront is right\nhonest is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "share returned None"),
        (lambda b, g, n, r: (1 - r / n) * b / 16 + r / n, "a scale and a zero of 16 bits each"),
        (lambda b, g, n, r: share(b, 2 * g, n, r), "two numbers of 16 bits a group"),
        (lambda b, g, n, r: share(b, 1, n, r), "shared by the entries of a group"),
        (lambda b, g, n, r: share(b, g, n, 0), "the newest tokens stay in 16 bits"),
        (lambda b, g, n, r: share(b, g, n, 0) + r / n, "tokens that stay in 16 bits have no codes"),
        (lambda b, g, n, r: (1 - r / n) * (b + 32 / g) / 32 + r / n, "the full cache has 16 bits an entry"),
        (lambda *a: 1 - share(*a), "what is stored, not what is saved"),
        (lambda *a: 16 * share(*a), "a share of the 16 bits"),
        (lambda *a: share(*a) + 0.01, "is expected, found"),
    ],
)
def test_wrong_shares(answer, message):
    refused(lesson_90.check_share, message, answer)


def weakly(settings):
    kept = [x for x in settings if not any(y[1] < x[1] and y[2] > x[2] for y in settings)]
    return [name for name, *_ in sorted(kept, key=lambda x: x[1])]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s: None, "front returned None"),
        (lambda s: s.sort() or front(s), "changes its argument"),
        (lambda s: [x for x in s if x[0] in front(s)], "names are expected"),
        (weakly, "with as many answers fewer bytes beat more"),
        (lambda s: [max(s, key=lambda x: x[2])[0]], "fewer bytes are worth something"),
        (lambda s: [min(s, key=lambda x: x[1])[0]], "the smallest one is not all"),
        (lambda s: [x[0] for x in s if x[0] not in front(s)], "these are the beaten ones"),
        (lambda s: front(s)[::-1], "in the order of their bytes"),
        (lambda s: [name for name, *_ in s], "are expected, found"),
    ],
)
def test_wrong_fronts(answer, message):
    refused(lesson_90.check_front, message, answer)


def chosen_by(part):
    def answer(values):
        best = max(values, key=lambda name: lesson_90.mean(part(values[name])))
        return best, lesson_90.mean(values[best][0::2]), lesson_90.mean(values[best][1::2])

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda v: None, "honest returned None"),
        (lambda v: [each.sort() for each in v.values()] and honest(v), "changes its argument"),
        (lambda v: honest(v)[0], "three values are expected"),
        (chosen_by(lambda each: each), "asked of the even prompts alone"),
        (chosen_by(lambda each: each[1::2]), "best on the odd prompts"),
        (chosen_by(lambda each: [-x for x in each[0::2]]), "that is the worst"),
        (lambda v: (honest(v)[0], honest(v)[2], honest(v)[1]), "first the mean where it was chosen"),
        (lambda v: (honest(v)[0], honest(v)[1], honest(v)[1]), "the second mean is over the odd prompts"),
        (lambda v: (*honest(v)[:2], lesson_90.mean(v[honest(v)[0]])), "over the odd prompts alone"),
        (lambda v: (*honest(v)[:2], max(lesson_90.mean(x[1::2]) for x in v.values())), "not the best of the odd"),
        (lambda v: (*honest(v)[:2], 0.123), "are expected, found"),
    ],
)
def test_wrong_winners(answer, message):
    refused(lesson_90.check_honest, message, answer)
