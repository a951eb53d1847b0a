"""Benchmarks from files to a table, on a tiny checkpoint of Llama 3's kind; generators and judges one by one.

No question here was asked of a published model, and no file is a published one.
"""

import copy
import gzip
import itertools
import json
import math
import re
import shutil
import zipfile
from dataclasses import replace
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
from kvlib import paths
from kvlib.lab import definitions, tasks
from kvlib.lab.evaluation.benchmarks import answering, choices, load, longbench, programs, questions, ruler
from kvlib.lab.evaluation.benchmarks.answering import answer, has_ended, ids_of
from kvlib.lab.evaluation.benchmarks.loading import data as read_once
from kvlib.lab.evaluation.benchmarks.plus import CHECK, EQUAL, RULES, arguments, from_plus
from kvlib.lab.evaluation.benchmarks.registry import BENCHMARKS
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.functions import run
from kvlib.lab.results.keys import key
from kvlib.lab.results.paper_studies import STUDIES
from kvlib.lab.results.study import FULL, Study
from kvlib.lab.sweeps import differences, paper
from kvlib.lab.tasks import natural

MADE_UP = Path(__file__).parent / "benchmarks"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
WINDOW = 1024
READ = ("longbench/qasper", "longbench/qasper_e", "longbench-v2", "ruler/niah_single_1", "ruler/qa_1", "ruler/qa_2")
TASKS = (*READ, *programs.TASKS)
SMALL = Study(TASKS, 500, (FULL, Configuration("snapkv", 0.5)), {"smollm2": 2}, measure="benchmarks")


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
    texts = [*ruler.ONE_NEEDLE, *ruler.NEEDLES, *ruler.DOCUMENTS, *ruler.FREQUENT, *ruler.VARIABLES]
    bytewise.train_from_iterator([*texts, (MADE_UP / "book.txt").read_text()], trainer)
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
    for name in ("squad.json", "hotpotqa.json"):
        (tmp_path / name).write_text((MADE_UP / name).read_text())
    for name, file in {"humaneval": "HumanEval", "humaneval_plus": "HumanEvalPlus", "mbpp_plus": "MbppPlus"}.items():
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


def ask(task: str, tokenizer, length: int, window: int | None = WINDOW, samples: int = 1) -> list[questions.Question]:
    """The first questions of a task."""
    found = questions.find(task)
    return found.ask(read_once(found.read), range(samples), tokenizer, length, window)


# From files to a table


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the rows of the study "small" and what is made of them go."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setitem(STUDIES, "small", SMALL)
    return tmp_path / "build"


def test_from_files_to_a_table(data, checkpoint, place, monkeypatch, capsys):
    paper.main([str(checkpoint), "small"])
    folder = place / f"paper-{checkpoint.name}"
    table = next(folder.rglob("small.parquet"))
    rows = pd.read_parquet(table)
    assert len(rows) == len(TASKS) * 2 * 2 and rows["value"].between(0, 1).all() and rows["prediction"].str.len().any()
    full = rows["method"] == "full"
    assert (rows["stored_bytes"] == rows["full_bytes"])[full].all()
    assert (rows["stored_bytes"] / rows["full_bytes"])[~full].between(0.45, 0.55).all()
    means = pd.read_csv(table.with_suffix(".csv"))
    assert len(means) == len(TASKS) * 2 and (means["samples"] == 2).all()
    said = capsys.readouterr().out
    assert (folder / "small.md").read_text() in said and str(folder / "figures" / "small_0.5.svg") in said
    # A run that was stopped makes what is missing, and nothing else.
    made, plain = [], answering.answer
    monkeypatch.setattr(answering, "answer", lambda *given: made.append(given[2]) or plain(*given))
    next(table.parent.rglob("*humaneval-0*.parquet")).unlink()
    before = table.read_bytes()
    table.unlink()
    paper.main([str(checkpoint), "small"])
    assert made == 2 * list(SMALL.configurations) and table.read_bytes() == before


def test_what_methods_cost():
    """Paired: a task on which a method loses the same samples again and again has a narrow interval."""
    cell = {"model": "m", "arguments": "{}", "length": 1, "protocol": "asked", "stored_bytes": 2, "full_bytes": 4}
    rows = pd.DataFrame(
        {**cell, "task": task, "sample": n, "method": method, "budget": budget, "value": value}
        for task, lost in (("a", 0), ("b", 20))
        for n in range(40)
        for method, budget, value in (("full", 1.0, n % 2), ("snapkv", 0.5, n % 2 if n >= lost else 0))
    )
    found = differences.against_full(rows).set_index("task")
    assert list(found.index) == [differences.MEAN, "a", "b"] and (found["stored"] == 0.5).all()
    assert found["full"].tolist() == [50, 50, 50] and found["score"].tolist() == [37.5, 50, 25]
    assert found["value"].tolist() == [-12.5, 0, -25] and (found["samples"] == [80, 40, 40]).all()
    assert found.loc["a", "low"] < 0 < found.loc["a", "high"] and found.loc["b", "high"] < 0
    assert "| b | 40 | 50.00 | 25.00 (-4" in differences.page("study", differences.against_full(rows), "points")
    alone = differences.against_full(rows[rows["task"] == "a"], scale=1)
    assert list(alone["task"]) == ["a"] and alone["full"].item() == 0.5


def test_without_data_a_line_says_what_is_missing(checkpoint, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    monkeypatch.setitem(STUDIES, "small", replace(SMALL, tasks=("ruler/fwe", "ruler/niah_single_2", "humaneval")))
    paper.main([str(checkpoint), "small", "longbench_v2", "ruler_4k", "--samples", "1"])
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("ruler/niah_single_2: not measured, PaulGrahamEssays.json is missing") for line in said)
    assert f"ruler_4k: not measured, length=4096: the model's window is {WINDOW} tokens" in said
    missing = next(
        line for line in said if line.startswith("longbench_v2: not measured, longbench-v2: longbench_v2.json")
    )
    assert missing.endswith("it is data.json of zai-org/LongBench-v2 on the hub") and "is not set" not in missing
    assert set(pd.read_parquet(next(place.rglob("small.parquet")))["task"]) == {"ruler/fwe"}


@pytest.mark.parametrize("task", ["longbench/qasper", "ruler/niah_single_1", "humaneval"])
def test_the_full_cache_answers_as_stock_generate(data, pair, task):
    model, tokenizer = pair
    question = ask(task, tokenizer, 900, WINDOW)[0]
    ids = torch.tensor([ids_of(question, tokenizer)])
    with torch.no_grad():
        stock = model.generate(ids, max_new_tokens=question.max_new_tokens, do_sample=False)
    found = answer(model, tokenizer, Configuration("full", 1.0), question)
    assert found["prediction"] == tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True) != ""


def test_solutions_are_run(data, pair):
    """A model that wrote the reference, blank lines in front, and then went on, would pass."""
    for task in ("humaneval", "humaneval+"):
        rows = load(task)
        for row, question in zip(rows, ask(task, pair[1], 900, samples=len(rows)), strict=True):
            assert question.prompt == row["prompt"].strip() != row["prompt"]
            solution = f"\n    done = 1\n\n{row['canonical_solution']}"
            for end in programs.ENDS:
                assert question.judge(f"{solution}{end} is no Python") == 1
            assert question.judge(f"{solution}\n is no Python") == 0 == question.judge("\n    return")


def test_programs_behind_three_examples(data, pair):
    row, question = published("mbpp")[2], ask("mbpp", pair[1], 900)[0]
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
    question = ask("longbench/samsum", tokenizer, 900, WINDOW)[0]
    assert question.ends == ("\n",) and ask("longbench/qasper", tokenizer, 900, WINDOW)[0].ends == ()
    for text, ended in {"": False, "\n\n": False, "\none": False, "one\n": True, "\none\ntwo": True}.items():
        ids = torch.tensor([tokenizer(f"\n{text}", add_special_tokens=False).input_ids])
        ids = torch.cat([ids[:, :1], torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]).long()], 1)
        assert has_ended(tokenizer, ("\n", "[DONE]"), ids, None).tolist() == [ended]
    longer = replace(question, max_new_tokens=12)
    whole = answer(model, tokenizer, Configuration("full", 1.0), replace(longer, ends=()))["prediction"]
    end = whole.lstrip("\n")[3]
    part = answer(model, tokenizer, Configuration("full", 1.0), replace(longer, ends=(end,)))["prediction"]
    assert whole.startswith(part) and end in part and len(part) < len(whole)


def test_rows_are_told_apart_by_data_and_code(data, checkpoint, tmp_path, monkeypatch):
    def keys() -> dict[str, str]:
        return {task: key(str(checkpoint), task, SMALL, FULL) for task in TASKS}

    before = keys()
    assert len(set(before.values())) == len(TASKS) and before == keys()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(data, elsewhere)
    (elsewhere / "squad.json").write_text((data / "squad.json").read_text().replace("red", "green"))
    monkeypatch.setenv("KVLIB_DATA", str(elsewhere))
    assert [task for task, now in keys().items() if now != before[task]] == ["ruler/qa_1"]
    reached = {task: definitions.closure(map(definitions.name_of, questions.find(task).functions)) for task in TASKS}
    judged = {task for task, names in reached.items() if "kvlib.lab.functions.child:judge" in names}
    assert judged == set(programs.TASKS)  # which runs as a program, where no name leads
    scored = {task for task, names in reached.items() if "kvlib.lab.evaluation.metrics:METRICS" in names}
    assert scored == {"longbench/qasper", "longbench/qasper_e"}


def test_without_a_template_the_lead_ends_the_prompt(pair):
    tokenizer = pair[1]
    question = questions.Question("Where is it?", " Answer:", 1, True, float)
    chat = tokenizer.decode(ids_of(question, tokenizer))
    assert chat.startswith(SPECIAL[0]) and chat.endswith("assistant<|end_header_id|>\n\n Answer:")
    for said, plain in ((replace(question, chat=False), tokenizer), (question, copy.copy(tokenizer))):
        if plain is not tokenizer:
            plain.chat_template = None
        assert ids_of(said, plain) == tokenizer("Where is it? Answer:").input_ids


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
        for question in ask(task, tokenizer, 60, samples=2):
            text = tokenizer.decode(ids_of(question, tokenizer))
            assert text.endswith("<|end_header_id|>\n\n") is wrapped and text.count(SPECIAL[0]) == 1
            if wrapped:
                assert len(tokenizer(question.prompt).input_ids) <= 62


def test_template_and_answer_have_room(data, pair):
    tokenizer = pair[1]
    cut = ask("longbench/qasper", tokenizer, 900, 100)[0]
    assert len(tokenizer(cut.prompt).input_ids) <= 100 - questions.TEMPLATE_ROOM - 5 + 2
    made = ask("ruler/niah_single_1", tokenizer, 900, 900)[0]
    assert len(tokenizer(made.prompt + made.lead).input_ids) + 128 <= 900 - questions.TEMPLATE_ROOM
    assert tokenizer.decode(ids_of(made, tokenizer)).endswith(made.lead)


def test_too_long_for_the_window(pair):
    question = questions.Question("word " * WINDOW, "", 1, False, float)
    with pytest.raises(ValueError, match=f"window is {WINDOW}"):
        answer(*pair, Configuration("full", 1.0), question)


def test_studies_name_what_exists():
    for study in STUDIES.values():
        assert set(study.tasks) <= (set(questions.TASKS) if study.measure == "benchmarks" else set(tasks.BOOKS))
    with pytest.raises(ValueError, match="length=2048: the model's window is 1024"):
        ask("ruler/vt", None, 2048)
    with pytest.raises(ValueError, match="did you mean 'ruler/vt'"):
        questions.find("ruler/vtt")


# PG-19


def test_books_in_turn(tmp_path, monkeypatch, small):
    """Each that is long enough once, then each at another place; what is foretold follows in the book."""
    (tmp_path / "pg19" / "test").mkdir(parents=True)
    for number in range(4):
        book = "".join(natural.novel().pieces)[30_000 * number : 30_000 * (number + 1)]
        text = book if number < 3 else book[:2000]
        (tmp_path / "pg19" / "test" / f"{number}.txt").write_text(text.replace(" the ", f" the{number} "))
    old = BENCHMARKS["pg19"]
    monkeypatch.setitem(BENCHMARKS, "pg19", replace(old, files={"test": replace(old.files["test"], rows=4)}))
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    drawn = [tasks.sample("pg19", 600, seed, tokenizer=small) for seed in range(12)]
    assert drawn == [tasks.sample("pg19", 600, seed, tokenizer=small) for seed in range(12)]
    assert [set(re.findall(r" the([0-3]) ", prompt.text)) for prompt in drawn] == [{"0"}, {"1"}, {"2"}] * 4
    books = [" ".join(book.split()) for book in natural.books.read_books()]
    for seed, prompt in enumerate(drawn):
        assert " ".join((prompt.text + prompt.answer).removeprefix("<s>").split())[-300:] in books[seed % 3]
        assert 580 < prompt.length <= 600 and prompt.question == ""
    assert len({prompt.answer for prompt in drawn}) == 12
    with pytest.raises(ValueError, match="window 4 of a book: there are 4"):
        tasks.sample("pg19", 600, 12, tokenizer=small)
    with pytest.raises(ValueError, match="tokens=9000: no book is long enough"):
        tasks.sample("pg19", 9000, 0, tokenizer=small)


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


# HumanEval+ and MBPP+


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
        scope["check_plus"]("[[]]", reference, "f", "find_zero", most, EQUAL)
    else:
        with pytest.raises(AssertionError):
            scope["check_plus"]("[[]]", reference, "f", "find_zero", most, EQUAL)


def test_further_inputs_and_the_first_ones_both_count():
    row = published("humaneval_plus")[0]
    for inputs, other in (("base_input", "plus_input"), ("plus_input", "base_input")):
        only = from_plus({**row, inputs: [[[1, 2]]], other: []})
        assert not run(row["prompt"], "    return 1\n", only.asserts, seconds=10, megabytes=1024).passed


def test_programs_of_mbpp_plus(data, pair):
    for row, question in zip(load("mbpp+"), ask("mbpp+", pair[1], 900, samples=2), strict=True):
        assert question.prompt == row["prompt"] and not question.chat
        for end in question.ends:
            assert question.judge(f"{row['canonical_solution']}{end} is no Python") == 1
        assert question.judge(row["canonical_solution"].replace("return", "return not")) == 0
        named_alike = "\ndef check(x):\n  pass\n\ndef close(x):\n  pass\n"
        assert question.judge(named_alike + row["canonical_solution"]) == 1


@pytest.mark.parametrize(
    ("name", "given", "found", "wanted", "equal"),
    [
        ("are_equivalent", [1, 2], False, True, True),
        ("sum_div", [7], 0, 1, True),
        ("sum_div", [7], 2, 1, False),
        ("surface_Area", [3, 4], 35, 33, True),  # 9 + 6 * hypot(1.5, 4) = 34.6
        ("surface_Area", [3, 4], 36, 33, False),
        ("digit_distance_nums", [23, 156], 7, 6, True),  # of 0 2 3 and 1 5 6
        ("digit_distance_nums", [23, 156], 8, 6, False),
        ("similar_elements", [], (2, 1, 1), (1, 2), True),
        ("similar_elements", [], (1,), (1, 2), False),
        ("check_str", [], "a match", "another", True),
        ("check_str", [], True, "a match", True),
        ("check_str", [], None, "a match", False),
        ("another", [], 1, 2, False),
    ],
)
def test_what_else_counts_as_equal(name, given, found, wanted, equal):
    values = {"math": math, "found": found, "wanted": wanted, "given": given, "most": 0}
    assert bool(eval(RULES.get(name, EQUAL), values)) == equal


@pytest.mark.parametrize(
    ("number", "given", "wanted"),
    [
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        (75, [[[1], [2]], 3], [[(1,), (2,)], 3]),
        (106, [[1], [2]], [[1], (2,)]),
        (115, [[[1], [], 3]], [[{1}, {}, {}]]),
        (124, ["1.5", "1j"], [1.5, 1j]),
        (250, [[1], 2], [(1,), 2]),
        (252, ["2j"], [2j]),
        (259, [[[1], [2]]], [((1,), (2,))]),
        (278, [[1, [2]]], [(1, (2,))]),
        (307, [[1], 2, 3], [(1,), 2, 3]),
        (580, [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (722, [{"a": [1]}, 2], [{"a": (1,)}, 2]),
        (3, [[1]], [[1]]),
    ],
)
def test_what_json_cannot_say(number, given, wanted):
    assert arguments(f"Mbpp/{number}", [given]) == [wanted]
    assert arguments(f"HumanEval/{number}", [given]) == [given]


# RULER

ESSAYS = " ".join(f"Sentence {n} says that the {n} hens have laid {n * n} eggs." for n in range(40))


@pytest.fixture(scope="module")
def small():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm")


GENERATED = [name for name, made in ruler.TASKS.items() if made.read in (None, ruler.read_essays)]


@pytest.mark.parametrize("task", GENERATED)
def test_generated_samples(task, small):
    @settings(max_examples=4, deadline=None)
    @given(seed=st.integers(0, 10**6), length=st.integers(1800, 2800))
    def holds(seed, length):
        made = ruler.sample(task, length, seed, small, text=ESSAYS)
        used = len(small(made.prompt + made.lead).input_ids) + made.max_new_tokens
        assert 0.95 * length < used <= length
        same, other = (ruler.sample(task, length, number, small, text=ESSAYS) for number in (seed, seed + 1))
        assert made == same != other
        text = made.prompt.split("Memorize")[-1] if task == "cwe" else made.prompt  # whose words are any words
        counts = {x: len(re.findall(rf"(?<![\w-]){re.escape(x)}(?![\w-])", text)) for x in made.answers}
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
        prompt, _, wanted = ruler.common_words(Random(0), 10, ruler.Wanted(0, length))
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", prompt.split("Below is")[-1])
        assert {words.count(word) for word in wanted} == {often}
        assert {words.count(word) for word in set(words) - set(wanted)} == {seldom}


@pytest.mark.parametrize("task", GENERATED)
def test_the_shortest_study_holds_a_sample_of_every_task(task, small):
    made = ruler.sample(task, 4096, 0, small, text=ESSAYS)
    assert 3900 < len(small(made.prompt + made.lead).input_ids) + made.max_new_tokens <= 4096


def test_common_words_are_pairs_where_there_are_not_enough():
    most = len(ruler.every_word()) - 50
    for amount, joined in ((most, False), (most + 1, True)):
        prompt, _, wanted = ruler.common_words(Random(0), amount, ruler.Wanted(0, 4096))
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", prompt.split("Below is")[-1])
        assert len({*listed}) == amount + 10 and {*wanted} < {*listed}
        assert all("-" in word for word in listed) == joined


def test_coded_words_fall_as_the_square_of_their_rank():
    prompt, _, wanted = ruler.frequent_words(Random(0), 1000, ruler.Wanted(0, 1050))
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
    assert (ruler.score_any("It is 12.", ("77", "12")), ruler.score_any("It is 12.", ("77",))) == (1, 0)


def test_questions_among_documents(data):
    squad, hotpot = ruler.read_squad(), ruler.read_hotpot()
    assert [question["query"][:8] for question in squad["questions"]] == ["When doe", "What col"] + 6 * ["How old "]
    assert squad["documents"] == sorted(squad["documents"]) and len(squad["documents"]) == 8
    assert len(hotpot["documents"]) == 7 and [len(each["own"]) for each in hotpot["questions"]] == [3, 3, 3]
    for amount, text, seed in itertools.product(range(1, 20), (squad, hotpot), range(3)):
        prompt, lead, answers = ruler.among_documents(Random(0), amount, ruler.Wanted(seed, 0, text))
        question, shown = text["questions"][seed], re.findall(r"Document \d+:\n([^\n]*(?:\n[^\n]+)?)\n\n", prompt)
        own, near = ({text["documents"][at] for at in question[kind]} for kind in ("own", "near"))
        assert len(shown) == max(amount, len(own)) and own <= set(shown) and answers == question["answers"]
        assert len(set(shown)) == min(len(shown), len(text["documents"])) and prompt.endswith(question["query"])
        assert set(shown) <= own | near or near <= set(shown)  # of the same article first
    assert lead == " Answer:"
    made = ask("ruler/qa_1", AutoTokenizer.from_pretrained(paths.MODELS / "minilm"), 700, samples=2)
    assert made[0].judge("I say IN WINTER.") == 1 and made[1].judge("I say in winter") == 0


def test_too_few_tokens(small):
    with pytest.raises(ValueError, match="too few"):
        ruler.sample("vt", 200, 0, small)
