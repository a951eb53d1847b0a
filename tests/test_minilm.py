"""The embedded model and how it is made.

`python tests/test_minilm.py` records in minilm.json what the shipped model says, after it has been trained again.
"""

import fnmatch
import hashlib
import json
import re
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import kvlib
from kvlib.core.models import verify
from kvlib.lab.tasks import DROPPED, FAMILIES, PROBES, sample, score
from kvlib.minilm import HELDOUT, MODEL, PILOTS, card, corpus, overview, tokens
from kvlib.minilm import tokenizer as minilm_tokenizer
from kvlib.minilm.__main__ import main
from kvlib.minilm.recipe import RECIPES
from kvlib.minilm.report import load_tokenizer
from kvlib.minilm.tokenizer import BOS, EOS, PAD, PIECES, SIZE, SPECIAL, encode
from kvlib.paths import DATA, MODELS

RECORDED = Path(__file__).with_name("minilm.json")
RECORDED_TOKENS = 512


# Tokenizer


@cache
def trained_tokenizer():
    """A tokenizer learnt from text in which merging digits or newlines would pay."""
    return minilm_tokenizer.train(["x = 2024\n\n    y = 2024\n\n\tz\r\n\n" * 50])


TOKENIZERS = pytest.mark.parametrize("tokenizer", [load_tokenizer, trained_tokenizer])


def contents(tokenizer) -> list[bytes]:
    """The bytes that each ordinary token stands for."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(SPECIAL), len(tokenizer)))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE writes the others as 256, ...
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [bytes(byte_of[character] for character in piece) for piece in pieces]


@TOKENIZERS
@given(text=st.text() | st.text("ab_ \t\n\r09.(<s>/", max_size=40))
def test_any_text_survives(tokenizer, text):
    (ids,) = encode(tokenizer(), [text])
    assert not set(ids) & set(range(len(SPECIAL)))  # not even where the text spells </s>
    assert tokenizer().decode(ids) == text


@TOKENIZERS
def test_newlines_and_digits_stand_alone(tokenizer):
    pieces = contents(tokenizer())
    assert set(pieces) >= {bytes([byte]) for byte in range(256)}  # nothing is unknown
    assert [piece for piece in pieces if b"\n" in piece and len(piece) > 1] == []
    assert [piece for piece in pieces if len(piece) > 1 and re.search(rb"\d", piece)] == []


@TOKENIZERS
@given(lines=st.lists(st.text("ab_ \t\r09.é(", max_size=12), min_size=1, max_size=6))
def test_the_tokens_of_a_text_are_those_of_its_lines(tokenizer, lines):
    """What lets tasks count tokens line by line."""
    lines = [line + "\n" for line in lines]
    (whole,) = encode(tokenizer(), ["".join(lines)])
    assert whole == [token for ids in encode(tokenizer(), lines) for token in ids]


@TOKENIZERS
def test_special_tokens(tokenizer):
    made = tokenizer()
    assert made.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3]
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (BOS, EOS, PAD)
    assert made("a <ANCHOR>").input_ids[-1] == 3
    for ids in (made("x = 1").input_ids, made("").input_ids, made("a", "b").input_ids):
        assert ids[0] == BOS and ids.count(BOS) == 1 and EOS not in ids
    batch = made(["a", "a b c"], padding=True)
    assert batch.input_ids[0] == [PAD] * (len(batch.input_ids[1]) - 2) + made("a").input_ids
    assert [sum(mask) for mask in batch.attention_mask] == [2, len(batch.input_ids[1])]


def test_the_shipped_tokenizer_is_the_one_described():
    assert len(load_tokenizer()) == SIZE
    described = json.loads((MODEL / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]
    assert described["pattern"] == {"Regex": PIECES}


# Command


@pytest.mark.parametrize("steps", [["corpus", "train"], ["train"]])
def test_training_without_a_gpu_fails_before_any_work(steps, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(corpus, "build", lambda: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as stopped:
        main(steps)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "training takes minutes on a GPU, days without; no GPU was found (--recipe tiny runs on a CPU)" in error


# What is shipped


def assert_checksums(folder: Path) -> None:
    """Every file is listed, and as it is."""
    verify(folder)
    listed = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert sorted([*listed, "SHA256SUMS"]) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("folder", [MODEL, HELDOUT, *sorted(PILOTS.glob("*"))], ids=lambda folder: folder.name)
def test_checksums(folder):
    assert_checksums(folder)


def test_the_pilots_are_all_kept():
    assert {path.name for path in PILOTS.iterdir()} == {"pilot12", "pilot16", "seed1", "seed2"}


def test_the_card_is_that_of_the_files(tmp_path):
    copy = tmp_path / MODEL.name
    copy.mkdir()
    for name in card.STATISTICS:
        shutil.copy(MODEL / name, copy)
    card.write(copy)
    assert (copy / "README.md").read_text() == (MODEL / "README.md").read_text()
    assert_checksums(copy)


def test_the_overviews_are_those_of_the_files():
    assert (MODELS / "README.md").read_text() == overview.page()
    assert overview.BEGIN + overview.catalogue() + overview.END in (DATA / "README.md").read_text()


@pytest.mark.parametrize("folder", [MODEL, *sorted(PILOTS.glob("*"))], ids=lambda folder: folder.name)
def test_statistics_are_those_of_the_recipe(folder):
    name = "base" if folder == MODEL else folder.name
    training = json.loads((folder / "training.json").read_text())
    assert training["recipe"] == asdict(RECIPES[name])
    assert training["parameters"] == LlamaForCausalLM(RECIPES[name].config()).num_parameters()
    records = json.loads((folder / "evaluation.json").read_text())["retrieval"]
    scored = {record["task"] for record in records if record["length"] == RECIPES[name].length}
    assert scored == {*FAMILIES, *DROPPED, *PROBES}


def test_the_card_names_sinks_and_weak_tasks(tmp_path):
    """Numbers in the text follow the files, not only those in tables."""
    for name in card.STATISTICS:
        shutil.copy(MODEL / name, tmp_path)
    report = pd.read_csv(MODEL / "attention.csv").assign(top_four=0.1)
    report.loc[9, ["layer", "head", "bos", "top_four", "top_token"]] = [1, 1, 0.25, 0.31, "'def'"]
    report.to_csv(tmp_path / "attention.csv", index=False)
    evaluation = json.loads((MODEL / "evaluation.json").read_text())
    for record in evaluation["retrieval"]:
        record["score"] = 0.498 if record["task"] == "label" and record["length"] == 4096 else 0.5
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = card.card(tmp_path)
    assert "| ---: |\n| 1.1 | 25.0% | 31.0% | `'def'` |\n\n" in text
    assert "Below 50% at 4096 tokens: `label` 49.8%. Where" in text


def test_every_data_file_has_an_entry_in_the_guide():
    guide = (DATA / "README.md").read_text()
    patterns = re.findall(r"^\| `([^`]+)` \|", guide.split("\n## ")[0], re.MULTILINE)
    files = [path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()]
    missing = [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert missing == ["README.md"]
    for name in (path.name for path in MODEL.iterdir()):
        listed = re.findall(r"`([^`]+)`", guide.partition("## models/minilm")[2])
        assert any(fnmatch.fnmatch(name, pattern) for pattern in listed), name


def test_the_guide_gives_the_versions_of_the_held_out_packages():
    guide = (DATA / "README.md").read_text()
    listed = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", guide, re.MULTILINE))
    shipped = [json.loads(line) for kind in tokens.KINDS for line in (HELDOUT / f"{kind}.jsonl").open()]
    assert listed == {row["distribution"]: row["version"] for row in shipped}
    assert set(listed) == set(corpus.HELD_OUT)
    licences = re.findall(r"^==== (\S+) (\S+): ", (HELDOUT / "LICENSES.txt").read_text(), re.MULTILINE)
    assert set(licences) == set(listed.items())


@torch.no_grad()
def replies() -> list[dict]:
    """What the model writes in answer to one sample of each family, and its five likeliest first tokens."""
    model, tokenizer = kvlib.load("minilm")
    found = []
    for task in FAMILIES:
        drawn = sample(task, RECORDED_TOKENS, 0, tokenizer=tokenizer)
        inputs = tokenizer(drawn.text, add_special_tokens=False, return_tensors="pt")
        new = len(tokenizer(drawn.answer, add_special_tokens=False).input_ids) + 1
        greedy = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, **greedy)
        logits, ids = out.logits[0][0].topk(5)
        written = tokenizer.decode(out.sequences[0, inputs.input_ids.shape[1] :])
        found.append(
            {
                "task": task,
                "prompt_sha256": hashlib.sha256(drawn.text.encode()).hexdigest(),
                "answer": drawn.answer,
                "written": written,
                "correct": score(drawn, written) == 1,
                "ids": ids.tolist(),
                "logits": [round(x, 4) for x in logits.tolist()],
            }
        )
    return found


def test_the_shipped_model_says_what_it_said():
    """Prompts exactly; logits within what another CPU rounds differently (bfloat16 would be off by ten times that)."""
    recorded = json.loads(RECORDED.read_text())
    assert [reply["task"] for reply in recorded] == list(FAMILIES)
    assert sum(reply["correct"] for reply in recorded) >= 8
    for old, new in zip(recorded, replies(), strict=True):
        assert new.pop("logits") == pytest.approx(old.pop("logits"), abs=2e-3)
        assert new == old


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(replies(), indent=1) + "\n")
