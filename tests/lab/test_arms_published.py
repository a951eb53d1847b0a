"""Published problems, made-up ones of the same schemas: against one pass over the text, and by what is written."""

import math

import pandas as pd
import pytest
import torch
from test_arms import ANCHOR, LAYERS, TOKEN_BYTES, random_model, stored
from test_arms_functions import OFTEN
from test_functions_published import ROW, TREE, rows
from transformers import AutoTokenizer

import kvlib
from kvlib import checksums
from kvlib.lab.evaluation import benchmarks, functions, published
from kvlib.lab.functions import KINDS
from kvlib.lab.tasks import Prompt
from kvlib.methods.anchors import anchored
from kvlib.paths import MODELS

LONG = ROW | {"task_id": 3, "text": f"Write a function {'to add a mark ' * 4}to each word."}
SETS = {"mbpp": [ROW, TREE | {"task_id": 511}, LONG], "humaneval": rows("humaneval")}
NUMBERS = {"mbpp": [3, 7, 511], "humaneval": [0, 1]}
SHA256 = {"smollm2-D1": "1" * 64, "smollm2-D2": "2" * 64}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm", padding_side="left")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(benchmarks, "load", SETS.__getitem__)
    monkeypatch.setattr(functions, "NEW_TOKENS", 4)


@pytest.fixture(params=[{}, OFTEN], ids=["dense", "anchors"])
def model(request):
    return random_model(**request.param)


def read_as(model, tokenizer, text: str) -> list[int]:
    planted = getattr(model.config, "anchorcoder", None)
    return anchored(text, tokenizer, planted) if planted else tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", SETS)
def test_prompts_and_references_are_the_published_ones(tokenizer, name):
    problems = published.problems_of(name)
    assert sorted(problems) == NUMBERS[name]
    for row, (number, problem) in zip(SETS[name], problems.items()):
        whole = published.SETS[name](row)
        prompt = published.prompt_of(name, number, problem, tokenizer)
        assert f"{prompt.text}{prompt.answer}\n" == f"<s>{whole.text}" and prompt.answer == f"\n{whole.solution}"
        assert prompt.text == f"<s>{problem.prompt}" and prompt.text.endswith('"""')
        assert (prompt.task, prompt.seed) == (name, number)


@pytest.mark.parametrize("name", SETS)
def test_bits_and_bytes_against_one_pass_over_the_text(tokenizer, model, name):
    table = published.evaluate(model, tokenizer, name)
    assert table["problem"].tolist() == NUMBERS[name] and (table["set"] == name).all()
    problems = published.problems_of(name)
    for row in table.itertuples():
        prompt = published.prompt_of(name, row.problem, problems[row.problem], tokenizer)
        before, ids = (read_as(model, tokenizer, text) for text in (prompt.text, prompt.text + prompt.answer))
        method = kvlib.method("anchorcoder") if hasattr(model.config, "anchorcoder") else kvlib.method("full")
        with method(model), torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        if hasattr(model.config, "anchorcoder"):
            logits[:, ANCHOR] = -math.inf
        costs = -logits.log_softmax(-1)
        places = [place for place in range(len(before), len(ids)) if ids[place] != ANCHOR]
        bits = sum(costs[place - 1, ids[place]].item() for place in places) / math.log(2)
        assert row.characters == len(prompt.answer) and row.bits == pytest.approx(bits / row.characters)
        assert row.tokens == len(tokenizer(prompt.text, add_special_tokens=False).input_ids)
        assert row.full_bytes == row.tokens * TOKEN_BYTES * LAYERS
        if hasattr(model.config, "anchorcoder"):
            assert row.stored_bytes == stored(model, before) != row.full_bytes
        else:
            assert row.stored_bytes == row.full_bytes < row.peak_bytes == row.end_bytes
        assert row.peak_bytes >= row.end_bytes and (row.torch, row.device) == (torch.__version__, "cpu")


def test_rows_do_not_depend_on_their_company(tokenizer, model, monkeypatch):
    sizes, score = [], published.score
    monkeypatch.setattr(published, "score", lambda *given: sizes.append(len(given[2])) or score(*given))
    together, alone = (published.evaluate(model, tokenizer, "mbpp", block) for block in (3, 1))
    pd.testing.assert_frame_equal(together, alone, rtol=1e-9)
    assert sizes == [3, 1, 1, 1] and together["tokens"].nunique() == 3


@pytest.mark.parametrize("name", SETS)
def test_references_pass_and_others_do_not(tokenizer, model, name, monkeypatch):
    """Behind a function whatever may follow; of MBPP the one that needs a second function is not whole."""
    solutions = {number: problem.solution for number, problem in published.problems_of(name).items()}

    def write(*given):
        return [f"\n{solutions[prompt.seed]}\n\n\ndef broken(:\n" for prompt in given[2].drawn]

    monkeypatch.setattr(functions, "written", write)
    outcomes = published.evaluate(model, tokenizer, name)["outcome"].tolist()
    if name == "mbpp":
        assert outcomes == ["undefined name", "undefined name", "passed"]
        solutions |= dict.fromkeys((3, 7), "    return [word + '!' for word in words]")
    assert (published.evaluate(model, tokenizer, name)["value"] == 1).all()
    solutions = dict.fromkeys(solutions, "    return 'nothing of the kind'")
    wrong = published.evaluate(model, tokenizer, name)
    assert (wrong["value"] == 0).all() and (wrong["outcome"] == "wrong value").all()


def test_blocks_hold_prompts_of_like_length():
    lengths = [100, 250, 4000, 120, 110, 210, 130, 199, 200]
    drawn = [Prompt("mbpp", n, "", "", "", ("",), length) for n, length in enumerate(lengths)]
    found = [[prompt.length for prompt in block] for block in published.blocks(drawn, 4)]
    assert found == [[100, 110, 120, 130], [199, 200, 210, 250], [4000]]
    assert [len(block) for block in published.blocks(drawn, 50)] == [6, 2, 1]


# The table


@pytest.fixture
def asked(tokenizer, tmp_path, monkeypatch):
    """The command in an empty folder; gives the models that it loads, and measures."""
    monkeypatch.setattr(published, "TABLE", tmp_path / "table.parquet")
    monkeypatch.setattr(published, "LISTED", tmp_path / "arms.csv")
    monkeypatch.setattr(published, "here", lambda names: [name for name in names if name in SHA256])
    list_as(tmp_path / "arms.csv", SHA256)
    loaded = []

    def load(name):
        loaded.append(name)
        return random_model(**({} if name == "smollm2-D1" else OFTEN)), tokenizer

    monkeypatch.setattr(kvlib, "load", load)
    return loaded


def list_as(file, sha256: dict[str, str]) -> None:
    pd.DataFrame({"arm": sha256.keys(), "sha256": sha256.values()}).to_csv(file, index=False)


def test_a_row_for_every_problem_and_no_text(asked, tmp_path, capsys):
    published.main([])
    table = pd.read_parquet(tmp_path / "table.parquet")
    cells = [(m, SHA256[m], s, n) for m in SHA256 for s in ("humaneval", "mbpp") for n in NUMBERS[s]]
    assert [*table[["model", "sha256", "set", "problem"]].itertuples(index=False, name=None)] == cells
    assert asked == [*SHA256] and "smollm2-D2, mbpp: 0 of 3 passed\n" in capsys.readouterr().out
    texts = table.select_dtypes(exclude="number")
    assert [*texts] == ["model", "sha256", "set", "outcome", "torch", "device"]
    assert set(table["outcome"]) <= {*KINDS} and table.notna().all(axis=None)
    assert checksums.listed(tmp_path) == {"table.parquet": checksums.digest(tmp_path / "table.parquet")}
    assert {file.name for file in tmp_path.iterdir()} == {"arms.csv", "table.parquet", checksums.NAME}


def test_rows_are_kept_while_their_arm_is_listed(asked, tmp_path, monkeypatch):
    published.main(["--models", "smollm2-D1"])
    published.main([])
    first = pd.read_parquet(tmp_path / "table.parquet")
    assert asked == ["smollm2-D1", "smollm2-D2"]
    published.main([])
    assert len(asked) == 2
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), first)
    list_as(tmp_path / "arms.csv", SHA256 | {"smollm2-D2": "3" * 64})
    monkeypatch.setattr(functions, "NEW_TOKENS", 6)  # rows that are made again can be told
    published.main([])
    again = pd.read_parquet(tmp_path / "table.parquet")
    old, new = first["model"] == "smollm2-D1", again["model"] == "smollm2-D2"
    assert asked[2:] == ["smollm2-D2"] and (again["sha256"] == [*["1" * 64] * 5, *["3" * 64] * 5]).all()
    pd.testing.assert_frame_equal(again[~new], first[old])
    assert (again[new]["end_bytes"] != first[~old]["end_bytes"]).any()


def test_what_was_measured_before_an_interrupt_stays(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "SETS", published.SETS | {"humaneval": lambda row: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        published.main([])
    assert pd.read_parquet(tmp_path / "table.parquet")["problem"].tolist() == NUMBERS["mbpp"]


def test_arms_that_are_not_listed(asked, capsys):
    with pytest.raises(SystemExit):
        published.main(["--models", "smollm2-D1", "smollm2-T-6"])
    assert "smollm2-T-6: not in arms.csv" in capsys.readouterr().err and not asked
