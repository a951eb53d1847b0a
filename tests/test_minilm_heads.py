"""The attention report: constructed attention, a literal reference, transformers' own weights, and no trace left."""

import math
from collections import Counter

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.minilm import heads
from kvlib.minilm.heads import FIRST_ROW, KINDS, RECENT
from kvlib.minilm.report import heldout_windows, load_tokenizer
from kvlib.minilm.tokenizer import encode

N = 64
NEWLINE, END, WORD = map(KINDS.index, ("newline", "end", "word"))


def window(**at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, all different, and kinds of N tokens: words but for the BOS and what is named, such as `newline=9`."""
    kinds = torch.full((N,), WORD)
    kinds[0] = KINDS.index("bos")
    for kind, position in at.items():
        kinds[position] = KINDS.index(kind)
    return torch.arange(100, 100 + N), kinds


def all_on(position: int) -> torch.Tensor:
    """One head that looks at one position wherever that is visible, and at itself before."""
    matrix = torch.eye(N)
    matrix[position:] = 0
    matrix[position:, position] = 1
    return matrix[None]


def uniform() -> torch.Tensor:
    return (torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None])[None]


def measured(probabilities, **at) -> dict[str, float]:
    return {name: value.item() for name, value in heads.statistics(probabilities, *window(**at)).items()}


def test_all_on_bos():
    found = measured(all_on(0))
    ones = {"bos", "first_four", "top_one", "top_four"}
    expected = {name: float(name in ones) for name in found} | {"top_kind": 0, "top_id": 100}
    assert found == expected


def test_all_on_oneself_and_on_the_previous_token():
    own = measured(torch.eye(N)[None], end=40)
    assert own["self"] == own["recent"] == 1 and own["previous"] == own["bos"] == own["entropy"] == 0
    assert own["end"] == pytest.approx(1 / 32) and own["word"] == pytest.approx(31 / 32)
    assert own["top_one"] == pytest.approx(1 / 32) and own["top_four"] == pytest.approx(4 / 32)
    previous = measured(torch.eye(N).roll(-1, 1)[None])  # row 0, which looks at the last column, is not counted
    assert previous["previous"] == previous["recent"] == previous["word"] == 1 and previous["self"] == 0


def test_all_on_a_fixed_newline():
    found = measured(all_on(9), newline=9, blank=10)
    assert all(found[name] == 1 for name in ("newline", "first_newline", "top_one"))
    assert found["bos"] == found["first_four"] == found["blank"] == found["self"] == 0
    assert (found["top_kind"], found["top_id"]) == (NEWLINE, 109)
    ids, kinds = window(newline=9)
    kinds[5] = NEWLINE  # now 9 is the second newline
    later = heads.statistics(all_on(9), ids, kinds)
    assert later["newline"] == 1 and later["first_newline"] == 0
    assert measured(all_on(9))["first_newline"] == 0  # and so it is without any newline


def test_a_sink_that_appears_late_has_its_share_of_all_rows():
    found = measured(all_on(48), end=48)
    assert found["top_one"] == found["end"] == 0.5  # of 32 rows the last 16 see it
    assert found["recent"] == 1 and found["top_kind"] == END


def test_uniform_attention():
    found = measured(uniform())
    rows = range(FIRST_ROW, N)
    assert found["bos"] == pytest.approx(sum(1 / (i + 1) for i in rows) / len(rows), rel=1e-5)
    assert found["bos"] == pytest.approx(found["top_one"]) == pytest.approx(found["self"])
    assert found["first_four"] == pytest.approx(4 * found["bos"]) == pytest.approx(found["top_four"])
    assert found["recent"] == pytest.approx(32 * found["self"], rel=1e-5)
    assert found["entropy"] == pytest.approx(sum(math.log(i + 1) for i in rows) / len(rows), rel=1e-5)


def test_rows_that_see_little_are_not_counted():
    matrix = all_on(0)
    matrix[:, :FIRST_ROW] = torch.eye(N)[:FIRST_ROW]
    assert measured(matrix) == measured(all_on(0))
    with pytest.raises(ValueError, match="a window of 32 tokens has no query row from 32 on"):
        heads.statistics(matrix[:, :32, :32], torch.arange(32), torch.zeros(32, dtype=torch.long))


def literal(matrix: list[list[float]], kinds: list[int]) -> dict[str, float]:
    """The definitions of the statistics of one head, word for word."""
    rows = range(FIRST_ROW, len(matrix))
    mass, received = Counter(), Counter()
    first_newline = kinds.index(NEWLINE) if NEWLINE in kinds else None
    for i in rows:
        for j, p in enumerate(matrix[i]):
            p /= len(rows)
            received[j] += p
            mass[KINDS[kinds[j]]] += p
            mass["first_four"] += p * (j < 4)
            mass["first_newline"] += p * (j == first_newline)
            mass["self"] += p * (i == j)
            mass["previous"] += p * (i == j + 1)
            mass["recent"] += p * (i - RECENT < j <= i)
            mass["entropy"] -= p * math.log(matrix[i][j]) if p else 0
    best = sorted(received.values(), reverse=True)
    return {**mass, "top_one": best[0], "top_four": sum(best[:4]), "top_position": received.most_common(1)[0][0]}


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(33, 50), st.sampled_from([0.1, 1.0, 5.0, 30.0]), st.integers(0, 2**31 - 1))
def test_statistics_against_their_definitions(count, length, sharpness, seed):
    random = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, length, length, generator=random, dtype=torch.float64)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    probabilities = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    ids = torch.arange(length) + 7
    kinds = torch.randint(1, len(KINDS), (length,), generator=random)
    kinds[0] = 0
    found = heads.statistics(probabilities, ids, kinds)
    assert all(value.shape == (count,) for value in found.values())
    torch.testing.assert_close(sum(found[kind] for kind in KINDS), torch.ones(count, dtype=torch.float64))
    for name, value in found.items():
        if name not in ("top_kind", "top_id"):
            assert (value > -1e-12).all()
            assert (value < (math.log(length) if name == "entropy" else 1) + 1e-12).all()
    assert (found["top_one"] <= found["top_four"]).all() and (found["bos"] <= found["first_four"]).all()
    assert (found["top_one"] >= found["bos"]).all() and (found["first_newline"] <= found["newline"]).all()
    assert (found["self"] + found["previous"] <= found["recent"] + 1e-12).all()
    for head in range(count):
        expected = literal(probabilities[head].tolist(), kinds.tolist())
        top = expected.pop("top_position")
        assert (found["top_id"][head], found["top_kind"][head]) == (ids[top], kinds[top])
        for name in found.keys() - {"top_kind", "top_id"}:
            assert found[name][head].item() == pytest.approx(expected.get(name, 0), abs=1e-12), name


# Kinds


@pytest.mark.parametrize(
    "kind, texts",
    {
        "newline": ["\n", "\n\n", ":\n"],
        "blank": [" ", "    ", "\t"],
        "digit": ["7", " 7", "12"],
        "punctuation": [",", " ==", '"""', "─", "(", "."],
        "word": ["word", " word", "_", " __", "x1", "é", "\ufffd", "", "<pad>", "~a"],
    }.items(),
)
def test_kinds_of_texts(kind, texts):
    assert {heads.text_kind(text) for text in texts} == {kind}


def test_kinds_of_tokens():
    tokenizer = load_tokenizer()
    texts = {"newline": "\n\n", "blank": "    ", "word": "word", "punctuation": " =", "digit": "42"}
    pieces = dict(zip(texts, encode(tokenizer, list(texts.values()))))
    ids = [i for piece in pieces.values() for i in piece]
    inner = [kind for kind, piece in pieces.items() for _ in piece]
    rows = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [ids[0], *ids, ids[0]]])
    kinds = [[KINDS[kind] for kind in row] for row in heads.token_kinds(tokenizer, rows).tolist()]
    assert kinds == [["bos", *inner, "end"], ["bos", *inner, "newline"]]  # position 0 is bos whatever stands there


# Reports


def hooks(model) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


def expected_mass(model, windows, kinds, kind) -> torch.Tensor:
    """Mass on a kind, (layers, heads), from transformers' own `output_attentions`."""
    before, total = model.config._attn_implementation, 0
    model.set_attn_implementation("eager")
    for ids, where in zip(windows, kinds == KINDS.index(kind)):
        with torch.no_grad():
            layers = model(input_ids=ids[None], output_attentions=True).attentions
        total += torch.stack([p[0, :, FIRST_ROW:][..., where].sum(-1).mean(-1) for p in layers]) / len(windows)
    model.set_attn_implementation(before)
    return total.float()


def assert_agrees(model, tokenizer, windows) -> None:
    before = hooks(model), model.config._attn_implementation
    report = heads.attention_report(model, tokenizer, windows)
    assert (hooks(model), model.config._attn_implementation) == before
    config = model.config
    assert len(report) == config.num_hidden_layers * config.num_attention_heads
    assert report["layer"].is_monotonic_increasing and not report.duplicated(["layer", "head"]).any()
    assert report[list(KINDS)].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert not report.isna().any(axis=None)
    kinds = heads.token_kinds(tokenizer, windows)
    for kind in KINDS:
        expected = expected_mass(model, windows, kinds, kind).flatten()
        assert report[kind].to_numpy() == pytest.approx(expected.numpy(), abs=1e-5), kind


def test_the_shipped_model():
    assert_agrees(*kvlib.load(), heldout_windows("code", 96)[:2])


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "mistral", "qwen3"])
def test_heads_are_query_heads(name):
    windows = tiny.tokens(2, 48)
    windows[:, 0] = 0
    assert_agrees(tiny.model(name), load_tokenizer(), windows)


def test_padded_windows_are_left_out():
    tokenizer, model = load_tokenizer(), tiny.model()
    windows = tiny.tokens(3, 48).clamp(min=tokenizer.pad_token_id + 1)
    padded = windows.clone()
    padded[0, 40:] = tokenizer.pad_token_id
    padded[1, :5] = tokenizer.pad_token_id
    report = heads.attention_report(model, tokenizer, padded)
    pd.testing.assert_frame_equal(report, heads.attention_report(model, tokenizer, windows[2:]))
    with pytest.raises(ValueError, match="no window without padding"):
        heads.attention_report(model, tokenizer, padded[:2])


def test_the_top_token_is_the_most_frequent_one(monkeypatch):
    tokenizer, texts = load_tokenizer(), ["=", "\n", "="]
    rows = []
    for text in texts:
        rows.append([tokenizer.bos_token_id, *encode(tokenizer, [text + "a a a a a a a a a a" * 4])[0]][:40])
    monkeypatch.setattr(heads, "statistics", lambda p, ids, kinds: all_first(p.shape[0], ids, kinds))
    report = heads.attention_report(tiny.build("llama-mha", vocab_size=len(tokenizer)), tokenizer, torch.tensor(rows))
    assert set(report["top_token"]) == {"'='"} and set(report["top_kind"]) == {"punctuation"}
    assert (report["bos"] == 1 / 4).all()


def all_first(count, ids, kinds):
    return {"bos": torch.full((count,), 0.25), "top_kind": kinds[1].expand(count), "top_id": ids[1].expand(count)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_error_leaves_the_model_as_it_was(implementation):
    model = tiny.build("llama-gqa")
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="a window of 32 tokens"):
        heads.attention_report(model, load_tokenizer(), tiny.tokens(1, 32).clamp(min=3))
    assert model.config._attn_implementation == implementation
    assert not any(hooks(model))


def test_only_one_layer_is_held_at_a_time():
    model, alive = tiny.model("llama-mha"), []

    def look(layer, probabilities):
        assert probabilities.shape == (1, 4, 48, 48)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(probabilities.untyped_storage()))
        assert [ref.expired() for ref in alive[:-1]] == [True] * layer

    with heads.watching(model, look):
        model.base_model(input_ids=tiny.tokens(1, 48), use_cache=False)
    assert len(alive) == 2


def a_report(top_four: list[float]) -> pd.DataFrame:
    """Two heads a layer; the others' mass is on words."""
    frame = pd.DataFrame(
        {"layer": [i // 2 for i in range(len(top_four))], "head": [i % 2 for i in range(len(top_four))]}
    )
    frame = frame.assign(**dict.fromkeys(KINDS, 0.0)).assign(top_four=top_four, bos=top_four, top_token="'<s>'")
    return frame.assign(word=1 - frame["bos"])


def test_sinks():
    found = heads.sinks(a_report([0.1, 0.4, 0.3, 0.2, 0.9, 0.4]))
    assert list(zip(found["layer"], found["head"])) == [(2, 0), (0, 1), (2, 1)]  # 0.3 itself is none
    assert list(heads.sinks(found, 0.5)["top_four"]) == [0.9]


def test_compare():
    reports = {"mha": a_report([0.1, 0.4, 0.3, 0.2, 0.9, 0.5]), "gqa": a_report([0.1, 0.2])}
    mha, gqa = heads.compare(reports).to_dict("records")
    assert mha["model"] == "mha" and mha["sink_heads"] == 3 and mha["sink_layers"] == 2 and mha["layers"] == "0, 2"
    assert mha["sink_share"] == 0.5 and mha["sink_token"] == "'<s>'" and mha["largest_bos"] == 0.9
    assert mha["bos"] == pytest.approx(0.4) and mha["word"] == pytest.approx(0.6)
    assert gqa["sink_heads"] == gqa["sink_layers"] == gqa["sink_share"] == 0
    assert gqa["layers"] == gqa["sink_token"] == ""
    assert heads.compare(reports, 0.05)["sink_heads"].tolist() == [6, 2]
