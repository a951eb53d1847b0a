"""The evaluator against plain greedy decoding."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from test_gate import Ragged, Reader, Shorten
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib import paths
from kvlib.core.method import METHODS
from kvlib.lab import tasks
from kvlib.lab.evaluation import evaluate, prompts
from kvlib.lab.evaluation.answers import NEW_TOKENS, write
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import PROTOCOLS
from kvlib.lab.evaluation.metrics import code_similarity, is_decided
from kvlib.lab.evaluation.prompts import Prompts, compressed
from kvlib.lab.evaluation.reference import Reference
from kvlib.lab.results import keys, tables
from kvlib.lab.results.studies import STUDIES
from kvlib.methods.baselines import Full, SnapKV
from kvlib.verified import end_tokens

CONFIGURATIONS = (
    Configuration("full", 1.0),
    Configuration("snapkv", 0.2, '{"kernel": 15}'),
    Configuration("h2o", 0.6),
    Configuration("random", 0.7),
)
LENGTH = 160


@pytest.fixture(scope="module")
def model():
    return kvlib.load()


@pytest.fixture(scope="module")
def small():
    """What writes nonsense, but soon."""
    tokenizer = AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")
    return tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024), tokenizer


@pytest.fixture(scope="module")
def table(model):
    return evaluate.evaluate(*model, CONFIGURATIONS, "needle", LENGTH, range(6), name="minilm", block=4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_are_what_an_answer_to_the_question_gives(model, protocol):
    """What is compressed and what is asked behind it, one prompt at a time, by `run.read` and `run.ask`."""
    model, tokenizer = model
    table = evaluate.evaluate(
        model, tokenizer, CONFIGURATIONS, "needle", LENGTH, range(4), name="minilm", protocol=protocol
    )
    for configuration in CONFIGURATIONS:
        for number in range(4):
            drawn = tasks.sample("needle", LENGTH, number, tokenizer=tokenizer)
            text, stored, full = answered(model, tokenizer, configuration.make(), drawn, protocol, 8)
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == tasks.score(drawn, text)
            assert (row["stored_bytes"], row["full_bytes"], row["protocol"]) == (stored, full, protocol)
    assert 0 < table["value"].mean() < 1, "all right or all wrong compares nothing"
    assert table[["divergence", "agreement"]].isna().all(axis=None), "the answer is known"


def parts(drawn, tokenizer, protocol: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What is compressed and what is fed behind it, `(1, tokens)` each."""
    context, question, lead = drawn.ids(tokenizer)
    first = context + question if protocol == "asked" else context
    return torch.tensor([first]), torch.tensor([(context + question + lead)[len(first) :]])


def answered(model, tokenizer, method, drawn, protocol: str, tokens: int) -> tuple[str, int, int]:
    """What is written, the bytes stored before it and those of everything read."""
    first, rest = parts(drawn, tokenizer, protocol)
    with method(model) as run:
        run.read(input_ids=first)
        stored, full = run.stored_bytes(), run.full_bytes()
        out = run.ask(rest, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, rest.shape[1] :], skip_special_tokens=True), stored, full


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_token_of_the_answer_is_chosen_before_the_eviction(small, registered, protocol):
    """A method that forgets everything it has read leaves no trace of it in the answer."""
    model, tokenizer = small
    seen = []

    class Spy(SnapKV):
        def compress(self, view):
            if view.layer_idx == 0 and view.step.ends_prompt:
                seen.append(view.tokens.tolist())
            return super().compress(view)

    registered(Spy)
    evaluate.evaluate(
        model, tokenizer, [Configuration("Spy", 0.2)], "needle", 400, range(4), name="", protocol=protocol
    )
    drawn = [tasks.sample("needle", 400, number, tokenizer=tokenizer) for number in range(4)]
    assert seen[0] == [parts(prompt, tokenizer, protocol)[0].shape[1] for prompt in drawn]
    assert all(parts(prompt, tokenizer, protocol)[1].shape[1] >= 1 for prompt in drawn)


def test_one_pass_over_the_answer_is_as_good_as_one_token_at_a_time(model, monkeypatch):
    """Answers of several lengths and lines, right and wrong ones; `attend` makes the evaluator go token by token."""
    model, tokenizer = model
    snapkv = Configuration("snapkv", 0.8, '{"kernel": 15}')

    def values():
        asked = [("collect", range(4)), ("long_generation", range(3))]
        tables = [evaluate.evaluate(model, tokenizer, [snapkv], task, 300, samples, name="") for task, samples in asked]
        return pd.concat(tables)["value"].tolist()

    together = values()
    monkeypatch.setattr(kvlib.Method, "hooks", lambda self, name: name == "attend")
    assert values() == together
    assert 0 < np.mean(together) < 1


def test_prompts_that_fill_the_window(model, monkeypatch):
    """Answers of different lengths: what fills up the shorter ones must not count as text beyond the window."""
    model, tokenizer = model
    monkeypatch.setattr(model.config, "max_position_embeddings", 300)
    configuration = [Configuration("snapkv", 0.8, '{"kernel": 15}')]
    for task in ("exports", "long_generation"):
        table = evaluate.evaluate(model, tokenizer, configuration, task, 300, range(2), name="")
        alone = evaluate.evaluate(model, tokenizer, configuration, task, 300, range(2), name="", block=1)
        pd.testing.assert_frame_equal(table, alone)
    with pytest.raises(ValueError, match="length=301: the model's window is 300 tokens"):
        evaluate.evaluate(model, tokenizer, configuration, "exports", 301, range(4), name="")


def test_prefill_work_by_hand():
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=3, num_attention_heads=2, head_dim=2
    )
    for tied in (True, False):
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        layer = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4  # q, k, v, o; gate, up, down; two norms
        pairs = 5 * 6 // 2  # of 5 tokens
        weights = 3 * layer + 4
        assert prompts.prefill_flops(model, 5) == 2 * weights * 5 + 3 * 2 * pairs * (2 * 2 + 2 * 2) + 2 * 10 * 4


def test_a_clamp_counts_for_the_rows_that_it_concerns(model):
    """Whatever else is in the block: of prompts of unequal lengths the shorter has no room for a window of 32."""
    model, tokenizer = model
    prompts = [tasks.sample("needle", tokens, 1, tokenizer=tokenizer) for tokens in (140, 400)]
    read, rest = evaluate.prepare(model, tokenizer, prompts, "asked")
    columns = evaluate.score(kvlib.method("snapkv", budget=0.2), read, rest, prompts, tokenizer, Reference(read, rest))
    assert columns["clamped"] == [True, False]


TOKEN_BYTES = {"smollm2": 30 * 3 * 512, "minilm": 16 * 8 * 256}  # layers, KV heads, a key and a value in float32


def smollm2_most(configuration: Configuration, full_bytes: pd.Series) -> pd.Series | None:
    """Bytes of 30 layers, 3 KV heads and rows of 512 bytes, if three query heads gather more rows than there are.

    So it is for sets per query head of more than a third of the tokens. Quest also reads two bounds a page of 16, as
    much as a row, for each KV head. None: a reader has to read less than the full cache.
    """
    tokens = full_bytes / TOKEN_BYTES["smollm2"] + 1  # the token that is decoded is read, too
    if configuration.budget <= 1 or 3 * configuration.budget < tokens.min() or "heads" in configuration.arguments:
        return None
    dense, bounds = (2, np.ceil(tokens / 16)) if configuration.method == "quest" else (4, 0)
    return 512 * (3 * dense * tokens + (30 - dense) * (9 * configuration.budget + 3 * bounds))


@pytest.mark.parametrize("name", STUDIES)
def test_the_shipped_table_is_that_of_today_s_code_and_models(name):
    study, file = STUDIES[name], paths.RESULTS / f"{name}.parquet"
    if not file.is_file():
        pytest.skip("not made yet: make results")
    table, wanted = tables.read(file), keys.keys(study)
    assert len(keys.current(table, wanted)) == len(table) == study.rows, "make results"
    for (model, *cell, task, _, _), rows in table.groupby(evaluate.CELL):
        configuration = next(each for each in study.everything if each == Configuration(*cell))  # 128 and not 128.0
        assert sorted(rows["sample"]) == [*range(study.samples(model, task, configuration))]
        if study.measure in ("anchored", "functions"):
            continue  # test_arms_tables.py
        if isinstance(configuration.make(), kvlib.Reader):
            assert (rows["stored_bytes"] == rows["full_bytes"]).all()
            most = smollm2_most(configuration, rows["full_bytes"])
            if model == "smollm2" and most is not None:
                exact = configuration.method == "tidaldecode"
                assert (rows["read_bytes"] == most if exact else rows["read_bytes"] <= most).all()
            else:
                assert (rows["read_bytes"] < rows["full_bytes"]).all()
        else:
            share = configuration.budget <= 1
            unit = 1.05 * rows["full_bytes"] if share else TOKEN_BYTES[model]
            assert (rows["stored_bytes"] <= configuration.budget * unit).all()


# Lines of code, which are generated


class Letters:
    """A tokenizer to decode with: a character for each id of the tiny models, and an end."""

    end = 7
    alphabet = "\n\n\n\n\n\n #/`" + "abcdefghijklmnopqrstuvwxyz()[]=.:,ABCDEFGHIJKLMNOPQRST"

    def decode(self, ids, skip_special_tokens=False):
        text = "".join("\0" if i == self.end else self.alphabet[i] for i in ids)
        return text.replace("\0", "" if skip_special_tokens else "</s>")


@pytest.mark.parametrize("ends", [None, Letters.end, [Letters.end, 60]])
@pytest.mark.parametrize(
    "method",
    [
        kvlib.method("full"),
        kvlib.method("snapkv", budget=0.4, window=4, kernel=3),
        kvlib.method("h2o", budget=0.4),
        kvlib.method("streaming_llm", budget=8),
        kvlib.method("streaming_llm", budget=3),  # clamps in decode steps too
        Ragged(0.5),
        Shorten(0.5),
        Reader(0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_rows_of_a_batch_are_written_as_alone(method, ends):
    """Up to where the score of each is certain, and not a token further."""
    model, letters = tiny.build("llama-gqa"), Letters()
    model.generation_config.eos_token_id = ends
    rows = [tiny.tokens(length, seed=length) for length in (31, 9, 24, 17, 12, 30, 21)]
    most = [NEW_TOKENS] * 6 + [2]
    prompts = Prompts(model, *tiny.pad(rows, extra=2))
    with compressed(prompts, method) as read, torch.no_grad():
        texts = write(read.feed, read.keep, read.logits, letters, end_tokens(model), most, is_decided)
    lengths = []
    for row, text, limit in zip(rows, texts, most):
        with method(model):
            out = model.generate(row[None], max_new_tokens=limit, do_sample=False)[0, len(row) :].tolist()
        whole = letters.decode(out, skip_special_tokens=True)
        for answer in ("abc", "    return b", "", whole.split("\n")[0]):
            assert code_similarity(text, answer) == code_similarity(whole, answer)
        written = next(n for n in range(1, limit + 1) if n == len(out) or is_decided(letters.decode(out[:n])))
        assert text == letters.decode(out[:written], skip_special_tokens=True)
        lengths.append(written)
    assert len({*lengths}) > 3, "rows that end together test nothing"


@pytest.mark.parametrize("task", ["next_line", "cross_file_line", "next_line_unbroken"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lines_are_judged_by_what_is_generated(small, task, protocol):
    model, tokenizer = small
    configurations = [Configuration("h2o", 0.3), Configuration("snapkv", 0.3)]
    table = evaluate.evaluate(model, tokenizer, configurations, task, 512, range(2), name="", protocol=protocol)
    for configuration in configurations:
        for number in range(2):
            drawn = tasks.sample(task, 512, number, tokenizer=tokenizer)
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            text = answered(model, tokenizer, configuration.make(), drawn, protocol, 64)[0]
            assert row["value"] == code_similarity(text, drawn.answer)
    assert table["value"].nunique() > 1


READERS = [Configuration("h2o", 0.3), Configuration("snapkv", 0.3), Configuration("full", 1.0)]


@pytest.mark.parametrize("task", ["code_bits", "code_bits_unbroken", "prose_bits", "summary"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_needs_no_label_token_by_token(small, task, protocol):
    """Bits of the text that follows, and how far a method is from the full cache along it or along its own answer."""
    model, tokenizer = small
    table = evaluate.evaluate(model, tokenizer, READERS, task, 512, range(2), name="", protocol=protocol)
    for number in range(2):
        drawn = tasks.sample(task, 512, number, tokenizer=tokenizer)
        if task == "summary":
            first, rest = parts(drawn, tokenizer, protocol)
            with kvlib.method("full")(model) as run:
                run.read(input_ids=first)
                out = run.ask(rest, max_new_tokens=64, do_sample=False, pad_token_id=0)
            target = out[0, rest.shape[1] :].tolist()
        else:
            target = drawn.answer_ids(tokenizer)
            assert len(target) >= 60
        expected = along(model, tokenizer, kvlib.method("full"), drawn, protocol, target)
        for configuration in READERS:
            found = along(model, tokenizer, configuration.make(), drawn, protocol, target)
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            divergence = (expected.exp() * (expected - found)).sum(-1)[:64].mean().item()
            same = (expected.argmax(-1) == found.argmax(-1))[:64].double().mean().item()
            assert row["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
            assert row["agreement"] == pytest.approx(same)
            if task == "summary":
                assert row["value"] == float(same == 1)
            else:
                nats = -found[range(len(target)), target].sum().item()
                assert row["value"] == pytest.approx(nats / math.log(2) / len(drawn.answer), rel=1e-4)
    full = table["method"] == "full"
    assert (table.loc[full, "agreement"] == 1).all() and table.loc[full, "divergence"].abs().max() < 1e-6
    assert (table.loc[~full, "divergence"] > 0).all() and table.loc[~full, "agreement"].nunique() > 2


def along(model, tokenizer, method, drawn, protocol: str, target: list[int]) -> torch.Tensor:
    """Log-probabilities `(tokens, vocabulary)` at every token of `target`, fed one by one, in float64."""
    first, rest = parts(drawn, tokenizer, protocol)
    with method(model) as run, torch.no_grad():
        run.read(input_ids=first)
        logits = [run.follow(rest).logits[0, -1]]
        for token in target[:-1]:
            logits.append(model(torch.tensor([[token]]), past_key_values=run.cache).logits[0, -1])
    return torch.stack(logits).double().log_softmax(-1)


def test_lines_end_with_the_window(small, monkeypatch):
    """Of every row for itself: a shorter prompt in the same block leaves more room."""
    model, tokenizer = small
    full, limits = [Configuration("full", 1.0)], []
    plain = evaluate.write
    monkeypatch.setattr(evaluate, "write", lambda *a: limits.append(a[5]) or plain(*a))
    drawn = [tasks.sample("next_line", 512, number, tokenizer=tokenizer) for number in range(4)]
    tokens = [sum(map(len, prompt.ids(tokenizer))) for prompt in drawn]
    assert len(set(tokens)) > 1
    for window in (512, 530, 600):
        monkeypatch.setattr(model.config, "max_position_embeddings", window)
        evaluate.evaluate(model, tokenizer, full, "next_line", 512, range(4), name="")
        assert limits.pop() == [min(64, window - count + 1) for count in tokens]
        assert limits == []


# Methods with a prefill of their own, and sparse ones


@pytest.fixture
def registered(monkeypatch):
    """`registered(cls)` makes a class reachable by its name for one test."""
    return lambda cls: monkeypatch.setitem(METHODS, cls.__name__, cls)


@pytest.mark.parametrize("task", ["needle", "next_line"])
def test_a_prefill_of_its_own_changes_nothing_by_itself(model, small, registered, monkeypatch, task):
    used = {"needle": model, "next_line": small}[task]

    class Own(SnapKV):
        own_prefill = True

    registered(Own)
    arguments = (task, {"needle": 160, "next_line": 512}[task], range(5))
    both = [Configuration(name, 0.4, '{"kernel": 15}') for name in ("snapkv", "Own")]
    table = evaluate.evaluate(*used, both, *arguments, name="")
    shared, own = (table[table["method"] == c.method].reset_index(drop=True) for c in both)
    assert own["prefill_flops"].isna().all() and shared["prefill_flops"].notna().all()
    columns = ["sample", *evaluate.MEASURED, "torch"]
    pd.testing.assert_frame_equal(*(side[columns].drop(columns="prefill_flops") for side in (shared, own)))
    # and without methods that share one there is no shared prefill
    monkeypatch.setattr(kvlib, "snapshot", None)
    alone = evaluate.evaluate(*used, both[1:], *arguments, name="")
    pd.testing.assert_frame_equal(alone[columns], own[columns])


@pytest.mark.parametrize("cls", [Shorten, Reader])
@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("task", ["needle", "next_line"])
def test_methods_that_change_the_prefill(model, small, registered, cls, budget, task):
    """Batches of different lengths against one run a prompt."""
    registered(cls)
    (used, tokenizer), length = {"needle": (model, 160), "next_line": (small, 512)}[task]
    configuration = Configuration(cls.__name__, budget)
    table = evaluate.evaluate(used, tokenizer, [configuration], task, length, range(2), name="")
    for number, row in table.iterrows():
        drawn = tasks.sample(task, length, number, tokenizer=tokenizer)
        first, rest = parts(drawn, tokenizer, "asked")
        with configuration.make()(used) as run, torch.no_grad():
            run.read(input_ids=first)
            stored, full = run.stored_bytes(), run.full_bytes()
            logits, made, reads = run.follow(rest).logits[:, -1], [], []
            for _ in range(64 if task == "next_line" else 8):
                made.append(logits.argmax(-1))
                logits = used(made[-1][:, None], past_key_values=run.cache).logits[:, -1]
                reads.append(run.read_bytes())
        text = tokenizer.decode(torch.cat(made), skip_special_tokens=task == "next_line")
        assert row["value"] == tasks.score(drawn, text)
        assert (row["stored_bytes"], row["full_bytes"]) == (stored, full)
        assert row["read_bytes"] == (reads[0] if cls is Reader else stored)


@pytest.mark.parametrize("task", ["needle", "next_line"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_are_those_of_the_first_step(small, registered, task, protocol):
    """Also of a model whose first choice is wrong already."""

    class Sparse(Full):
        def attend(self, view):
            if view.step.decoding:
                view.note_read(100 * view.step.index * (1 + view.tokens))
            return super().attend(view)

    registered(Sparse)
    table = evaluate.evaluate(*small, [Configuration("Sparse", 1.0)], task, 512, range(3), name="", protocol=protocol)
    drawn = [tasks.sample(task, 512, number, tokenizer=small[1]) for number in range(3)]
    before = [sum(map(len, prompt.ids(small[1]))) for prompt in drawn]  # the first token that is decoded sees one more
    assert table["read_bytes"].tolist() == [2 * 100 * (2 + tokens) for tokens in before]  # of two layers
