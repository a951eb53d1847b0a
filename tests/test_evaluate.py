"""The evaluator against plain greedy decoding, and a table against its own recomputation."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib import paths
from kvlib.lab import evaluate, results, tasks
from kvlib.lab.evaluate import Configuration, Study

CONFIGURATIONS = (
    Configuration("full", 1.0),
    Configuration("snapkv", 0.2, '{"kernel": 15}'),
    Configuration("h2o", 0.6),
    Configuration("random", 0.7),
)
STUDY = Study(tasks=("needle",), length=160, samples=6, configurations=CONFIGURATIONS)


@pytest.fixture(scope="module")
def model():
    return kvlib.load()


@pytest.fixture(scope="module")
def table(model):
    return evaluate.evaluate(*model, CONFIGURATIONS, "needle", STUDY.length, range(6), name="minilm", block=4)


def test_values_are_what_greedy_decoding_gives(model, table):
    model, tokenizer = model
    for configuration in CONFIGURATIONS:
        for number in range(6):
            drawn = tasks.sample("needle", STUDY.length, number, tokenizer=tokenizer)
            inputs = tokenizer(drawn.prompt, return_tensors="pt")
            with configuration.make()(model) as run:
                model(**inputs)
                stored, full = run.stored_bytes(), run.full_bytes()
                out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == tasks.correct(drawn, text)
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
            context = tokenizer(drawn.prompt[: -len(drawn.question)], return_tensors="pt").input_ids
            question = tokenizer(drawn.question, return_tensors="pt", add_special_tokens=False).input_ids
            with configuration.make()(model) as run, torch.no_grad():
                model(context)
                stored, text = run.stored_bytes(), []
                for token in question[0]:
                    logits = model(token.view(1, 1), past_key_values=run.cache).logits
                for _ in range(6):
                    text.append(logits[:, -1].argmax(-1))
                    logits = model(text[-1][:, None], past_key_values=run.cache).logits
            row = table[(table["method"] == configuration.method) & (table["sample"] == number)].iloc[0]
            assert row["value"] == tasks.correct(drawn, tokenizer.decode(torch.cat(text)))
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
        assert evaluate.prefill_flops(model, 5) == 2 * weights * 5 + 3 * 2 * pairs * (2 * 2 + 2 * 2) + 2 * 10 * 4


def test_a_table_that_was_changed_is_found_out(model, table):
    assert evaluate.verify(table, *model, STUDY, [1, 4]) == 1.0
    flipped = table.assign(value=table["value"].where(table["method"] != "full", 1 - table["value"]))
    with pytest.raises(ValueError, match="recomputed rows agree with the table"):
        evaluate.verify(flipped, *model, STUDY, [1, 4])
    with pytest.raises(ValueError, match="stored_bytes differs"):
        evaluate.verify(table.assign(stored_bytes=table["stored_bytes"] + 4), *model, STUDY, [1])
    with pytest.raises(ValueError, match="lacks 1 of 4 rows"):
        evaluate.verify(table[(table["method"] != "full") | (table["sample"] != 1)], *model, STUDY, [1])


def test_a_clamp_counts_for_the_rows_that_it_concerns(model):
    """Whatever else is in the block: of prompts of unequal lengths the shorter has no room for a window of 32."""
    model, tokenizer = model
    prompts = [tasks.sample("needle", tokens, 1, tokenizer=tokenizer) for tokens in (140, 400)]
    snapshot, question = evaluate.prefill(model, tokenizer, prompts, "prompt")
    answers = [tokenizer(s.answer, add_special_tokens=False).input_ids for s in prompts]
    columns = evaluate.score(model, kvlib.method("snapkv", budget=0.2), snapshot, question, answers, tokenizer)
    assert columns["clamped"] == [True, False]


@pytest.mark.parametrize("name", evaluate.STUDIES)
def test_the_shipped_table_is_that_of_today_s_code_and_models(name):
    study = evaluate.STUDIES[name]
    table, wanted = results.read(paths.RESULTS / f"{name}.parquet"), results.keys(study)
    assert len(results.current(table, wanted)) == len(table) == len(wanted) * study.samples, "make results"
    assert (table.groupby([*results.CELL])["sample"].nunique() == study.samples).all()
    share = table["stored_bytes"] / table["full_bytes"]
    assert (share <= 1.05 * table["budget"]).all()
