"""Perplexity against the stock model, against methods applied by hand, and the windows against the text."""

import math
import random
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import kvlib
from kvlib import paths
from kvlib.core.method import METHODS, Method
from kvlib.lab.evaluation import benchmarks
from kvlib.lab.evaluation import perplexity as module
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.perplexity import cut_windows, first_tokens, losses, perplexity, places, summary
from kvlib.lab.evaluation.prompts import one_by_one
from kvlib.methods.baselines import Full, SnapKV
from kvlib.paths import MODELS

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
TEXT = " ".join(random.Random(0).choices(WORDS, k=400)).replace(" eta", "\neta")
CONFIGURATIONS = (
    Configuration("full", 1.0),
    Configuration("snapkv", 0.4, '{"window": 4, "kernel": 3}'),
    Configuration("h2o", 0.4),
    Configuration("random", 12),
    Configuration("streaming_llm", 0.3),
)
SIZES = {"context": 40, "targets": 17, "windows": 3}
NAMES = {"name": "tiny", "text_name": "words"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


def model(dtype=torch.float64):
    return tiny.model("llama-gqa", dtype, vocab_size=4096)


@pytest.fixture(scope="module")
def table(tokenizer):
    return perplexity(model(), tokenizer, TEXT, CONFIGURATIONS, **NAMES, **SIZES)


@pytest.fixture
def registered(monkeypatch):
    """`registered(name, cls)` makes a class reachable by name for one test."""
    return lambda name, cls: monkeypatch.setitem(METHODS, name, cls)


def ids_of(window) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([window.context]), torch.tensor([window.targets])


def stock(model, window) -> float:
    """Loss of the targets in one pass of the stock model."""
    ids = torch.tensor([window.context + window.targets])
    logits = model(ids).logits[0, len(window.context) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(window.targets), reduction="sum"))


def by_hand(model, method, window) -> list[float]:
    """Losses with a prefill of its own and a token a pass, as `generate` does it."""
    context, targets = ids_of(window)
    found = []
    with method(model) as run:
        out = model(context)
        for token in targets[0]:
            found.append(float(-out.logits[0, -1].log_softmax(-1)[token]))
            out = model(token[None, None], past_key_values=run.cache)
    return found


def forked(model, method, snapshot, targets, stepwise: bool) -> torch.Tensor:
    with method(model) as run:
        cache = run.fork(snapshot)
        return losses(lambda ids: model(ids, past_key_values=cache).logits, snapshot.logits, targets, stepwise)


# Losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_is_the_stock_model(tokenizer, dtype):
    found = perplexity(model(dtype), tokenizer, TEXT, **NAMES, **SIZES)
    windows = cut_windows(tokenizer, TEXT, **SIZES)
    assert len(found) == len(windows) == 3
    for nats, window in zip(found["nats"], windows):
        assert nats == pytest.approx(stock(model(dtype), window), rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_every_configuration_is_what_decoding_by_hand_gives(tokenizer, table):
    windows = cut_windows(tokenizer, TEXT, **SIZES)
    for configuration in CONFIGURATIONS:
        rows = table[(table["method"] == configuration.method)]
        for window, nats in zip(windows, rows["nats"], strict=True):
            assert nats == pytest.approx(sum(by_hand(model(), configuration.make(), window)), rel=1e-10)
    per_method = table.groupby("method")["nats"].sum()
    assert per_method.round(3).nunique() == len(CONFIGURATIONS), "eviction that changes nothing tests nothing"


@pytest.mark.parametrize(
    "method",
    [
        kvlib.method("full"),
        kvlib.method("random", budget=0.3),
        kvlib.method("snapkv", budget=0.4, window=4),
        kvlib.method("knorm", budget=9),
    ],
    ids=lambda method: method.name,
)
def test_one_pass_is_token_by_token(method):
    """For methods that do not evict while decoding."""
    assert not one_by_one(method)
    ids, targets = tiny.tokens(2, 30), tiny.tokens(2, 20, seed=1)
    snapshot = kvlib.snapshot(model(), ids)
    single = forked(model(), method, snapshot, targets, stepwise=False)
    steps = forked(model(), method, snapshot, targets, stepwise=True)
    assert single.shape == (2, 20)
    torch.testing.assert_close(single, steps, rtol=1e-10, atol=1e-10)


def test_methods_that_evict_while_decoding_need_token_by_token():
    method = kvlib.method("h2o", budget=0.3)
    snapshot, targets = kvlib.snapshot(model(), tiny.tokens(2, 30)), tiny.tokens(2, 20, seed=1)
    single, steps = (forked(model(), method, snapshot, targets, stepwise) for stepwise in (False, True))
    assert (single - steps).abs().max() > 1e-3


def test_who_is_fed_token_by_token():
    class OwnAttention(Full):
        def attend(self, view):
            return super().attend(view)

    class Ids(Full):
        def on_token_ids(self, run, token_ids):
            """Nothing."""

    assert one_by_one(kvlib.method("h2o", budget=0.9)) and not one_by_one(kvlib.method("h2o"))
    assert one_by_one(kvlib.method("streaming_llm", budget=4))
    assert one_by_one(OwnAttention()) and one_by_one(Ids())
    assert not one_by_one(Full()) and not one_by_one(SnapKV(budget=0.5)) and not one_by_one(Method())


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o"])
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_does_not_matter(name, extra):
    method = kvlib.method(name, **({} if name == "full" else {"budget": 0.4}))
    rows = [tiny.tokens(31), tiny.tokens(24, seed=2)]
    targets = tiny.tokens(2, 12, seed=1)
    ids, mask = tiny.pad(rows, extra)
    together = forked(model(), method, kvlib.snapshot(model(), ids, mask), targets, one_by_one(method))
    for row, prompt in enumerate(rows):
        alone = kvlib.snapshot(model(), prompt[None])
        expected = forked(model(), method, alone, targets[row : row + 1], one_by_one(method))
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-9, atol=1e-9)


def test_a_running_perplexity_without_prefill():
    """As TidalDecode does it on PG-19: as long as nothing has been evicted the losses are those of the full cache."""
    ids = tiny.tokens(1, 41)
    snapshot = kvlib.snapshot(model(), ids[:, :1])
    full, evicted = (
        forked(model(), method, snapshot, ids[:, 1:], stepwise=True)[0]
        for method in (kvlib.method("full"), kvlib.method("h2o", budget=16))
    )
    same = (full - evicted).abs() < 1e-10
    assert same[:16].all() and not same[17:].any()  # the 17th pass is the first that is followed by an eviction
    expected = F.cross_entropy(model()(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(full, expected)


def test_half_precision_is_summed_in_single():
    snapshot = kvlib.snapshot(tiny.model("llama-gqa", torch.bfloat16), tiny.tokens(1, 20))
    targets = tiny.tokens(1, 5)
    assert forked(tiny.model("llama-gqa", torch.bfloat16), Full(), snapshot, targets, False).dtype == torch.float32


# The table


def test_columns_and_bytes(tokenizer, table):
    assert list(table) == [
        *("model", "text", "context", "method", "budget", "arguments", "window", "nats", "tokens", "characters"),
        *("stored_bytes", "full_bytes", "clamped", "protocol", "torch", "device"),
    ]
    assert len(table) == len(CONFIGURATIONS) * 3
    assert set(table["tokens"]) == {17} and set(table["context"]) == {40}
    assert set(table["protocol"]) == {"40 tokens compressed, the next 17 teacher-forced"}
    assert set(table["model"]) == {"tiny"} and set(table["text"]) == {"words"}
    first = cut_windows(tokenizer, TEXT, **SIZES)[0]
    for configuration in CONFIGURATIONS:
        rows = table[table["method"] == configuration.method]
        with configuration.make()(model()) as run:
            model()(ids_of(first)[0])
            assert set(rows["stored_bytes"]) == {run.stored_bytes()} and set(rows["full_bytes"]) == {run.full_bytes()}
            assert set(rows["clamped"]) == {bool(run.clamped)}
        assert list(rows["window"]) == [0, 1, 2] and set(rows["arguments"]) == {configuration.arguments}


def test_batches_do_not_matter(tokenizer, table):
    again = perplexity(model(), tokenizer, TEXT, CONFIGURATIONS, batch=2, **NAMES, **SIZES)
    key = ["method", "window"]
    first, second = (x.sort_values(key).reset_index(drop=True) for x in (table, again))
    torch.testing.assert_close(torch.tensor(first.pop("nats")), torch.tensor(second.pop("nats")), rtol=1e-10, atol=0)
    assert first.equals(second)


def test_methods_with_a_prefill_of_their_own(tokenizer, registered, monkeypatch):
    class OwnPrefill(SnapKV):
        own_prefill = True

    registered("own_prefill", OwnPrefill)
    configurations = [replace(CONFIGURATIONS[1], method=name) for name in ("snapkv", "own_prefill")]
    found = perplexity(model(), tokenizer, TEXT, configurations, **NAMES, **SIZES)
    shared, own = (found[found["method"] == c.method].reset_index(drop=True) for c in configurations)
    assert own["nats"].tolist() == pytest.approx(shared["nats"].tolist(), rel=1e-10)
    assert own["stored_bytes"].equals(shared["stored_bytes"])
    # and without methods that share one there is no shared prefill
    monkeypatch.setattr(kvlib, "snapshot", None)
    assert len(perplexity(model(), tokenizer, TEXT, configurations[1:], **NAMES, **SIZES)) == 3


def test_the_prefill_is_shared(tokenizer, monkeypatch):
    calls = []
    original = kvlib.snapshot
    monkeypatch.setattr(kvlib, "snapshot", lambda model, ids, mask: calls.append(ids.shape) or original(model, ids))
    perplexity(model(), tokenizer, TEXT, CONFIGURATIONS, batch=2, **NAMES, **SIZES)
    assert calls == [(2, 40), (1, 40)]


def test_summary(table):
    found = summary(table)
    assert list(found["method"]) == [configuration.method for configuration in CONFIGURATIONS]
    for row in found.itertuples():
        rows = table[table["method"] == row.method]
        assert row.windows == 3
        assert row.nats_per_token == pytest.approx(rows["nats"].sum() / (3 * 17))
        assert row.perplexity == pytest.approx(math.exp(row.nats_per_token))
        assert row.bits_per_character == pytest.approx(rows["nats"].sum() / math.log(2) / rows["characters"].sum())
    twice = summary(pd.concat([table, table.assign(text="other", nats=0.0)]))
    assert len(twice) == 2 * len(found) and set(twice[twice["text"] == "other"]["perplexity"]) == {1.0}


# Windows


@pytest.mark.parametrize("stride", [None, 1, 9])
def test_windows_are_pieces_of_the_tokenised_text(tokenizer, stride):
    ids = tokenizer(TEXT).input_ids
    bos, ids = ids[0], ids[1:]
    assert bos == tokenizer.bos_token_id
    windows = cut_windows(tokenizer, TEXT, context=20, targets=9, windows=7, stride=stride)
    begins = [round(i * (len(ids) - 28) / 6) for i in range(7)] if stride is None else [i * stride for i in range(7)]
    assert len(windows) == 7
    for begin, window in zip(begins, windows):
        assert window.context == [bos, *ids[begin : begin + 19]]
        assert window.targets == ids[begin + 19 : begin + 28]
        assert window.characters == len(tokenizer.decode(window.targets))
    assert windows == cut_windows(tokenizer, TEXT, context=20, targets=9, windows=7, stride=stride)


def test_windows_that_predict_every_token_once(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    text = tokenizer.decode(ids[: 19 + 9 * 12])  # twelve windows and nothing left over
    windows = cut_windows(tokenizer, text, context=20, targets=9, windows=10**6, stride=9)
    assert [token for window in windows for token in window.targets] == ids[19 : 19 + 9 * 12]
    head = len(tokenizer.decode(ids[:19]))
    assert sum(window.characters for window in windows) == len(text) - head


def bytewise() -> PreTrainedTokenizerFast:
    """A token a byte, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_characters_of_several_tokens_count_once():
    tokenizer, text = bytewise(), "naïve déjà vu — ☃☃ über 東京"
    assert first_tokens(tokenizer) == []
    size = len(text.encode())
    assert size > len(text) + 10
    for targets in (1, 2, 3):
        windows = cut_windows(tokenizer, text, context=1, targets=targets, windows=10**6, stride=targets)
        whole = text.encode()[: size - (size - 1) % targets]  # further bytes make no window
        assert sum(window.characters for window in windows) == len(whole.decode(errors="ignore")) - 1
        assert [len(window.context) for window in windows] == [1] * len(windows)


def test_places():
    assert places(100, 10, 4, None) == [0, 30, 60, 90]
    assert places(100, 10, 1, None) == [0]
    assert places(12, 10, 50, None) == [0, 1, 2]  # there are no more
    assert places(100, 10, 50, 40) == [0, 40, 80] and places(100, 10, 2, 40) == [0, 40]
    assert places(90, 10, 50, 40) == [0, 40, 80] and places(89, 10, 50, 40) == [0, 40]
    assert places(10, 10, 5, None) == places(10, 10, 5, 3) == [0]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context=0: at least 1"),
        ({"targets": 0}, "targets=0: at least 1"),
        ({"windows": 0}, "windows=0: at least 1"),
        ({"stride": 0}, "stride=0: at least 1"),
        ({"stride": -9}, "stride=-9: at least 1"),
        ({"context": 40000}, r"the text has \d+ tokens, context=40000 and targets=17 need 40016"),
        ({"context": 240, "targets": 18}, "context=240 and targets=18: the model's window is 256 tokens"),
    ],
)
def test_errors(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model(), tokenizer, TEXT, **NAMES, **{**SIZES, **arguments})


def test_the_longest_window(tokenizer):
    found = perplexity(model(), tokenizer, TEXT, **NAMES, **{**SIZES, "context": 240})
    assert len(found) == 3  # the last target is not fed


def test_slow_tokenizers(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not say which characters a token is"):
        cut_windows(Slow(), TEXT, **SIZES)


def test_all_texts_end_in_one_table(tokenizer, tmp_path, monkeypatch):
    small = tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=2048)
    monkeypatch.setattr(kvlib, "load", lambda: (small, tokenizer))
    texts = {"wikitext-2": 30 * TEXT, "moby-dick": 30 * TEXT[::-1]}
    monkeypatch.setattr(benchmarks, "load", lambda name: [{"text": texts[name]}])
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "COMPARED", (Configuration("full", 1.0), Configuration("snapkv", 0.2)))
    module.main([])
    table = pd.read_parquet(tmp_path / "00_kv_cache_texts.parquet")
    assert len(table) == len(module.TEXTS) * 2 * 16 and set(table["text"]) == set(module.TEXTS)
    for (name, text), rows in table.groupby(["model", "text"]):
        alone = perplexity(small, tokenizer, texts[text], name=name, text_name=text, windows=16)
        full = rows[rows["method"] == "full"]
        assert full["nats"].tolist() == pytest.approx(alone["nats"].tolist(), rel=1e-4)
    assert table["nats"].nunique() > 50


def test_help_computes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(kvlib, "load", None)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "00_kv_cache_texts.parquet" in capsys.readouterr().out


def test_the_committed_table_has_every_cell():
    table = pd.read_parquet(paths.RESULTS / "00_kv_cache_texts.parquet")
    cells = summary(table).set_index(["model", "text", "method", "budget", "arguments"])
    models = table["model"].nunique()
    assert len(cells) == models * len(module.TEXTS) * len(module.COMPARED) and cells["windows"].eq(16).all()
    for (model, text), rows in cells.groupby(level=["model", "text"]):
        full = rows.loc[(model, text, "full", 1.0, "{}"), "bits_per_character"]
        assert rows["bits_per_character"].gt(0.98 * full).all()
    kept = table["stored_bytes"] / table["full_bytes"]
    assert (kept <= table["budget"]).all() and (kept > 0.9 * table["budget"]).all()
