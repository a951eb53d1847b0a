"""The attention study of lesson 03 by hand and by loops, and its drawings against the masks of training."""

import keyword
import math
import tokenize

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import tiny
import torch
from anchored import Anchored, places
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import kvlib
from kvlib import paths
from kvlib.lab.lessons import anchor_drawings, attention_maps, excerpts, sparsity
from kvlib.methods.anchors import plant

ANCHOR, NEWLINE = 3, 202  # of minilm
DENSE = {"anchor": ANCHOR, "per": 1, "spread": False}
CODE = '''@cached
def f(x, *, so=1):
    """One.

    Two."""
    return x[0] + so_f(f"{x} in {so}")  # in
'''


@pytest.fixture(scope="module")
def minilm():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm")


def everything(rows: int, slots: int) -> torch.Tensor:
    return torch.ones(rows, slots, dtype=torch.bool)


# Concentration


@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_gini_is_the_mean_difference(values, chosen):
    """Half the mean absolute difference of two weights, in units of their mean; what is not seen plays no part."""
    kept = [value for value, keep in zip(values, chosen) if keep]
    seen = torch.tensor([chosen[: len(values)]])
    found = sparsity.gini(torch.tensor([values], dtype=torch.float64), seen)
    if not kept:
        assert found.isnan().all()
        return
    n = len(kept)
    expected = sum(abs(x - y) for x in kept for y in kept) / (2 * n * sum(kept))
    assert found.item() == pytest.approx(expected, abs=1e-12)
    two = sum(sorted(kept)[-2:]) / sum(kept)
    assert sparsity.largest(torch.tensor([values]), seen).item() == pytest.approx(two, abs=1e-6)


def test_ends_of_the_scale():
    for n in (2, 5, 40):
        rows = torch.stack([torch.full((n,), 1 / n), torch.eye(n)[n // 2]])
        assert sparsity.gini(rows, everything(2, n)).tolist() == pytest.approx([0, 1 - 1 / n], abs=1e-6)
        at = torch.arange(n)
        found = sparsity.Rows(rows[None, 1:], everything(1, n), at, at[-1:])
        table = sparsity.concentration([found], torch.zeros(n, dtype=torch.int64))
        assert table["corrected"][0] == table["two"][0] == pytest.approx(1)


def test_concentration_of_rows_by_hand():
    """Two heads and three queries in two lines; token 0 takes most of head 0, and tokens 0 and 1 are the first line."""
    weights = torch.tensor([
        [[0.7, 0.2, 0.1, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1, 0.0], [0.6, 0.1, 0.1, 0.1, 0.1]],
        [[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]],
    ])  # fmt: skip
    at, queries = torch.arange(5), torch.tensor([2, 3, 4])
    rows = sparsity.Rows(weights / weights.sum(-1, keepdim=True), at <= queries[:, None], at, queries)
    table = sparsity.concentration([rows], torch.tensor([0, 0, 1, 1, 2])).set_index(["selection", "head"])
    assert table.loc[("all", 1), "gini"] == pytest.approx(0, abs=1e-6)
    assert table.loc[("all", 0), "two"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert table.loc[("without the first", 0), "two"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    late = [(0.2 - 0.1) / (2 * 0.3), 0.0, 0.0]  # of two weights: their difference over twice their sum
    assert table.loc[("without the first", 0), "gini"] == pytest.approx(sum(late) / 3)
    assert table.loc[("without the first", 0), "corrected"] == pytest.approx(2 * late[0] / 3)
    assert table.loc[("earlier lines", 0), "two"] == pytest.approx(2 / 3)  # of the last query: others see one token


def test_enrichment_by_hand():
    weights = torch.tensor([[[0.5, 0.3, 0.1, 0.1]], [[0.7, 0.1, 0.2, 0.0]]])
    rows = sparsity.Rows(weights, everything(1, 4), torch.arange(4), torch.tensor([3]))
    classes = ["first", "identifier", "newline", "identifier"]
    table = sparsity.enrichment([rows], classes, sparsity.line_numbers(classes)).set_index(["selection", "class"])
    assert table.loc[("all", "identifier")].tolist()[1:] == pytest.approx([0.25, 0.5, 0.5])
    assert table.loc[("all", "first")].tolist()[1:] == pytest.approx([0.6, 0.25, 2.4])
    assert table.loc[("without the first", "newline"), "mass"] == pytest.approx((0.1 / 0.5 + 0.2 / 0.3) / 2)
    assert table.loc[("earlier lines", "identifier"), "mass"] == pytest.approx((0.3 / 0.4 + 0.1 / 0.3) / 2)
    assert ("earlier lines", "first") not in table.index and ("all", "anchor") not in table.index
    for _, part in table.groupby("selection"):
        assert part[["mass", "expected"]].sum().tolist() == pytest.approx([1, 1])


# Attention


def test_dense_rows_are_those_of_the_stock_model():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 20)
    ids = ids.masked_fill(ids == ANCHOR, 1)
    found = sparsity.watch(model, ids[0].tolist(), kvlib.method("anchorcoder", **DENSE), first=2, every=3)
    snapshot = kvlib.snapshot(model, ids)
    assert len(found) == 2
    for layer, rows in enumerate(found):
        expected = attention_maps.attention_map(snapshot, layer)[:, 2::3]
        torch.testing.assert_close(rows.weights.double(), expected, rtol=0, atol=1e-12)
        assert rows.queries.tolist() == [2, 5, 8, 11, 14, 17] and rows.at.tolist() == list(range(20))
        assert torch.equal(rows.seen, rows.at <= rows.queries[:, None])


@pytest.mark.parametrize("per", [2, None])
def test_anchored_rows_are_those_of_the_training_mask(per):
    settings = {"per": per, "source": 0, "beyond": 1}
    model, ids = tiny.build("llama-gqa", num_hidden_layers=4), tiny.tokens(1, 24, seed=3)
    ids = ids.masked_fill(ids == ANCHOR, 1)
    ids[0, [5, 6, 14, 20]] = ANCHOR
    oracle = Anchored(model, ids, ANCHOR, **settings)
    found = sparsity.watch(model, ids[0].tolist(), kvlib.method("anchorcoder", anchor=ANCHOR, **settings), first=1)
    for layer, rows in enumerate(found):
        expected = oracle.weights[layer][0, :, 1 :: sparsity.EVERY]
        torch.testing.assert_close(rows.weights, expected, rtol=0, atol=1e-12)
        assert torch.equal(rows.seen, (expected > 0).all(0))
        assert rows.at.tolist() == (1 + (layer > 1)) * list(range(24))


# Tokens of code


def test_every_character_has_a_class():
    kinds = sparsity.character_classes(CODE)
    of = {kind: "".join(c for c, k in zip(CODE, kinds) if k == kind) for kind in sparsity.CLASSES}
    assert of["newline"] == 6 * "\n" and of["indentation"] == 12 * " "
    assert of["bracket"] == "()[]()" and of["operator"] == "@,*,=:+"
    assert of["keyword"] == "defreturn" and of["identifier"] == "cachedfxsoxso_f"
    assert of["other"] == '1"""One.Two."""0f"{x}in{so}"#in'  # an f-string is text
    assert not of["first"] and not of["anchor"]
    assert [c for c, kind in zip(CODE, kinds) if kind is None] == [" "] * kinds.count(None)


def test_f_strings_are_text_for_tokenizers_that_look_into_them(monkeypatch):
    """Python 3.12 splits f"{x}" + y into parts, Python 3.11 does not."""
    names = dict(enumerate(("FSTRING_START", "FSTRING_END"), start=1000))
    monkeypatch.setattr(tokenize, "tok_name", tokenize.tok_name | names)
    parts = [(1000, 'f"', 0), (tokenize.OP, "{", 2), (tokenize.NAME, "x", 3), (tokenize.OP, "}", 4), (1001, '"', 5)]
    parts += [(tokenize.OP, "+", 7), (tokenize.NAME, "y", 9)]
    stream = [tokenize.TokenInfo(kind, text, (1, at), (1, at + len(text)), "") for kind, text, at in parts]
    monkeypatch.setattr(tokenize, "generate_tokens", lambda readline: stream)
    expected = [*6 * ["other"], None, "operator", None, "identifier"]
    assert sparsity.character_classes('f"{x}" + y') == expected


@pytest.mark.parametrize("by_line", [False, True])
def test_tokens_have_the_class_of_what_they_say(minilm, by_line):
    ids, classes = sparsity.token_classes(CODE, minilm, by_line)
    assert ids == minilm(CODE).input_ids and len(ids) == len(classes) and classes[0] == "first"
    named = [(minilm.decode([token]), name) for token, name in zip(ids, classes)]
    assert named[1] == ("@", "operator") and [text for text, name in named if name == "newline"] == 6 * ["\n"]
    assert {text for text, name in named if name == "keyword"} == {"def", "return"}
    assert {text for text, name in named if name == "indentation"} == {"    "}
    assert all(not text.strip() or not keyword.iskeyword(text) for text, name in named if name == "identifier")


def test_tokens_that_span_several_things():
    """Most of the characters decide, the first of equally many, and blanks only where there is nothing else."""
    assert sparsity.class_of(["bracket", "operator"]) == "bracket"
    assert sparsity.class_of([None, "bracket", "operator", "operator"]) == "operator"
    assert sparsity.class_of(["newline", "indentation", "indentation"]) == "newline"
    assert sparsity.class_of(["newline", "keyword"]) == "keyword"
    assert sparsity.class_of([None]) == sparsity.class_of([]) == "other"


def test_merged_newlines_end_lines_too():
    """SmolLM2 joins a newline with the indentation behind it, and has no token before the text's first."""
    tokenizer = kvlib.load("smollm2")[1]
    ids, classes = sparsity.token_classes(CODE, tokenizer)
    assert ids == tokenizer(CODE).input_ids and "indentation" not in classes
    assert classes[:3] == ["first", "identifier", "newline"]  # @, cached, and the end of the line
    assert classes.count("newline") == 5  # a blank line shares its newline with the one before
    _, classes = sparsity.token_classes(CODE, tokenizer, by_line=True)
    assert classes.count("newline") == 6 and "indentation" in classes


def test_lines_end_with_anchors_or_newlines(minilm):
    ids, classes = sparsity.token_classes(CODE, minilm)
    numbers = sparsity.line_numbers(classes).tolist()
    texts = [minilm.decode([token]) for token in ids]
    assert numbers == [sum(text.count("\n") for text in texts[:i]) for i in range(len(texts))]
    planted = plant(ids, ANCHOR, {NEWLINE})
    with_anchors = sparsity.with_anchors(classes, planted, ANCHOR)
    assert [name for name in with_anchors if name != "anchor"] == classes and with_anchors.count("anchor") == 6
    anchored = sparsity.line_numbers(with_anchors).tolist()
    assert [number for number, token in zip(anchored, planted) if token != ANCHOR] == numbers
    assert [number for number, token in zip(anchored, planted) if token == ANCHOR] == list(range(6))


# A study of several texts


def test_a_study_reads_with_anchors_what_was_trained_with_them(minilm):
    """The same texts: once as they are, once with an anchor behind each line and behind eight tokens."""
    texts = {"one": 12 * CODE, "two": CODE + 12 * "\nvalue = f(7)\n"}
    model = tiny.build("llama-gqa", vocab_size=4096, bos_token_id=0)
    plain, enriched = sparsity.study(model, minilm, texts, 60)
    assert set(plain["text"]) == set(texts) and set(plain["layer"]) == {0, 1} and len(plain) == 2 * 2 * 4 * 3
    assert not enriched["class"].eq("anchor").any()
    model.config.anchorcoder = {"anchor": ANCHOR, "ends": [NEWLINE], "per": 2, "source": None, "beyond": None,
                                "spread": True, "longest": 8}  # fmt: skip
    _, enriched = sparsity.study(model, minilm, texts, 60)
    ids = plant(minilm(texts["one"]).input_ids[:60], ANCHOR, {NEWLINE}, 8)
    rows = sparsity.watch(model, ids, kvlib.method("anchorcoder"))[0]
    anchors = torch.tensor([token == ANCHOR for token in ids])
    here = enriched.query("text == 'one' and layer == 0 and selection == 'all'").set_index("class")
    assert here.loc["anchor", "mass"] == pytest.approx(rows.weights[..., anchors].sum(-1).mean().item())
    assert set(enriched.query("layer == 1 and selection == 'earlier lines'")["class"]) == {"anchor"}


COLUMNS = ["text", "layer", "mass", "expected"]


def test_classes_of_several_layers_and_texts_by_hand():
    shares = {("a", 0): (0.2, 0.1), ("a", 1): (0.4, 0.1), ("a", 2): (0.9, 0.1)}
    shares |= {("b", 0): (0.1, 0.2), ("b", 1): (0.1, 0.2), ("b", 2): (0.9, 0.2)}
    table = pd.DataFrame([(*place, *share) for place, share in shares.items()], columns=COLUMNS)
    table = table.assign(selection="all", **{"class": "newline"})
    (row,) = sparsity.by_class(table, [0, 1]).to_dict("records")
    assert row["mass"] == pytest.approx(0.2) and row["expected"] == pytest.approx(0.15)
    assert [row[name] for name in ("enrichment", "low", "high")] == pytest.approx([0.2 / 0.15, 0.5, 3.0])
    assert sparsity.by_class(table)["mass"].item() == pytest.approx((0.5 + 1.1 / 3) / 2)
    _, axes = plt.subplots()
    anchor_drawings.enriched(
        axes, sparsity.by_class(table, [0, 1]), ["keyword", "newline"], {"all": "all that is seen"}
    )
    (line, _, (bars,)), *_ = axes.containers
    assert line.get_xdata()[1] == pytest.approx(0.2 / 0.15) and line.get_label() == "_nolegend_"
    assert bars.get_segments()[-1][:, 0].tolist() == pytest.approx([0.5, 3.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["keyword", "newline"]
    plt.close("all")


# Drawings

MARKED = torch.tensor([True, False, False, True, False, True, True, False])


def colours(axes) -> list:
    return axes.images[0].get_array().tolist()


@pytest.mark.parametrize("full", [False, True])
def test_drawn_masks_are_those_of_training(full):
    _, axes = plt.subplots()
    anchor_drawings.mask(axes, list("abcdefgh"), MARKED, full)
    names, marks = list(anchor_drawings.KINDS), MARKED.tolist()
    for i, row in enumerate(colours(axes)):
        start = max([0, *(j + 1 for j in range(i) if marks[j])])
        for j, kind in enumerate(row):
            expected = "kept" if full else "freed"
            expected = "mark" if marks[j] else expected
            expected = "own line" if j >= start else expected
            assert names[int(kind)] == ("later" if j > i else expected)
    plt.close("all")


def test_a_second_layer_is_drawn_beside_the_first():
    _, axes = plt.subplots()
    anchor_drawings.mask(axes, list("abcdefgh"), MARKED, (False, True))
    first, second = torch.tensor(colours(axes)).split(8, dim=1)
    assert torch.equal(first, anchor_drawings.kinds(MARKED)) and torch.equal(
        second, anchor_drawings.kinds(MARKED, True)
    )
    plt.close("all")


def test_a_token_without_a_mark_begins_the_text():
    """The first token is always visible, and drawn like one."""
    marked = torch.tensor([False, False, True, False])
    names = list(anchor_drawings.KINDS)
    last = [names[kind] for kind in anchor_drawings.kinds(marked)[-1].tolist()]
    assert last == ["mark", "freed", "mark", "own line"]


@pytest.mark.parametrize("heads", [3, 8])
def test_drawn_places_are_those_of_the_cubes(heads):
    _, axes = plt.subplots()
    anchor_drawings.places(axes, list("abcdefgh"), MARKED, heads)
    drawn = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    expected = [[1 + place for place in places(2, heads)], [4 + place for place in places(1, heads)]]
    assert [list(map(int, x)) for x in drawn] == expected  # BOS, and the anchor behind another one, have no line
    plt.close("all")


def test_a_schedule_is_what_the_methods_say():
    _, axes = plt.subplots()
    methods = {
        "four": kvlib.method("anchorcoder", anchor=3, per=4, source=4, beyond=6),
        "none": kvlib.method("anchorcoder", anchor=3, per=None),
    }
    anchor_drawings.schedule(axes, methods, 9)
    full = axes.collections[0].get_array().reshape(2, 9) == 2
    assert full.tolist() == [[i % 4 == 0 for i in range(9)], 9 * [False]]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["", "", "", "", "S", "", "", "+4", "+4", *9 * [""]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["four", "none"]
    plt.close("all")


def test_held_out_code_has_every_class(minilm):
    found = set(sparsity.token_classes(excerpts.heldout_code("jinja2/sandbox.py"), minilm)[1])
    assert found == set(sparsity.CLASSES) - {"anchor"}


def test_a_study_of_no_rows_says_nothing():
    rows = sparsity.Rows(torch.zeros(1, 1, 3), torch.tensor([[True, False, False]]), torch.arange(3), torch.tensor([0]))
    table = sparsity.concentration([rows], torch.zeros(3, dtype=torch.int64))
    assert pd.isna(table["gini"]).all() and not math.isfinite(table["two"].sum(skipna=False))
