"""Benchmarks from files to a table, on a tiny checkpoint of Llama 3's kind; generators and judges one by one.

No question here was asked of a published model, and no file is a published one.
"""

import gzip
import json
import math
import re
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvlib
from kvlib.lab.evaluation.benchmarks import choices, longbench, programs, questions, ruler
from kvlib.lab.evaluation.benchmarks.answering import answer, has_ended, ids_of, key
from kvlib.lab.evaluation.benchmarks.plus import CHECK, from_plus
from kvlib.lab.evaluation.benchmarks.registry import BENCHMARKS
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.functions import run
from kvlib.lab.results import paper
from kvlib.lab.results.paper_studies import STUDIES, PaperStudy
from kvlib.paths import MODELS

MADE_UP = Path(__file__).parent / "benchmarks"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
WINDOW = 1024
TASKS = ("longbench/qasper", "longbench/qasper_e", "longbench-v2", "ruler/niah_single_1", *programs.TASKS)
SMALL = PaperStudy(TASKS, 500, (Configuration("full", 1.0), Configuration("snapkv", 0.5)))


def published(name: str) -> list[dict]:
    return [json.loads(line) for line in (MADE_UP / f"{name}.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with bfloat16 weights, stretched positions, grouped queries, and a tokenizer that marks turns."""
    folder = tmp_path_factory.mktemp("tiny-llama3")
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytewise.train_from_iterator([Path(ruler.__file__).read_text()], trainer)
    bytewise.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    stretched = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.3, rope_parameters=stretched,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(checkpoint):
    return kvlib.load(str(checkpoint))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder with made-up files under the real names, which the registry takes whatever they hold."""
    (tmp_path / "longbench").mkdir()
    with zipfile.ZipFile(tmp_path / "longbench/data.zip", "w") as archive:
        for name in ("qasper", "qasper_e", "samsum"):
            archive.write(MADE_UP / "longbench.jsonl", f"data/{name}.jsonl")
    (tmp_path / "longbench_v2.json").write_text(json.dumps(published("longbench_v2")))
    for name, file in {"humaneval": "HumanEval", "humaneval_plus": "HumanEvalPlus"}.items():
        (tmp_path / f"{file}.jsonl.gz").write_bytes(gzip.compress((MADE_UP / f"{name}.jsonl").read_bytes()))
    solved = [{**published("mbpp")[0], "task_id": number} for number in (*programs.EXAMPLES, 5)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, [*solved, *published("mbpp")])))
    for task in (*TASKS, "longbench/samsum"):
        if task in BENCHMARKS:
            old = BENCHMARKS[task]
            files = {split: replace(file, sha256=None, rows=None) for split, file in old.files.items()}
            monkeypatch.setitem(BENCHMARKS, task, replace(old, files=files))
    prompts = dict.fromkeys(longbench.LONGBENCH, "Read.\n{context}\nQuestion: {input}\nAnswer:")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "lengths.json").write_text(json.dumps(dict.fromkeys(longbench.LONGBENCH, 5)))
    monkeypatch.setattr(longbench, "LONGBENCH_PROMPTS", longbench.File("prompts.json"))
    monkeypatch.setattr(longbench, "LONGBENCH_LENGTHS", longbench.File("lengths.json"))
    monkeypatch.setattr(programs, "MAX_NEW_TOKENS", 5)
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    return tmp_path


# From files to a table


def test_from_files_to_a_table(data, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "BUILD", tmp_path / "build")
    monkeypatch.setitem(paper.STUDIES, "small", SMALL)
    paper.main([str(checkpoint), "small", "--samples", "2"])
    file = next((tmp_path / "build").rglob("small.jsonl"))
    rows = pd.DataFrame(paper.known(file).values())
    assert len(rows) == len(TASKS) * 2 * 2 and rows["value"].between(0, 1).all()
    full = rows["method"] == "full"
    assert (rows["stored_bytes"] == rows["full_bytes"])[full].all()
    assert (rows["stored_bytes"] / rows["full_bytes"])[~full].between(0.45, 0.55).all()
    means = pd.read_csv(file.with_suffix(".csv"))
    assert len(means) == len(TASKS) * 2 and (means["samples"] == 2).all()
    assert "small: scores in per cent" in capsys.readouterr().out
    # A stopped run leaves half a line; the next one makes that row, and no other.
    text = file.read_text()
    file.write_text(text[:-20])
    monkeypatch.setattr(
        paper, "answer", lambda *given, made=[]: made.append(0) or answer(*given) if not made else 1 / 0
    )
    paper.main([str(checkpoint), "small", "--samples", "2"])
    assert len(paper.known(file)) == len(rows)


def test_without_data_a_line_says_what_is_missing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "BUILD", tmp_path / "build")
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    paper.main([str(checkpoint), "longbench_v2"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("longbench-v2: not measured") and "longbench_v2.json" in said
    assert said.endswith("it is data.json of zai-org/LongBench-v2 on the hub") and "is not set" not in said


@pytest.mark.parametrize("task", ["longbench/qasper", "ruler/niah_single_1", "humaneval"])
def test_the_full_cache_answers_as_stock_generate(data, pair, task):
    model, tokenizer = pair
    question = questions.questions(task, tokenizer, 900, WINDOW, 1)[0]
    ids = torch.tensor([ids_of(question, tokenizer)])
    with torch.no_grad():
        stock = model.generate(ids, max_new_tokens=question.max_new_tokens, do_sample=False)
    found = answer(model, tokenizer, Configuration("full", 1.0), question)
    assert found["prediction"] == tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True) != ""


def test_solutions_are_run(data, pair):
    """A model that wrote the reference, blank lines in front, and then went on, would pass."""
    for task in ("humaneval", "humaneval+"):
        rows = questions.load(task)
        for row, question in zip(rows, questions.questions(task, pair[1], 900, WINDOW), strict=True):
            assert question.prompt == row["prompt"].strip() != row["prompt"]
            solution = f"\n    done = 1\n\n{row['canonical_solution']}"
            for end in programs.ENDS:
                assert question.judge(f"{solution}{end} is no Python") == 1
            assert question.judge(f"{solution}\n is no Python") == 0 == question.judge("\n    return")


def test_programs_behind_three_examples(data, pair):
    asked = questions.questions("mbpp", pair[1], 900, WINDOW)
    assert len(asked) == 3
    row, question = published("mbpp")[2], asked[0]
    begin = "You are an expert Python programmer, and here is your task:"
    example = (
        f"{begin} Write a function to add 1 to a number. Your code should pass these tests:\n\n"
        "assert add_1(1) == 2\n[BEGIN]\ndef add_1(x):\n  return x + 1\n[DONE]\n\n"
    )
    tests = "assert add_11(1) == 12"
    assert question.prompt == (
        f"{example * 3}{begin} {row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    assert question.ends == ("[DONE]",) and not question.chat
    assert question.judge(f"{row['code']}\n[DONE]\nis no Python") == 1
    assert question.judge(row["code"].replace("11", "12")) == 0 == question.judge("")


def test_an_answer_ends_at_its_ends(data, pair, monkeypatch):
    model, tokenizer = pair
    question = questions.questions("longbench/samsum", tokenizer, 900, WINDOW, 1)[0]
    assert question.ends == ("\n",) and questions.questions("longbench/qasper", tokenizer, 900, WINDOW, 1)[0].ends == ()
    for text, ended in {"": False, "\n\n": False, "\none": False, "one\n": True, "\none\ntwo": True}.items():
        ids = torch.tensor([tokenizer(f"\n{text}", add_special_tokens=False).input_ids])
        ids = torch.cat([ids[:, :1], torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]).long()], 1)
        assert has_ended(tokenizer, ("\n", "[DONE]"), ids, None).tolist() == [ended]
    longer = replace(question, max_new_tokens=12)
    whole = answer(model, tokenizer, Configuration("full", 1.0), replace(longer, ends=()))["prediction"]
    end = whole.lstrip("\n")[3]
    part = answer(model, tokenizer, Configuration("full", 1.0), replace(longer, ends=(end,)))["prediction"]
    assert whole.startswith(part) and end in part and len(part) < len(whole)


def test_rows_are_told_apart_by_metric_and_answers(data, pair):
    """What judges is code: another function, other arguments, or another of the things that it calls."""
    question = questions.questions("longbench/qasper", pair[1], 900, WINDOW, 1)[0]
    judge, full = question.judge, Configuration("full", 1.0)
    variants = [
        question,
        replace(question, judge=partial(judge.func, "samsum", **judge.keywords)),
        replace(question, judge=partial(judge.func, *judge.args, **{**judge.keywords, "answers": ["other"]})),
        replace(question, judge=partial(ruler.score, *judge.args, **judge.keywords)),
        replace(question, ends=("\n",)),
        replace(question, chat=False),
    ]
    assert len({key("a", each, full) for each in variants}) == len(variants)
    for task in TASKS:
        asked = questions.questions(task, pair[1], 900, WINDOW, 1)[0]
        assert key("a", asked, full) == key("a", asked, full) != key("b", asked, full)


def test_what_begins_the_answer_is_chosen_after_the_eviction(pair):
    """With two tokens left of the prompt, some first tokens must be others than the full cache's."""
    model, tokenizer = pair
    texts = [f"{word} {number} {word}" * 20 for number, word in enumerate(("gate", "road", "river", "stone"))]
    asked = [questions.Question(text, "", 1, False, lambda text: 0.0) for text in texts]
    first = {
        name: [answer(model, tokenizer, Configuration(name, budget), q)["prediction"] for q in asked]
        for name, budget in (("full", 1.0), ("streaming_llm", 0.05))
    }
    assert first["full"] != first["streaming_llm"]


def test_prompts_are_cut_and_wrapped(data, pair):
    tokenizer = pair[1]
    for task, wrapped in {"longbench-v2": True, "longbench/qasper": True, "humaneval": False}.items():
        for question in questions.questions(task, tokenizer, 60, WINDOW):
            text = tokenizer.decode(ids_of(question, tokenizer))
            assert text.endswith("<|end_header_id|>\n\n") is wrapped and text.count(SPECIAL[0]) == 1
            if wrapped:
                assert len(tokenizer(question.prompt).input_ids) <= 62


def test_template_and_answer_have_room(data, pair):
    tokenizer = pair[1]
    cut = questions.questions("longbench/qasper", tokenizer, 900, 100, 1)[0]
    assert len(tokenizer(cut.prompt).input_ids) <= 100 - questions.TEMPLATE_ROOM - 5 + 2
    made = questions.questions("ruler/niah_single_1", tokenizer, 900, 900, 1)[0]
    assert len(tokenizer(made.prompt + made.lead).input_ids) + 128 <= 900 - questions.TEMPLATE_ROOM
    assert tokenizer.decode(ids_of(made, tokenizer)).endswith(made.lead)


def test_too_long_for_the_window(pair):
    question = questions.Question("word " * WINDOW, "", 1, False, float)
    with pytest.raises(ValueError, match=f"window is {WINDOW}"):
        answer(*pair, Configuration("full", 1.0), question)


def test_studies_name_what_exists():
    for study in STUDIES.values():
        assert set(study.tasks) <= set(questions.TASKS)
        assert len({c.make() for c in study.configurations}) == len(study.configurations)
    with pytest.raises(ValueError, match="length=2048: the model's window is 1024"):
        questions.questions("ruler/vt", None, 2048, WINDOW)
    with pytest.raises(ValueError, match="did you mean 'ruler/vt'"):
        questions.questions("ruler/vtt", None, 1, None)


# LongBench v2


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **(D)**", "D"),
        ("The correct answer is D", "D"),
        ("The correct answer is A, or: The correct answer is (B)", "B"),
        ("the correct answer is (A)", None),
        ("(A)", None),
        ("The correct answer is (E)", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert choices.chosen(text) == letter
    assert choices.score(text, "B") == (letter == "B")


def test_prompt_of_longbench_v2():
    row = published("longbench_v2")[0]
    text = choices.prompt({**row, "context": f"\n {row['context']} \n"})
    assert f"<text>\n{row['context']}\n</text>" in text and f"\n(D) {row['choice_D']}\n\nFormat" in text


# HumanEval+


@pytest.mark.parametrize("row", published("humaneval_plus"), ids=lambda row: row["entry_point"])
def test_canonical_solutions_pass_and_wrong_ones_do_not(row):
    problem = from_plus(row)
    wrong = {"mean_of": "    return sum(xs) // len(xs)\n", "find_zero": "    return 0.5\n"}[row["entry_point"]]
    near = {"mean_of": "    return sum(xs) / len(xs) + 1e-8\n", "find_zero": "    return -xs[0] / xs[1] + 1e-8\n"}
    limits = {"seconds": 10, "megabytes": 1024}
    assert run(problem.prompt, row["canonical_solution"], problem.asserts, **limits).passed
    assert run(problem.prompt, near[row["entry_point"]], problem.asserts, **limits).passed
    assert run(problem.prompt, wrong, problem.asserts, **limits).kind == "wrong value"
    assert run(problem.prompt, wrong, from_plus({**row, "plus_input": []}).asserts, **limits).passed


@pytest.mark.parametrize(
    ("found", "wanted", "most", "equal"),
    [
        ("1 + 5e-7", "1.0", 0, True),
        ("1 + 2e-6", "1.0", 0, False),
        ("1 + 2e-6", "1.0", 1e-4, True),
        ("100.0 + 1.005e-5", "100.0", 0, True),  # 1e-6, and 1e-7 of the wanted number
        ("[1 + 5e-7]", "[1.0]", 0, True),
        ("(1 + 5e-7,)", "[1.0]", 0, False),
        ("[1 + 5e-7, 2.0]", "[1.0]", 0, False),
        ("[1 + 5e-7, 2]", "[1.0, 2]", 0, False),  # not all of them are floats: only what is equal
        ("[1 + 5e-7, 2]", "[1.0, 2]", 1e-6, True),
        ("[[1 + 5e-7]]", "[[1.0]]", 0, False),
        ("[[1 + 5e-7]]", "[[1.0]]", 1e-6, True),
        ("1", "1.0", 0, True),
        ("2", "2.0 + 1e-9", 0, False),  # of another type
        ("float('nan')", "float('nan')", 0, False),
        ("float('inf')", "float('inf')", 0, True),
        ("1.0", "float('inf')", 0, False),
        ("'ab'", "'ac'", 1e-6, False),
        ("None", "None", 0, True),
    ],
)
def test_how_close_numbers_must_be(found, wanted, most, equal):
    scope = {}
    exec(f"{CHECK}\ndef f():\n    return {found}", scope)
    reference = f"def f():\n    return {wanted}"
    if equal:
        scope["check"]("[[]]", reference, "f", "find_zero", most)
    else:
        with pytest.raises(AssertionError):
            scope["check"]("[[]]", reference, "f", "find_zero", most)


def test_further_inputs_and_the_first_ones_both_count():
    row = published("humaneval_plus")[0]
    for inputs, other in (("base_input", "plus_input"), ("plus_input", "base_input")):
        only = from_plus({**row, inputs: [[[1, 2]]], other: []})
        assert not run(row["prompt"], "    return 1\n", only.asserts, seconds=10, megabytes=1024).passed


# RULER

ESSAYS = " ".join(f"Sentence {n} says that the {n} hens have laid {n * n} eggs." for n in range(40))


@pytest.fixture(scope="module")
def small():
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


@pytest.fixture
def essays(tmp_path, monkeypatch):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": ESSAYS}))
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_generated_samples(task, small, essays):
    @settings(max_examples=4, deadline=None)
    @given(seed=st.integers(0, 10**6), length=st.integers(1800, 2800))
    def holds(seed, length):
        made = ruler.sample(task, length, seed, small)
        used = len(small(made.prompt + made.lead).input_ids) + made.max_new_tokens
        assert 0.95 * length < used <= length
        assert made == ruler.sample(task, length, seed, small) != ruler.sample(task, length, seed + 1, small)
        counts = {answer: len(re.findall(rf"(?<![\w-]){answer}(?![\w-])", made.prompt)) for answer in made.answers}
        assert len(counts) == len(made.answers) == expected(task)
        if task == "cwe":
            assert set(counts.values()) == {6}
        elif task == "fwe":
            words = re.findall(r"\b[a-z]{6}\b", made.prompt.split("words. ")[1].split("\nQuestion")[0])
            ranked = sorted(set(words), key=words.count, reverse=True)
            assert ranked[0] == made.answers[0] and set(ranked[:3]) == set(made.answers)
        elif task == "vt":
            example = made.prompt.split("\n\nMemorize")[0]
            assert re.search(r"they are:  ([A-Z]{3} ){4}[A-Z]{3}$", example) and example.count(ruler.NOISE) == 14
            assert [counts[name] for name in made.answers] == [2] * ruler.HOPS + [1]
        else:
            assert set(counts.values()) == {1}
            if task not in ("niah_multikey_2", "niah_multikey_3"):  # whose filling is needles
                assert made.prompt.count("One of the special magic") == (1 if "single" in task else 4)
        assert ruler.score(" ".join(made.answers).upper(), made.answers) == 1

    holds()


def expected(task: str) -> int:
    return {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(task, 1)


def test_long_lists_repeat_their_words_more_often():
    for length, often, seldom in ((4095, 6, 1), (4096, 30, 3)):
        prompt, _, wanted = ruler.common_words(Random(0), 10, length)
        words = re.findall(r"\d+\. (\S+)", prompt.split("Below is")[-1])
        assert {words.count(word) for word in wanted} == {often}
        assert {words.count(word) for word in set(words) - set(wanted)} == {seldom}


def test_coded_words_fall_as_the_square_of_their_rank():
    prompt, _, wanted = ruler.frequent_words(Random(0), 1000, 1050)
    words = prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = sorted({word: words.count(word) for word in words}.items(), key=lambda pair: -pair[1])
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == wanted
    assert [count for _, count in counts] == [int(1000 * 6 / (math.pi * rank) ** 2) for rank in range(1, 21)]


def test_a_chat_template_counts(small):
    for room in (0, 200):
        made = ruler.sample("niah_single_1", 1500, 0, small, room)
        assert 1400 - room < len(small(made.prompt + made.lead).input_ids) + 128 <= 1500 - room


def test_needles_stand_at_depths_of_essays():
    assert len(set(ruler.DEPTHS)) == 40 and (ruler.DEPTHS[0], ruler.DEPTHS[1], ruler.DEPTHS[-1]) == (0, 3, 100)
    assert ruler.inserted(["a", "b", "c"], [4, 0, 1], list("1234")) == ["a", "1", "b", "2", "3", "4", "c"]


def test_share_of_answers():
    assert math.isclose(ruler.score("It is 12 and ab.", ("12", "AB", "77")), 2 / 3)


def test_too_few_tokens(small):
    with pytest.raises(ValueError, match="too few"):
        ruler.sample("vt", 200, 0, small)
