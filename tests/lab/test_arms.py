"""Models with anchors and others at as many bytes: against single calls, `generate`, and the plain evaluator."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoTokenizer

import kvlib
from kvlib.core.method import budgeted
from kvlib.lab import tasks
from kvlib.lab.evaluation import anchored, arms, evaluate
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.equal_bytes import stored_entries, with_tokens
from kvlib.lab.evaluation.prompts import compressed
from kvlib.methods import anchors
from kvlib.paths import MODELS

LENGTH = 512
ANCHOR, NEWLINE = 3, 202
PLANTED = [Configuration("anchorcoder", 1.0)]
FULL = Configuration("full", 1.0)
BASELINES = [
    Configuration("streaming_llm", 1.0),
    Configuration("streaming_llm", 1.0, '{"sinks": 0}'),
    Configuration("h2o", 1.0),
    Configuration("vatp", 1.0, '{"host": "h2o"}'),
    Configuration("random", 1.0),
    Configuration("snapkv", 1.0),
]
LAYERS, TOKEN_BYTES = 3, 2 * 2 * 8 * 8  # K and V, two KV heads of eight numbers in float64


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm", padding_side="left")


def random_model(**settings):
    """One that writes nonsense, in float64; with anchors if there are settings."""
    model = tiny.build(
        "llama-gqa", vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=LAYERS, bos_token_id=0
    )
    if settings:
        known = {"anchor": ANCHOR, "ends": [NEWLINE], "per": 2, "source": 0, "beyond": 1, "spread": True}
        model.config.anchorcoder = {**known, "longest": 96, **settings}
    return model


@pytest.fixture(scope="module")
def dense():
    return random_model()


# Bytes

TEXTS = {
    "code": "<s>def f(x):\n    return x\n\n\nclass A:\n    y = [1, 2,\n        3]\n",
    "in a line": "<s>import os\nimport sys\nfor each in range(",
    "one line": "<s>a, b = b, a",
    "nothing": "<s>",
    "without BOS": "x = 1\ny = 2",
    "empty first": "\n\nx",
    "long": f"<s>x = [{'1, ' * 120}]\ny = [{'2, ' * 150}",
    "as long as a line": f"<s>{'x' * 3}" + "".join(f"{n}," for n in range(100, 200)),
}


@pytest.mark.parametrize("per", [1, 2, 3, None])
@pytest.mark.parametrize("longest", [96, 8])
def test_bytes_from_the_text_are_those_that_are_stored(tokenizer, per, longest):
    second = {"source": 0, "beyond": 1} if per else {"source": None, "beyond": None}
    model = random_model(per=per, longest=longest, **second)
    for name, text in TEXTS.items():
        ids = anchors.anchored(text, tokenizer, model.config.anchorcoder)
        with kvlib.method("anchorcoder")(model) as run, torch.no_grad():
            model(torch.tensor([ids]))
            entries = stored_entries(text, tokenizer, LAYERS, per, longest)
            assert entries * TOKEN_BYTES == run.stored_bytes(), name


@pytest.mark.parametrize(("per", "share"), [(4, 1.0), (6, 1.0), (4, 0.5)])
def test_no_method_stores_more_than_anchorcoder(tokenizer, dense, per, share):
    """Nor a token less than it could. At the end of the prompt, of which the last token comes after the eviction."""
    asked = [Configuration(c.method, share, c.arguments) for c in BASELINES]
    protocol = f"bytes of per={per}"
    table = anchored.evaluate(
        dense, tokenizer, [FULL, *asked], "needle", 400, range(3), name="", protocol=protocol, block=3
    )
    prompts = [tasks.sample("needle", 400, n, tokenizer=tokenizer) for n in range(3)]
    assert len({stored_entries(p.text, tokenizer, LAYERS, per) for p in prompts}) > 1
    for number, prompt in enumerate(prompts):
        rows = table[table["sample"] == number].set_index("method")
        tokens = sum(map(len, prompt.ids(tokenizer)))
        assert (rows["full_bytes"] == tokens * TOKEN_BYTES * LAYERS).all()
        assert rows.loc["full", "stored_bytes"].item() == tokens * TOKEN_BYTES * LAYERS
        allowed = share * stored_entries(prompt.text, tokenizer, LAYERS, per) * TOKEN_BYTES
        spare = allowed - rows.drop("full")["stored_bytes"]
        assert (spare >= 0).all() and (spare < TOKEN_BYTES * LAYERS).all()


ASKED = [("needle", BASELINES), ("code_bits", BASELINES[5:]), ("next_line", BASELINES[1:4:2])]  # of the rest a few


@pytest.fixture
def short(monkeypatch):
    """Few tokens are written, and of `needle` it is told how many bits its few tokens cost: nonsense is never right."""
    for module in (anchored, evaluate):
        monkeypatch.setattr(module, "NEW_TOKENS", 6)
    monkeypatch.setitem(tasks.CATALOGUE, "needle", replace(tasks.find("needle"), metric="bits"))


@pytest.mark.parametrize("task, configurations", ASKED, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_do_not_depend_on_their_company(tokenizer, dense, short, task, configurations):
    """Whose budgets are others; rows that have ended leave the rest with theirs."""
    options = {"name": "", "protocol": "bytes of per=4"}
    together = anchored.evaluate(dense, tokenizer, configurations, task, LENGTH, range(3), block=3, **options)
    alone = anchored.evaluate(dense, tokenizer, configurations, task, LENGTH, range(3), block=1, **options)
    order = ["method", "arguments", "sample"]
    first, second = (table.sort_values(order, ignore_index=True) for table in (together, alone))
    pd.testing.assert_frame_equal(first, second, rtol=1e-9)
    assert together.groupby("method")["stored_bytes"].nunique().min() > 1


@pytest.mark.parametrize("task, configurations", ASKED, ids=lambda value: value if isinstance(value, str) else "")
def test_values_are_those_of_the_plain_evaluator(tokenizer, dense, short, task, configurations):
    """With as many tokens in its budget."""
    prompt = tasks.sample(task, LENGTH, 1, tokenizer=tokenizer)
    tokens = stored_entries(prompt.text, tokenizer, LAYERS, 4) // LAYERS
    plain = [FULL, *(Configuration(c.method, tokens - (not evicts(c)), c.arguments) for c in configurations)]
    expected = evaluate.evaluate(dense, tokenizer, plain, task, LENGTH, [1], name="")
    found = anchored.evaluate(
        dense, tokenizer, [FULL, *configurations], task, LENGTH, [1], name="", protocol="bytes of per=4"
    )
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist(), rel=1e-9)
    assert found[["divergence", "agreement", *anchored.EXTRA]].isna().all(axis=None)


def evicts(configuration: Configuration) -> bool:
    return configuration.make().evicts_in_decode


def test_budgets_of_rows_follow_them(dense):
    """When rows are dropped and reordered while they are decoded."""
    method = with_tokens(kvlib.method("vatp", budget=0.5, host="h2o"), [5, 9, 14])
    ids = tiny.tokens(3, 30)
    with method(dense) as run, torch.no_grad():
        dense(ids)
        assert [layer.lengths.tolist() for layer in run.cache.layers] == [[[5, 5], [9, 9], [14, 14]]] * LAYERS
        for step, rows in enumerate(([0, 1, 2], [2, 0], [0])):
            run.cache.batch_select_indices(torch.tensor(rows))
            dense(tiny.tokens(len(rows), 1, seed=step), past_key_values=run.cache)
        assert [layer.lengths.tolist() for layer in run.cache.layers] == [[[14, 14]]] * LAYERS


# Anchors

OFTEN = {"ends": [NEWLINE, *range(1000, 2400)], "longest": 5}  # nonsense has line ends, too


def alone(model, ids: list[int], new: int) -> list[int]:
    """What `generate` writes behind one row of ids, with the anchors that it is given."""
    with kvlib.method("anchorcoder")(model):
        ids, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)  # BOS is no padding
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[0, len(ids[0]) :].tolist()


def read_by(model, tokenizer, task: str) -> tuple[list, list[list[int]]]:
    """Three prompts and their ids, of different lengths."""
    drawn = [tasks.sample(task, LENGTH + 16 * n, n, tokenizer=tokenizer) for n in range(3)]
    ids = [anchors.anchored(prompt.text, tokenizer, model.config.anchorcoder) for prompt in drawn]
    assert len(set(map(len, ids))) > 1
    return drawn, ids


@pytest.fixture
def planting():
    return random_model(**OFTEN)


def test_forced_choices_are_what_generate_writes(tokenizer, planting, monkeypatch):
    """Along the right answer, which is here what the model itself writes; in one pass and token by token."""
    drawn, ids = read_by(planting, tokenizer, "needle")
    written = [alone(planting, row, 20 - 3 * n) for n, row in enumerate(ids)]
    written = [row[:-1] if row[-1] == ANCHOR else row for row in written]  # it would belong to the answer
    assert all(row.count(ANCHOR) > 1 for row in written)
    monkeypatch.setattr(arms, "behind", lambda prompt, *_: written[prompt.seed][:-1])
    seen = []
    monkeypatch.setattr(anchored, "judge", lambda _, answer, chosen, *rest: seen.append(chosen) or 1.0)
    asked = arms.asked_of(planting, tokenizer, drawn)
    for window in (1024, max(map(len, ids)) + 1):
        monkeypatch.setattr(planting.config, "max_position_embeddings", window)
        anchored.score(kvlib.method("anchorcoder"), asked, tokenizer)
    assert [chosen[: len(row)] for chosen, row in zip(seen, 2 * written)] == 2 * written


def test_texts_are_what_generate_writes(tokenizer):
    """The first row ends first; anchors stand at other places of every row, as far as they depend on what stands far
    before; and left to itself the model would write anchors and nothing else.
    """
    model = random_model(longest=5)
    model.lm_head.register_forward_hook(lambda module, given, out: out.index_fill(-1, torch.tensor(ANCHOR), 99.0))
    drawn, ids = read_by(model, tokenizer, "needle")
    written = [alone(model, row, most) for row, most in zip(ids, (7, 17, 12))]
    written = [row[:-1] if row[-1] == ANCHOR else row for row in written]  # it changes no text
    assert len({row.index(ANCHOR) for row in written}) > 1 and len(set(map(len, written))) == 3
    expected = [tokenizer.decode([token for token in row if token != ANCHOR]) for row in written]
    asked = arms.asked_of(model, tokenizer, drawn)
    with compressed(asked.prompts, kvlib.method("anchorcoder")) as read, torch.no_grad():
        texts = anchored.written(read, read.logits, asked, 20, tokenizer, lambda text: text in expected)
    assert texts == expected


def test_lines_end_where_they_are_decided(tokenizer, planting, monkeypatch):
    texts = []
    monkeypatch.setattr(tasks, "score", lambda prompt, text: texts.append(text) or 1.0)
    monkeypatch.setattr(anchored, "is_decided", lambda text: len(text) > 9)
    drawn, ids = read_by(planting, tokenizer, "next_line")
    anchored.score(kvlib.method("anchorcoder"), arms.asked_of(planting, tokenizer, drawn), tokenizer)
    for text, row in zip(texts, ids):
        tokens = [token for token in alone(planting, row, 20) if token != ANCHOR]
        assert text == next(t for n in range(20) if len(t := tokenizer.decode(tokens[:n])) > 9)


@pytest.mark.parametrize("planted", [True, False])
def test_what_is_written_ends_with_the_window(tokenizer, dense, planting, monkeypatch, planted):
    """Of every row for itself."""
    model = planting if planted else dense
    drawn, ids = read_by(planting, tokenizer, "next_line")
    counts = list(map(len, ids)) if planted else [sum(map(len, prompt.ids(tokenizer))) for prompt in drawn]
    monkeypatch.setattr(model.config, "max_position_embeddings", max(counts) + 1)
    limits, plain = [], anchored.greedy
    monkeypatch.setattr(anchored, "greedy", lambda *given: limits.append(given[4]) or plain(*given))
    monkeypatch.setattr(anchored, "NEW_TOKENS", 4)
    method = kvlib.method("anchorcoder" if planted else "full")
    anchored.score(method, arms.asked_of(model, tokenizer, drawn), tokenizer)
    assert limits == [[min(4, max(counts) + 2 - count) for count in counts]] and min(limits[0]) == 2


def test_right_and_wrong_by_hand(tokenizer):
    prompt = tasks.sample("needle", LENGTH, 0, tokenizer=tokenizer)
    answer = prompt.answer_ids(tokenizer)
    (one,), (newline,) = (tokenizer(text, add_special_tokens=False).input_ids for text in ("1", "\n"))
    for anchor, right in ((None, answer), (ANCHOR, [answer[0], ANCHOR, *answer[1:]])):
        for chosen, value in (([*right, newline, one], 1), ([*right, one, one], 0), ([*right[:-1], newline, one], 0)):
            assert anchored.judge(prompt, right, chosen, tokenizer, anchor) == value
    assert anchored.text_of([one, newline, one], tokenizer, newline) == "11"  # an anchor that is no special token


@pytest.mark.parametrize("task", ["code_bits", "code_bits_unbroken", "needle"])
def test_what_anchors_cost(tokenizer, planting, task):
    """Against one pass over text and answer."""
    table = anchored.evaluate(planting, tokenizer, PLANTED, task, LENGTH, range(3), name="", block=3)
    for number, row in table.iterrows():
        prompt = tasks.sample(task, LENGTH, number, tokenizer=tokenizer)
        ids = anchors.anchored(prompt.text + prompt.answer, tokenizer, planting.config.anchorcoder)
        with kvlib.method("anchorcoder")(planting), torch.no_grad():
            logits = planting(torch.tensor([ids])).logits[0]
        begin = len(anchors.anchored(prompt.text, tokenizer, planting.config.anchorcoder))
        own, free, due, missed, spurious, others = 0.0, 0.0, 0.0, [], [], 0
        for place in range(begin, len(ids)):
            scores = logits[place - 1].tolist()
            total = math.log(sum(map(math.exp, scores)))
            cost, best = total - scores[ids[place]], scores.index(max(scores))
            free += cost
            if ids[place] == ANCHOR:
                due += cost
                missed.append(best != ANCHOR)
            else:
                scores.pop(ANCHOR)
                own += cost - total + math.log(sum(map(math.exp, scores)))
                spurious.append(best == ANCHOR)
                others += 1
        assert row["missed"] == sum(missed) / len(missed) and row["spurious"] == sum(spurious) / others
        assert row["anchor_nats"] == pytest.approx(due)
        if task != "needle":
            bit = math.log(2) * len(prompt.answer)
            assert row["value"] == pytest.approx(own / bit) and row["free_bits"] == pytest.approx(free / bit)
        else:
            assert math.isnan(row["free_bits"])
        assert row["stored_bytes"] == stored(planting, ids[:begin])
        assert row["full_bytes"] == sum(map(len, prompt.ids(tokenizer))) * TOKEN_BYTES * LAYERS  # without anchors


def stored(model, ids: list[int]) -> int:
    with kvlib.method("anchorcoder")(model) as run, torch.no_grad():
        model(torch.tensor([ids]))
        return run.stored_bytes()


def test_choices_that_are_missed_and_invented():
    answers, first = [[5, 3, 6], [7], [3]], [[3, 3, 9, 1], [7, 3], [4, 4]]
    found = anchored.emission(answers, [[1.0, 0.5, 2.0, 9.0], [1.0, 9.0], [0.25, 9.0]], first, anchor=3)
    assert found["missed"] == pytest.approx([0, math.nan, 1], nan_ok=True)
    assert found["spurious"] == pytest.approx([0.5, 0, math.nan], nan_ok=True)
    assert found["anchor_nats"] == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)


@pytest.mark.parametrize("task", ["cross_file_line", *tasks.UNBROKEN])
def test_every_model_reads_the_same_text(tokenizer, dense, planting, task):
    drawn = [tasks.sample(task, LENGTH, n, tokenizer=tokenizer) for n in range(2)]
    texts = []
    for model in (dense, planting):
        asked = arms.asked_of(model, tokenizer, drawn)
        rows = [row[mask > 0].tolist() for row, mask in zip(asked.prompts.ids, asked.prompts.mask)]
        if asked.rest is not None:
            rows = [[*row, *more] for row, more in zip(rows, asked.rest[0].tolist())]
        texts.append([tokenizer.decode([t for t in row if t != ANCHOR]) for row in rows])
        assert asked.tokens == [sum(map(len, p.ids(tokenizer))) for p in drawn]
        assert asked.counts == [len(row) for row in rows]
    assert texts[0] == texts[1] == [prompt.text for prompt in drawn]


def test_answers_that_join_the_text_are_refused(tokenizer, planting):
    prompt = tasks.Prompt("needle", 7, "<s>def f():\n", "    ", "retur", ("n x",), 0)
    with pytest.raises(ValueError, match="needle, seed 7: a token spans the text and the answer 'n x'"):
        arms.asked_of(planting, tokenizer, [prompt]).answers(tokenizer)


@pytest.mark.parametrize(
    "settings, configurations, task, length, protocol, said",
    [
        (OFTEN, PLANTED, "needle", LENGTH, "asked", "protocol='asked': planted or bytes of per=4"),
        (OFTEN, PLANTED, "needle", 1025, "planted", "window is 1024"),
        (OFTEN, [FULL], "needle", LENGTH, "bytes of per=4", "have 'planted', and only they"),
        ({}, PLANTED, "needle", LENGTH, "planted", "have 'planted', and only they"),
        (OFTEN, [FULL], "needle", LENGTH, "planted", "the method is anchorcoder"),
        (OFTEN, PLANTED, "prose_bits", 1025, "planted", "window is 1024"),
        (OFTEN, PLANTED, "all_numbers", LENGTH, "planted", "all_numbers is judged by 'share', not by 'exact'"),
    ],
)
def test_what_cannot_be_asked(tokenizer, settings, configurations, task, length, protocol, said):
    with pytest.raises(ValueError, match=said):
        anchored.evaluate(
            random_model(**settings), tokenizer, configurations, task, length, [0], name="", protocol=protocol
        )


# Configurations


def test_methods_without_a_budget_are_made_without():
    assert "anchorcoder" not in budgeted()
    assert Configuration("anchorcoder", 1.0, '{"forced": false}').make() == kvlib.method("anchorcoder", forced=False)
    assert Configuration("snapkv", 1.0).make() == kvlib.method("snapkv", budget=1.0)
    assert Configuration("h2o", 0.25).make().budget == 0.25
    with pytest.raises(TypeError):
        Configuration("anchorcoder", 0.5).make()
    with pytest.raises(ValueError, match="unknown method"):
        Configuration("nothing", 1.0).make()
