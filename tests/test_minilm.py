"""The embedded model and how it is made.

`python tests/test_minilm.py` records in minilm.json what the shipped model says, after it has been trained again.
"""

import csv
import fnmatch
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import answer_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import kvlib
from kvlib.lab.tasks import FAMILIES, PROBES, correct, sample
from kvlib.minilm import HELDOUT, MODEL, PILOTS, SIBLING, card, corpus, data, overview, tokens
from kvlib.minilm import tokenizer as minilm_tokenizer
from kvlib.minilm.__main__ import main
from kvlib.minilm.data import PROSE_EVERY, Sequences, loader
from kvlib.minilm.evaluate import load_tokenizer
from kvlib.minilm.export import export
from kvlib.minilm.recipe import RECIPES
from kvlib.minilm.tokenizer import BOS, EOS, PAD, PIECES, SIZE, SPECIAL, encode
from kvlib.minilm.train import compile_layers, train
from kvlib.models import verify
from kvlib.paths import DATA, MODELS

RECORDED = Path(__file__).with_name("minilm.json")
RECORDED_TOKENS = 512
SHIPPED = [MODEL, SIBLING]
TINY = replace(RECIPES["tiny"], steps=6)  # four with short sequences, two with long ones


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


# Training sequences


@cache
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Some held-out code and prose as tokens; training text is not shipped."""
    texts = {kind: corpus.load(HELDOUT / f"{kind}.jsonl") for kind in tokens.KINDS}
    return tokens.flatten(load_tokenizer(), texts["code"][:12]), tokens.flatten(load_tokenizer(), texts["prose"][:12])


def sequences(recipe=TINY) -> Sequences:
    return Sequences(recipe, *arrays(), load_tokenizer())


def batches(recipe, first_step: int, rank: int, world: int, workers: int) -> list[list[torch.Tensor]]:
    """[ids, weights] of each of a rank's steps."""
    return list(loader(sequences(recipe), first_step, rank, world, workers))


@pytest.mark.parametrize(("world", "workers", "first_step"), [(1, 2, 0), (2, 0, 0), (4, 0, 1), (2, 2, 2), (4, 2, 3)])
def test_data_depend_on_seed_and_step_only(world, workers, first_step):
    """Not on the number of ranks or workers, nor on where a run was resumed."""
    recipe = replace(TINY, sequences=4, steps=4)
    expected = batches(recipe, 0, 0, 1, 0)[first_step:]
    shares = [batches(recipe, first_step, rank, world, workers) for rank in range(world)]
    for step, (ids, weights) in enumerate(expected):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), ids)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), weights)
    assert {len(share) for share in shares} == {len(expected)}
    (first, _), *_ = batches(replace(recipe, seed=1), first_step, 0, 1, 0)
    assert (first != expected[0][0]).any(1).all()  # another seed, other sequences


def test_a_sequence_depends_on_seed_and_number_only():
    """Not on what was drawn before it."""
    drawn, again, other = sequences(), sequences(), sequences(replace(TINY, seed=1))
    expected = [drawn[g] for g in range(len(drawn))]
    for g in reversed(range(len(drawn))):
        for part, same in zip(expected[g], again[g], strict=True):
            assert torch.equal(part, same)
        assert not torch.equal(expected[g][0], other[g][0])


@pytest.mark.parametrize("world", [1, 2])
def test_short_sequences_come_first(world):
    for rank in range(world):
        shapes = [tuple(ids.shape) for ids, _ in batches(TINY, 0, rank, world, 0)]
        assert shapes == [(4 // world, 256)] * 4 + [(2 // world, 512)] * 2


@pytest.mark.parametrize("name", RECIPES)
def test_all_steps_have_as_many_tokens(name):
    recipe = RECIPES[name]
    sizes = [recipe.shape(step) for step in range(recipe.steps)]
    assert {count * length for count, length in sizes} == {recipe.sequences * recipe.length}
    assert [length for _, length in sizes] == sorted(length for _, length in sizes)
    firsts = [recipe.first(step) for step in range(recipe.steps + 1)]
    assert firsts == [0, *np.cumsum([count for count, _ in sizes])]


def test_size_of_the_model_with_shared_heads():
    with torch.device("meta"):
        model = LlamaForCausalLM(RECIPES["gqa"].config())
    assert 5.2e6 < model.num_parameters() < 5.4e6
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (192, 256)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (64, 192)


@pytest.mark.parametrize("short", [TINY.short, 1024])
def test_every_sequence_has_one_bos_and_its_length(short):
    recipe = replace(TINY, short=short, length=2 * short, steps=20)
    drawn, lengths = sequences(recipe), [short] * 48 + [2 * short] * 16
    assert len(drawn) == len(lengths) > 2 * PROSE_EVERY
    for g, length in enumerate(lengths):
        ids, weights = drawn[g]
        assert len(ids) == len(weights) == length
        assert ids[0] == BOS and (ids == BOS).sum() == 1
        assert ((ids == PAD) == (weights == 0)).all()
        assert (g % 2 == 1) == bool((weights > 1).any())  # only retrieval has answers


@pytest.mark.parametrize("seed", range(4))
def test_answers_in_training_are_right(seed):
    """The tokens that weigh more are the answers, and each follows from the context before it."""
    drawn, tokenizer, checked = sequences(replace(TINY, short=1024, length=2048, seed=seed)), load_tokenizer(), 0
    for g in range(1, len(drawn), 2):
        ids, weights = (part.tolist() for part in drawn[g])
        context, start = [], 1
        for i in range(1, len(ids)):
            if ids[i] == EOS:
                context, start = [], i + 1
            elif weights[i] == TINY.answer_weight > weights[i - 1]:
                end = next(j for j in range(i, len(ids)) if weights[j] < TINY.answer_weight)
                text = tokenizer.decode(ids[start:i])
                question = text.rindex("\n", 0, -1) + 1  # which may end in a newline itself
                context = context or text[:question]
                assert answer_of(context + text[question:]) == tokenizer.decode(ids[i:end])
                assert tokenizer.decode(ids[end]) == "\n"
                checked += 1
    assert checked > 20


LONG = replace(TINY, steps=2000)
STARTS = [(0, LONG.short), (LONG.first(LONG.short_steps), LONG.length)]


@pytest.mark.parametrize(("start", "length"), STARTS, ids=["short", "long"])
def test_an_epoch_shows_every_window_once(start, length):
    drawn, (code, _) = sequences(LONG), arrays()
    size = length - 1
    windows = len(code) // size - 1
    indices = [i for i in range(3 * windows) if i % PROSE_EVERY != PROSE_EVERY - 1]
    first, second = (
        [drawn[start + 2 * i][0][1:].numpy() for i in indices[epoch * windows : (epoch + 1) * windows]]
        for epoch in (0, 1)
    )
    places = {code[place : place + size].tobytes(): place for place in range(size + windows * size)}

    def starts(epoch):
        return sorted(places[window.astype(np.uint16).tobytes()] for window in epoch)

    assert np.diff(starts(first)).tolist() == [size] * (windows - 1)
    assert np.diff(starts(second)).tolist() == [size] * (windows - 1)
    assert starts(first) != starts(second)  # cut at other places
    assert not np.array_equal(np.argsort([w.sum() for w in first]), np.argsort([w.sum() for w in second]))


def test_missing_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.jsonl is missing; make it with: python -m kvlib.minilm corpus"):
        corpus.load(tmp_path / "x.jsonl")


# Training


def curve(folder: Path) -> list[dict]:
    """The logged steps without their speed, the only thing that may differ."""
    with (folder / "curve.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run")
    assert train(sequences(), folder, minutes=60, workers=0, log_every=1, save_every=2)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert curve(folder) == curve(expected)
    assert [int(row["step"]) for row in curve(folder)] == list(range(1, TINY.steps + 1))
    for name, tensor in weights(expected).items():
        assert torch.equal(weights(folder)[name], tensor), name


def test_training_learns_and_reports(finished):
    rows = curve(finished)
    assert float(rows[-1]["heldout_loss"]) < np.log(SIZE)  # better than a guess
    rates = [float(row["lr"]) / TINY.lr for row in rows]
    assert rates == [0.5, 1, 1, 1, 1, 0.5]  # two steps of warm-up, two of decay
    assert [int(row["tokens"]) for row in rows] == [1024 * step for step in range(1, TINY.steps + 1)]
    summary = json.loads((finished / "training.json").read_text())
    assert summary["tokens"] == TINY.steps * TINY.sequences * TINY.length == int(rows[-1]["tokens"])
    assert summary["parameters"] == sum(w.numel() for n, w in weights(finished).items() if n != "lm_head.weight")


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, tmp_path, log_every):
    """Within the short and the long phase and between them."""
    calls = 1
    while not train(sequences(), tmp_path, minutes=0, workers=0, log_every=log_every):
        assert not (tmp_path / "training.json").exists()
        calls += 1
    assert calls == TINY.steps // log_every  # stopped at every logged step but the last
    rows = [row for row in curve(finished) if int(row["step"]) % log_every == 0]
    assert curve(tmp_path) == rows
    for name, tensor in weights(finished).items():
        assert torch.equal(weights(tmp_path)[name], tensor), name


class Deadly(Sequences):
    """Kills its process when sequence `fatal` is asked for."""

    fatal = TINY.first(4) + 1

    def __getitem__(self, g: int):
        if g == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(g)


def train_and_die(threads: int, deadly: Deadly, folder: Path) -> None:
    torch.set_num_threads(threads)  # as in the process that goes on, or sums would be rounded differently
    train(deadly, folder, minutes=60, workers=0, log_every=1, save_every=3)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """SIGKILL in the fifth step, the first with long sequences; the last checkpoint is of the third, so that one
    logged step is done again."""
    deadly = Deadly(TINY, *arrays(), load_tokenizer())
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=train_and_die, args=(torch.get_num_threads(), deadly, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(curve(tmp_path)) == 4
    assert train(sequences(), tmp_path, minutes=60, workers=0, log_every=1)
    assert_same_run(tmp_path, finished)


def test_a_folder_holds_one_run(finished):
    with pytest.raises(ValueError, match="holds a run of another recipe; choose another --out"):
        train(sequences(replace(TINY, lr=1.0)), finished, minutes=60, workers=0)


def test_a_run_goes_on_with_the_same_data_only(finished, monkeypatch):
    monkeypatch.setitem(data.MIX, "needle", 7.0)
    with pytest.raises(ValueError, match="holds a run on other tasks, tokens or tokenizer; choose another --out"):
        train(sequences(), finished, minutes=60, workers=0)


def test_sequences_must_divide_among_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="2 sequences a step cannot be shared by 3 processes"):
        train(sequences(), tmp_path, minutes=60, workers=0)


def test_compiling_keeps_the_names_of_the_weights():
    """Or no checkpoint would fit."""
    model = LlamaForCausalLM(TINY.config())
    before = set(model.state_dict())
    compile_layers(model)
    assert set(model.state_dict()) == before


def test_export_keeps_the_model(finished, tmp_path):
    """As far as bfloat16 can: the reloaded model computes with the rounded weights, and with nothing else rounded."""
    export(finished, tmp_path)
    reloaded, tokenizer = kvlib.load(str(tmp_path), dtype=torch.float32)
    model = LlamaForCausalLM(TINY.config()).eval()
    model.load_state_dict({name: weight.bfloat16() for name, weight in weights(finished).items()})
    ids = tokenizer("def half(x):\n    return x / 2\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert reloaded.config.dtype == torch.float32 and kvlib.load(str(tmp_path))[0].dtype == torch.bfloat16


def test_only_finished_runs_are_exported(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run; finish it with: python -m kvlib.minilm train"):
        export(tmp_path, tmp_path / "model")


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


def test_a_tiny_model_does_not_replace_the_shipped_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("kvlib.minilm.__main__.BUILD", tmp_path)
    before = (MODEL / "config.json").read_bytes()
    main(["export", "--recipe", "tiny", "--out", str(finished)])
    assert (MODEL / "config.json").read_bytes() == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny").config.hidden_size == TINY.width


# What is shipped


def assert_checksums(folder: Path) -> None:
    """Every file is listed, and as it is."""
    verify(folder)
    listed = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert sorted([*listed, "SHA256SUMS"]) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("folder", [*SHIPPED, HELDOUT, *sorted(PILOTS.glob("*"))], ids=lambda folder: folder.name)
def test_checksums(folder):
    assert_checksums(folder)


def test_the_pilots_are_all_kept():
    assert {path.name for path in PILOTS.iterdir()} == {"pilot12", "pilot16", "seed1", "seed2"}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_card_is_that_of_the_files(folder, tmp_path):
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in card.STATISTICS:
        shutil.copy(folder / name, copy)
    card.write(copy)
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text()
    assert_checksums(copy)


def test_the_overviews_are_those_of_the_files():
    assert (MODELS / "README.md").read_text() == overview.page()
    assert overview.BEGIN + overview.catalogue() + overview.END in (DATA / "README.md").read_text()


@pytest.mark.parametrize("folder", [*SHIPPED, *sorted(PILOTS.glob("*"))], ids=lambda folder: folder.name)
def test_statistics_are_those_of_the_recipe(folder):
    name = {"minilm": "base", "minilm-gqa": "gqa"}.get(folder.name, folder.name)
    training = json.loads((folder / "training.json").read_text())
    assert training["recipe"] == asdict(RECIPES[name])
    assert training["parameters"] == LlamaForCausalLM(RECIPES[name].config()).num_parameters()
    records = json.loads((folder / "evaluation.json").read_text())["retrieval"]
    scored = {record["task"] for record in records if record["length"] == RECIPES[name].length}
    assert scored == {*FAMILIES, *PROBES}


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
def replies(name: str) -> list[dict]:
    """What the model writes in answer to one sample of each family, and its five likeliest first tokens."""
    model, tokenizer = kvlib.load(name)
    found = []
    for task in FAMILIES:
        drawn = sample(task, RECORDED_TOKENS, 0, tokenizer=tokenizer)
        inputs = tokenizer(drawn.prompt, return_tensors="pt")
        new = len(tokenizer(drawn.answer, add_special_tokens=False).input_ids) + 1
        greedy = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, **greedy)
        logits, ids = out.logits[0][0].topk(5)
        written = tokenizer.decode(out.sequences[0, drawn.length :])
        found.append(
            {
                "model": name,
                "task": task,
                "prompt_sha256": hashlib.sha256(drawn.prompt.encode()).hexdigest(),
                "answer": drawn.answer,
                "written": written,
                "correct": correct(drawn, written),
                "ids": ids.tolist(),
                "logits": [round(x, 4) for x in logits.tolist()],
            }
        )
    return found


@pytest.mark.parametrize("name", [folder.name for folder in SHIPPED])
def test_a_shipped_model_says_what_it_said(name):
    """Prompts exactly; logits within what another CPU rounds differently (bfloat16 would be off by ten times that)."""
    recorded = [reply for reply in json.loads(RECORDED.read_text()) if reply["model"] == name]
    assert [reply["task"] for reply in recorded] == list(FAMILIES)
    assert sum(reply["correct"] for reply in recorded) >= 8
    for old, new in zip(recorded, replies(name), strict=True):
        assert new.pop("logits") == pytest.approx(old.pop("logits"), abs=2e-3)
        assert new == old


if __name__ == "__main__":
    RECORDED.write_text(json.dumps([reply for folder in SHIPPED for reply in replies(folder.name)], indent=1) + "\n")
