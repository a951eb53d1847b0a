"""Functions that models with and without anchors write: against `generate`, and by what is written for them."""

import pytest
import torch
from test_arms import ANCHOR, BASELINES, LAYERS, PLANTED, TOKEN_BYTES, alone, random_model
from transformers import AutoTokenizer

import kvlib
from kvlib.lab import tasks
from kvlib.lab.evaluation import arms, functions
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.equal_bytes import stored_entries
from kvlib.lab.functions import problem
from kvlib.methods.anchors import anchored
from kvlib.paths import MODELS

LENGTH = 768
OFTEN = {"ends": [202, *range(1000, 1400)]}
FULL = Configuration("full", 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm", padding_side="left")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(functions, "NEW_TOKENS", 20)


def draw(tokenizer, count: int = 3) -> list:
    return [tasks.sample("function", LENGTH, n, tokenizer=tokenizer) for n in range(count)]


def test_prompts_are_what_stands_above_a_body(tokenizer):
    for prompt in draw(tokenizer, 20):
        made = functions.problem_of(prompt)
        assert prompt.text == f"<s>{made.prompt}" and made.prompt.endswith('"""')
        assert prompt.length == len(tokenizer(prompt.text + prompt.answer, add_special_tokens=False).input_ids)
        assert f"{prompt.text}{prompt.answer}\n" == f"<s>{problem(prompt.seed).text}"
    assert len({prompt.text for prompt in draw(tokenizer, 20)}) == 20
    with pytest.raises(ValueError, match="tokens=400: function, seed 53, has 433"):
        tasks.sample("function", 400, 53, tokenizer=tokenizer)


def test_references_pass_and_what_is_written_instead_does_not(tokenizer, monkeypatch):
    """Whatever follows the function."""
    drawn = draw(tokenizer, 4)
    texts = [
        f"{drawn[0].answer}\n\n\ndef broken(:\n",
        "\n    return nothing_of_the_kind\ndef f",
        "\n    return (\n",
        drawn[3].answer,
    ]
    monkeypatch.setattr(functions, "written", lambda *_: texts)
    found = functions.score(kvlib.method("full"), arms.asked_of(random_model(), tokenizer, drawn), tokenizer)
    assert found["outcome"] == ["passed", "undefined name", "syntax", "passed"] and found["value"] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "completion", "complete"),
    [
        ("\n    x = 1\n    ", "\n    x = 1\n", False),
        ("\n    x = 1\n\n", "\n    x = 1\n", True),
        ("\n    x = 1\n    \n", "\n    x = 1\n", True),
        ("\n    x = 1\ndef f", "\n    x = 1\n", False),
        ("\n    x = 1\ndef f():\n", "\n    x = 1\n", True),
        ("\n    x = 1\n    return x", "\n    x = 1\n    return x", False),
        ("\n\n    x", "\n", True),
        (" # no\n    x = 1\n", " # no\n    x = 1\n", False),
        ("", "", False),
        ("\n", "\n", False),
    ],
)
def test_where_functions_end(text, completion, complete):
    assert functions.completion(text) == completion and functions.is_complete(text) == complete


def test_texts_are_what_generate_writes_and_bytes_those_of_every_token(tokenizer, few, monkeypatch):
    """Rows end at different tokens, and company does not matter."""
    model, texts = random_model(**OFTEN), []
    drawn = draw(tokenizer)
    monkeypatch.setattr(functions, "completion", lambda text: texts.append(text) or "")
    lengths = [11, 20, 16]
    ids = [anchored(prompt.text, tokenizer, model.config.anchorcoder) for prompt in drawn]
    written = [alone(model, row, most) for row, most in zip(ids, lengths)]
    assert all(row[-1] != ANCHOR for row in written)  # or the text would have ended before it
    ends = [tokenizer.decode([t for t in row if t != ANCHOR]) for row in written]
    monkeypatch.setattr(functions, "is_complete", lambda text: text in ends)
    found = functions.score(kvlib.method("anchorcoder"), arms.asked_of(model, tokenizer, drawn), tokenizer)
    assert texts == ends and sum(row.count(ANCHOR) for row in written) > 3
    for row, (prompt, made) in enumerate(zip(ids, written)):
        sizes = []
        for end in range(len(made)):
            with kvlib.method("anchorcoder")(model) as run, torch.no_grad():
                model(torch.tensor([prompt + made[:end]]))
                sizes.append(run.stored_bytes())
        assert found["stored_bytes"][row] == sizes[0] and found["peak_bytes"][row] == max(sizes)
        assert found["end_bytes"][row] == sizes[-1]


@pytest.mark.parametrize("configuration", [FULL, *BASELINES], ids=lambda c: c.method + c.arguments)
def test_bytes_of_other_methods(tokenizer, few, configuration):
    """Equal at the end of the prompt; those that evict while decoding stay there, the others grow by a token a step."""
    model = random_model()
    table = functions.evaluate(
        model, tokenizer, [configuration], "function", LENGTH, range(2), name="", protocol="bytes of per=4", block=2
    )
    for prompt, row in zip(draw(tokenizer), table.itertuples()):
        tokens = stored_entries(prompt.text, tokenizer, LAYERS, 4) // LAYERS
        if configuration == FULL:
            tokens = sum(map(len, prompt.ids(tokenizer)))
        unit = TOKEN_BYTES * LAYERS
        assert row.stored_bytes == tokens * unit
        grown = (row.end_bytes - row.stored_bytes) / unit
        assert grown == 0 if configuration.make().evicts_in_decode else 0 < grown < 20
        assert row.peak_bytes == row.end_bytes and row.value == float(row.outcome == "passed")


def test_what_is_not_run(tokenizer):
    with pytest.raises(ValueError, match="needle is judged by 'exact', not by 'run'"):
        functions.evaluate(random_model(**OFTEN), tokenizer, PLANTED, "needle", LENGTH, [0], name="")
