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
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.metrics import code_similarity, is_decided
from kvlib.lab.evaluation.prompts import Prompts, compressed
from kvlib.lab.results import keys, tables
from kvlib.lab.results.studies import PROTOCOLS, STUDIES, samples_of
from kvlib.methods.baselines import Full, SnapKV

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


def test_values_are_what_greedy_decoding_gives(model, table):
    model, tokenizer = model
    for configuration in CONFIGURATIONS:
        for number in range(6):
            drawn = tasks.sample("needle", LENGTH, number, tokenizer=tokenizer)
            inputs = tokenizer(drawn.text, add_special_tokens=False, return_tensors="pt")
            with configuration.make()(model) as run:
                model(**inputs)
                stored, full = run.stored_bytes(), run.full_bytes()
                out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == tasks.score(drawn, text)
            assert (row["stored_bytes"], row["full_bytes"]) == (stored, full)
    assert 0 < table["value"].mean() < 1, "all right or all wrong compares nothing"


def test_a_question_decoded_after_compression(model):
    """The context is compressed before the question is known: slower for every method, and harder for SnapKV."""
    model, tokenizer = model
    table = evaluate.evaluate(
        model, tokenizer, CONFIGURATIONS, "needle", 160, range(4), name="minilm", protocol="decoded"
    )
    for configuration in CONFIGURATIONS:
        for number in range(4):
            drawn = tasks.sample("needle", 160, number, tokenizer=tokenizer)
            context, question = halves(drawn, tokenizer)
            with configuration.make()(model) as run, torch.no_grad():
                model(context)
                stored, text = run.stored_bytes(), []
                for token in question[0]:
                    logits = model(token.view(1, 1), past_key_values=run.cache).logits
                for _ in range(6):
                    text.append(logits[:, -1].argmax(-1))
                    logits = model(text[-1][:, None], past_key_values=run.cache).logits
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == tasks.score(drawn, tokenizer.decode(torch.cat(text)))
            assert row["stored_bytes"] == stored and row["protocol"] == "decoded"
    assert 0 < table["value"].mean() < 1


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
        table = evaluate.evaluate(model, tokenizer, configuration, task, 300, range(4), name="")
        alone = evaluate.evaluate(model, tokenizer, configuration, task, 300, range(4), name="", block=1)
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
    prepared = evaluate.prepare(model, tokenizer, prompts, "prompt")
    columns = evaluate.score(kvlib.method("snapkv", budget=0.2), *prepared, prompts, tokenizer)
    assert columns["clamped"] == [True, False]


@pytest.mark.parametrize("name", STUDIES)
def test_the_shipped_table_is_that_of_today_s_code_and_models(name):
    study = STUDIES[name]
    table, wanted = tables.read(paths.RESULTS / f"{name}.parquet"), keys.keys(study)
    rows = samples_of(study) * len(study.configurations)
    assert len(keys.current(table, wanted)) == len(table) == rows, "make results"
    samples = table.groupby(evaluate.CELL)["sample"].nunique()
    assert (samples == samples.index.get_level_values("model").map(study.models)).all()
    assert (table["stored_bytes"] / table["full_bytes"] <= 1.05 * table["budget"]).all()


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
    most = [evaluate.NEW_TOKENS] * 6 + [2]
    prompts = Prompts(model, *tiny.pad(rows, extra=2))
    with compressed(prompts, method) as read, torch.no_grad():
        texts = evaluate.write(read.feed, read.keep, read.logits, letters, evaluate.end_tokens(model), most)
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


@pytest.mark.parametrize("task", ["next_line", "cross_file_line"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lines_are_judged_by_what_is_generated(small, task, protocol):
    model, tokenizer = small
    configurations = [Configuration("h2o", 0.3), Configuration("snapkv", 0.3)]
    table = evaluate.evaluate(model, tokenizer, configurations, task, 512, range(3), name="", protocol=protocol)
    for configuration in configurations:
        for number in range(3):
            drawn = tasks.sample(task, 512, number, tokenizer=tokenizer)
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            if protocol == "prompt":
                text = generated(model, tokenizer, configuration.make(), drawn)
            else:
                text = decoded(model, tokenizer, configuration.make(), drawn)
            assert row["value"] == code_similarity(text, drawn.answer)
    assert table["value"].nunique() > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bits_are_the_losses_of_the_answer_token_by_token(small, protocol):
    model, tokenizer = small
    configurations = [Configuration("h2o", 0.3), Configuration("snapkv", 0.3), Configuration("full", 1.0)]
    arguments = ("code_bits", 512, range(3))
    table = evaluate.evaluate(model, tokenizer, configurations, *arguments, name="", protocol=protocol)
    for _, row in table.iterrows():
        drawn = tasks.sample("code_bits", 512, row["sample"], tokenizer=tokenizer)
        context, question = halves(drawn, tokenizer)
        whole = tokenizer(drawn.text + drawn.answer, add_special_tokens=False, return_tensors="pt").input_ids
        begun = context.shape[1] + (question.shape[1] if protocol == "prompt" else 0)
        fed, answer = whole[0, begun:].tolist(), whole.shape[1] - context.shape[1] - question.shape[1]
        assert answer >= 64 and drawn.answer.endswith("\n")
        with kvlib.method(row["method"], budget=row["budget"])(model) as run, torch.no_grad():
            logits, nats = model(whole[:, :begun]).logits[0, -1], []
            for token in fed:
                nats.append(-logits.log_softmax(-1)[token].item())
                logits = model(torch.tensor([[token]]), past_key_values=run.cache).logits[0, -1]
        assert row["value"] == pytest.approx(sum(nats[-answer:]) / math.log(2) / len(drawn.answer), rel=1e-4)
    assert table["value"].nunique() == 9


def halves(drawn, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(1, tokens)` of the context and of what follows it."""
    context, question, lead = drawn.ids(tokenizer)
    return torch.tensor([context]), torch.tensor([[*question, *lead]])


def generated(model, tokenizer, method, drawn) -> str:
    inputs = tokenizer(drawn.text, add_special_tokens=False, return_tensors="pt")
    with method(model):
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def decoded(model, tokenizer, method, drawn) -> str:
    """64 tokens after a question that was fed token by token."""
    context, question = halves(drawn, tokenizer)
    with method(model) as run, torch.no_grad():
        model(context)
        for token in question[0]:
            logits = model(token.view(1, 1), past_key_values=run.cache).logits[:, -1]
        made, _ = tiny.decode(model, run, logits, 64)
    return tokenizer.decode(made[0], skip_special_tokens=True)  # the small model has no end token


def test_lines_end_with_the_window(small, monkeypatch):
    """Of every row for itself: a shorter prompt in the same block leaves more room."""
    model, tokenizer = small
    full, limits = [Configuration("full", 1.0)], []
    plain = evaluate.write
    monkeypatch.setattr(evaluate, "write", lambda *a: limits.append(a[-1]) or plain(*a))
    for window, room in ((512, 1), (530, 19), (600, 89)):
        monkeypatch.setattr(model.config, "max_position_embeddings", window)
        evaluate.evaluate(model, tokenizer, full, "next_line", 512, range(4), name="")
        drawn = [tasks.sample("next_line", 512, number, tokenizer=tokenizer) for number in range(4)]
        assert limits.pop() == [min(64, 512 - sum(map(len, s.ids(tokenizer))) + room) for s in drawn]
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
    table = evaluate.evaluate(used, tokenizer, [configuration], task, length, range(4), name="")
    for number, row in table.iterrows():
        drawn = tasks.sample(task, length, number, tokenizer=tokenizer)
        with configuration.make()(used) as run, torch.no_grad():
            logits = used(**tokenizer(drawn.text, add_special_tokens=False, return_tensors="pt")).logits[:, -1]
            stored, full = run.stored_bytes(), run.full_bytes()
            made, reads = [], []
            for _ in range(64 if task == "next_line" else 8):
                made.append(logits.argmax(-1))
                logits = used(made[-1][:, None], past_key_values=run.cache).logits[:, -1]
                reads.append(run.read_bytes())
        text = tokenizer.decode(torch.cat(made), skip_special_tokens=task == "next_line")
        assert row["value"] == (tasks.score(drawn, text) if task == "needle" else code_similarity(text, drawn.answer))
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
    parts = [s.ids(small[1]) for s in drawn]
    begun = [len(sum(each, [])) if protocol == "prompt" else len(each[0]) for each in parts]
    assert table["read_bytes"].tolist() == [2 * 100 * (2 + tokens) for tokens in begun]  # of two layers
