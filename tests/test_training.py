"""Training: what is learnt from, the loss and its optimiser, runs that stop, die and go on, and several processes."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import answer_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import kvlib
from kvlib.lab.tasks import sample, score
from kvlib.lab.tasks.prompt import splits
from kvlib.minilm import HELDOUT, MODEL, corpus, data, tokens
from kvlib.minilm.__main__ import main
from kvlib.minilm.data import PROSE_EVERY, Sequences, loader
from kvlib.minilm.export import export
from kvlib.minilm.recipe import RECIPES
from kvlib.minilm.report import answered, load_tokenizer
from kvlib.minilm.tokenizer import BOS, EOS, PAD, SIZE, encode
from kvlib.minilm.train import Run, compile_layers, losses, optimizer, train
from kvlib.paths import ROOT

TINY = replace(RECIPES["tiny"], steps=6)  # four with short sequences, two with long ones


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


def test_size_of_a_model_with_shared_heads():
    with torch.device("meta"):
        model = LlamaForCausalLM(replace(RECIPES["base"], width=192, kv_heads=2, mlp=272).config())
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


# Loss and optimiser


def reference_losses(logits, ids, weights) -> tuple[float, float, int]:
    """Position by position, in Python floats."""
    total, answer_total, answer_count = 0.0, 0.0, 0
    for row in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            scores, weight = logits[row, t - 1].tolist(), weights[row, t].item()
            nats = math.log(sum(math.exp(score) for score in scores)) - scores[ids[row, t]]
            total += weight * nats
            if weight > 1:
                answer_total, answer_count = answer_total + nats, answer_count + 1
    return total / (len(ids) * (ids.shape[1] - 1)), answer_total, answer_count


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**16))
def test_losses_against_a_loop(rows, length, seed):
    """Weights of padding, text and answers; that of the first token, which nothing predicts, does not count."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, length, 7, generator=generator)
    ids = torch.randint(7, (rows, length), generator=generator)
    weights = torch.tensor([0.0, 1.0, 4.0])[torch.randint(3, (rows, length), generator=generator)]
    found = losses(logits, ids, weights)
    assert [x.item() for x in found] == pytest.approx(reference_losses(logits, ids, weights), rel=1e-4, abs=1e-5)
    halves = logits.bfloat16()  # as under autocast: sums are taken in float32
    assert torch.equal(losses(halves, ids, weights)[0], losses(halves.float(), ids, weights)[0])
    # what lets ranks share a step, whatever padding and answers each of them has
    each = [losses(logits[i : i + 1], ids[i : i + 1], weights[i : i + 1])[0] for i in range(rows)]
    torch.testing.assert_close(torch.stack(each).mean(), found[0])


def test_only_matrices_inside_layers_decay():
    """Tied to the output, the embedding is one parameter."""
    model = LlamaForCausalLM(TINY.config())
    decayed, others = (group["params"] for group in optimizer(model, TINY).param_groups)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name_of[parameter].split(".")[-2] for parameter in decayed} == set(matrices)
    assert len(decayed) == TINY.layers * len(matrices)
    norms = {f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")}
    assert {name_of[parameter] for parameter in others} == norms | {"model.norm.weight", "model.embed_tokens.weight"}
    assert len(decayed) + len(others) == len(name_of)


def test_steps_are_those_of_adamw():
    """Three steps of the first entry of every parameter, by the formulas of Loshchilov and Hutter (2019)."""
    torch.manual_seed(0)
    recipe = replace(TINY, lr=0.01, weight_decay=0.3)
    model = LlamaForCausalLM(recipe.config())
    adamw = optimizer(model, recipe)
    expected = {name: [p.flatten()[0].item(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient, (value, first, second) = parameter.grad.flatten()[0].item(), expected[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            value *= 1 - 0.01 * (0.3 if "proj" in name else 0)
            value -= 0.01 * first / (1 - 0.9**step) / (math.sqrt(second / (1 - 0.95**step)) + 1e-8)
            expected[name] = [value, first, second]
        adamw.step()
    for name, parameter in model.named_parameters():
        assert parameter.flatten()[0].item() == pytest.approx(expected[name][0], abs=1e-6), name


# Runs


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


class Clock:
    """A clock that only what is named here moves on: 100 s for a start, 10 s for a sequence."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def on(self, seconds: float, function):
        def timed(*arguments):
            self.now += seconds
            return function(*arguments)

        return timed


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("kvlib.minilm.train.time", clock)
    monkeypatch.setattr("kvlib.minilm.train.optimizer", clock.on(100, optimizer))
    monkeypatch.setattr(Sequences, "__getitem__", clock.on(10, Sequences.__getitem__))
    return clock


def state(folder: Path) -> tuple[int, float]:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    return saved["step"], saved["seconds"]


def test_time_adds_up_over_starts(finished, tmp_path, clock):
    """Two steps each, of four sequences and then of two; what lies between a stop and a start does not count."""
    for expected in [(2, 180), (4, 360)]:
        assert not train(sequences(), tmp_path, minutes=0, workers=0, log_every=2)
        assert state(tmp_path) == expected
        clock.now += 10_000
    assert train(sequences(), tmp_path, minutes=0, workers=0, log_every=2)
    assert state(tmp_path) == (6, 500)
    assert json.loads((tmp_path / "training.json").read_text())["minutes"] == round(500 / 60, 1)
    assert curve(tmp_path) == [row for row in curve(finished) if int(row["step"]) % 2 == 0]
    with (tmp_path / "curve.csv").open() as file:  # 1024 in 40 s, then in 20 s; a start is no training
        assert [row["tokens_per_second"] for row in csv.DictReader(file)] == ["26", "26", "51"]


def test_an_older_checkpoint_takes_its_rows_and_its_time_with_it(finished, tmp_path, clock):
    """Put back twice, as where a machine was lost with what it had done since."""
    times, older = [], tmp_path / "older.pt"
    for step in range(1, 4):
        assert not train(sequences(), tmp_path, minutes=0, workers=0, log_every=1)
        times.append(state(tmp_path))
        if step == 1:
            shutil.copy(tmp_path / "checkpoint.pt", older)
    assert times == [(1, 140), (2, 280), (3, 420)]
    for _ in range(2):
        shutil.copy(older, tmp_path / "checkpoint.pt")
        assert not train(sequences(), tmp_path, minutes=0, workers=0, log_every=3)
        assert state(tmp_path) == (3, 140 + 100 + 80)
        assert [row["step"] for row in curve(tmp_path)] == ["1", "3"]  # not the second, which was lost
    shutil.copy(older, tmp_path / "checkpoint.pt")
    assert train(sequences(), tmp_path, minutes=60, workers=0, log_every=1)
    assert state(tmp_path) == (6, 140 + 100 + 160)
    assert_same_run(tmp_path, finished)


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    """Its time would grow with every start, and it would be said to have been made on the last machine."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "training.json").write_text("{}")
    assert train(sequences(), copy, minutes=60, workers=0)
    assert (copy / "training.json").read_text() == "{}" and state(copy) == state(finished)
    (copy / "training.json").unlink()  # killed before the last file
    assert train(sequences(), copy, minutes=60, workers=0)
    assert json.loads((copy / "training.json").read_text()).keys() >= {"minutes", "hardware"}
    assert_same_run(copy, finished)


def test_a_curve_is_never_half_written(tmp_path, monkeypatch):
    """Stopped while it writes, a run keeps the rows that a checkpoint goes on from."""
    run = Run(tmp_path, TINY, "")
    run.log({"step": 1})
    before = run.curve.read_text()

    def writerows(*_):
        raise OSError("no space left")

    monkeypatch.setattr(csv.DictWriter, "writerows", writerows)
    with pytest.raises(OSError, match="no space left"):
        run.log({"step": 2})
    assert run.curve.read_text() == before


@pytest.mark.deep
def test_two_processes_make_the_same_run(finished, tmp_path):
    """Under torchrun, with gradients averaged over them: the same but for rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for row, expected in zip(curve(tmp_path), curve(finished), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == value == "" or float(row[name]) == pytest.approx(float(value), rel=1e-4)
    assert json.loads((tmp_path / "training.json").read_text())["hardware"] == "2 x CPU"
    for name, tensor in weights(finished).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-3, rtol=0, msg=name)


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


def test_a_tiny_model_does_not_replace_the_shipped_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("kvlib.minilm.__main__.BUILD", tmp_path)
    before = (MODEL / "config.json").read_bytes()
    main(["export", "--recipe", "tiny", "--out", str(finished)])
    assert (MODEL / "config.json").read_bytes() == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny").config.hidden_size == TINY.width


# Duplicates


def shingles(text: str) -> set[tuple[str, ...]]:
    """Three lines each that follow one another, blank ones left out, stripped."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {tuple(lines[i : i + 3]) for i in range(len(lines)) if i == 0 or i + 3 <= len(lines)} if lines else set()


def texts(alphabet: str):
    """Of few different lines, so that texts share some; indented and spaced at random."""
    lines = st.tuples(st.sampled_from(["", "  "]), st.text(alphabet, max_size=1), st.sampled_from(["", "\n"]))
    return st.lists(lines, max_size=14).map(lambda found: "\n".join("".join(line) for line in found))


@given(st.lists(texts("abcd"), max_size=4), st.lists(texts("abcdefgh"), max_size=4))
def test_duplicates_against_sets_of_lines(heldout, training):
    """Held-out files first, as in the corpus."""
    duplicates, known, known_heldout = corpus.Duplicates(), set(), set()
    for text, in_training in [(text, False) for text in heldout] + [(text, True) for text in training]:
        mine = shingles(text)
        near = not mine or len(mine & known) / len(mine) >= 0.5
        copied = in_training and bool(mine) and len(mine & known_heldout) / len(mine) >= 0.1
        assert duplicates.admit(text, in_training) == (not near and not copied)
        if not near and not copied:  # what is dropped is not remembered
            known |= mine
            known_heldout |= set() if in_training else mine


def numbered(start: int, stop: int) -> str:
    return "".join(f"line {i}\n" for i in range(start, stop))


@pytest.mark.parametrize(("shared", "admitted"), [(0, True), (9, True), (10, False), (11, False), (100, False)])
def test_training_files_share_less_than_a_tenth_with_held_out_text(shared, admitted):
    """Of 100 runs of three lines; otherwise indented, with blank lines between."""
    duplicates = corpus.Duplicates()
    assert duplicates.admit(numbered(0, 1000), training=False)
    copied = numbered(0, shared + 2).replace("\n", "\n\n    ")
    assert duplicates.admit(numbered(2000, 2100 - shared) + copied, training=True) == admitted


@pytest.mark.parametrize(("shared", "admitted"), [(10, True), (49, True), (50, False)])
@pytest.mark.parametrize("first", [True, False])
def test_files_of_a_split_share_less_than_a_half(shared, admitted, first):
    """A tenth is nothing among training files, nor among held-out ones."""
    duplicates = corpus.Duplicates()
    assert duplicates.admit(numbered(0, 1000), training=first)
    assert duplicates.admit(numbered(0, shared + 2) + numbered(2000, 2100 - shared), training=first) == admitted


# Judging


DEEP = [pytest.param(task, marks=pytest.mark.deep) for task in ("two_hop", "long_generation")]


@pytest.mark.parametrize("task", ["needle", "exports", *DEEP])
def test_teacher_forcing_judges_as_greedy_decoding_does(task):
    """The right answer, and as answers what the model writes itself: cut everywhere, and with a wrong token anywhere.

    Then something is right, something wrong and something half right, however good the model is.
    """
    tokenizer = load_tokenizer()
    # float64, or rounding could decide between two tokens
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    drawn = sample(task, 192, 1, tokenizer=tokenizer)
    inputs = tokenizer(drawn.text, add_special_tokens=False, return_tensors="pt")
    enough = len(tokenizer(drawn.answer).input_ids) + 8
    out = model.generate(**inputs, max_new_tokens=enough, do_sample=False, pad_token_id=PAD)
    made = out[0, inputs.input_ids.shape[1] :].tolist()
    answers = [drawn.answer]
    for size in range(1, len(made)):
        changed = [*made[: size // 2], 10 + size, *made[size // 2 + 1 : size]]
        for ids in (made[:size], changed):
            text = tokenizer.decode(ids)
            # the same text in other tokens would count as wrong
            if encode(tokenizer, [text]) == [ids] and splits(drawn.lead, text, tokenizer):
                answers.append(text)
    wanted = [replace(drawn, answers=(answer,)) for answer in answers]
    shares = [score(one, tokenizer.decode(made)) for one in wanted]
    assert answered(model, wanted, size=3) == pytest.approx(shares)
    assert 0 in shares and 1 in shares and len(shares) > 6


if __name__ == "__main__":  # a rank of `test_two_processes_make_the_same_run`
    train(sequences(), Path(sys.argv[1]), minutes=60, workers=0, log_every=1)
