"""Training with anchors: what arms read, what is trained, runs that stop and go on, and what is kept of them."""

import json
import lzma
import os
import shutil
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kvlib
from kvlib import smollm2
from kvlib.anchored import arms, bits, rows, train
from kvlib.anchored.__main__ import main
from kvlib.anchored.arms import ARMS, FIXED, LONGEST, Arm, second_layer
from kvlib.core import adapters
from kvlib.core import models as loading
from kvlib.lab.tasks.code import heldout_files
from kvlib.methods.anchor_training import training
from kvlib.methods.anchors import anchored, plant, split
from kvlib.minilm.report import load_tokenizer
from kvlib.minilm.schedule import Schedule

ANCHOR = 3  # of minilm
SCHEDULE = Schedule(sequences=2, length=1024, short=512, steps=4, short_share=0.5, lr=1e-3, warmup=1, decay=0.5)


# Arms


def test_the_released_layers():
    """16 layers, a full one in four: 0, 4, 8, 12; the second one is 4, read behind 12."""
    assert second_layer(4, 16) == (4, 12)
    assert second_layer(6, 16) == (6, 12) and second_layer(8, 16) == (8, 12) and second_layer(None, 16) == (4, 12)
    assert second_layer(6, 30) == (6, 22)


@given(st.integers(2, 12), st.integers(13, 80))
def test_the_second_layer_is_full_and_read_later(per, layers):
    source, beyond = second_layer(per, layers)
    assert source % per == 0 and 0 < source <= max(beyond, per) and beyond == 3 * layers // 4
    assert all(abs(source - layers // 4) <= abs(other - layers // 4) for other in range(per, layers, per))


def test_arms_differ_in_one_thing_each():
    """Steps of the ablation, and no two arms are the same."""
    assert len(set(ARMS.values())) == len(ARMS)
    paper = ARMS["minilm-TML-4"]
    assert replace(paper, second=False) == ARMS["minilm-TM-4"] and replace(paper, spread=False) == ARMS["minilm-TL-4"]
    assert replace(ARMS["minilm-TM-4"], spread=False) == ARMS["minilm-T-4"]
    assert replace(ARMS["minilm-T-4"], per=1) == ARMS["minilm-D2"] == replace(ARMS["minilm-AnLLM"], per=1)
    assert replace(paper, per=None) == ARMS["minilm-T0"] and replace(paper, anchors="fixed") == ARMS["minilm-FIX-4"]
    assert (
        replace(paper, whole=True) == ARMS["minilm-TML-4-whole"]
        and replace(ARMS["smollm2-D2"], per=6) == ARMS["smollm2-T-6"]
    )


def test_settings_make_the_method():
    for name, arm in ARMS.items():
        if arm.base == "minilm":
            found = arms.settings(arm, load_tokenizer(), 16)
            assert (found is None) == (arm.anchors == "none"), name
            if found is not None:
                made = kvlib.method("anchorcoder", **{**found, "ends": tuple(found["ends"])})
                assert made.anchor == ANCHOR and made.spread == arm.spread and (made.beyond is not None) == arm.second
                assert json.loads(json.dumps(found)) == found  # it stands in a configuration


# Text and its anchors


@cache
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that joins newlines, and a newline and the blanks behind it, as SmolLM2's does."""
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r"\s+(?!\S)|\w+| ?[^\s\w]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<anchor>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([file["text"] for file in heldout_files()[:10]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)


def test_the_tokenizer_joins_newlines():
    tokens = [merging().decode([token]) for token in merging()("a\n\n    b\n").input_ids]
    assert any(token.startswith("\n\n") for token in tokens)


@given(st.text("ab=(:\n \t\x0c\u2028é", max_size=60), st.sampled_from(["minilm", "merging"]))
def test_round_trip(text, kind):
    """Text to anchored tokens and back; an anchor behind every newline and nowhere else."""
    tokenizer, anchor = (load_tokenizer(), ANCHOR) if kind == "minilm" else (merging(), 0)
    found = {"anchor": anchor, "ends": arms.line_ends(tokenizer), "longest": None}
    ids = anchored(text, tokenizer, found)
    assert tokenizer.decode([token for token in ids if token != anchor]) == text
    assert ids.count(anchor) == text.count("\n")
    pieces = tokenizer.decode(ids).split("<ANCHOR>" if kind == "minilm" else "<anchor>")
    assert all(piece.endswith("\n") for piece in pieces[:-1]) and "\n" not in pieces[-1]
    assert "".join(split(text)) == text and all("\n" not in line[:-1] for line in split(text))


def test_where_no_token_reaches_over_a_newline_lines_need_no_care():
    text, found = heldout_files()[3]["text"], {"anchor": ANCHOR, "ends": arms.line_ends(load_tokenizer())}
    ids = load_tokenizer()(text, add_special_tokens=False).input_ids
    assert anchored(text, load_tokenizer(), {**found, "longest": 7}) == plant(ids, ANCHOR, found["ends"], 7)


def test_a_text_with_an_anchor():
    found = {"anchor": ANCHOR, "ends": arms.line_ends(load_tokenizer()), "longest": None}
    with pytest.raises(ValueError, match="already planted"):
        anchored("a = 1\n<ANCHOR>", load_tokenizer(), found)


# Rows


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Rows of a few steps, of held-out text; training text is not shipped."""
    folder = tmp_path_factory.mktemp("anchored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUILD", folder)
        patch.setattr(rows, "TEXT", folder / "text.jsonl.xz")
        with lzma.open(rows.TEXT, "wt") as file:
            for row in heldout_files()[:8]:
                print(json.dumps(row["text"]), file=file)
        rows.build("minilm", SCHEDULE, 2)
        yield folder


@pytest.fixture
def short(built, monkeypatch):
    """Arms that take as many steps as there are rows."""
    monkeypatch.setattr(rows, "BUILD", built)
    monkeypatch.setattr(Arm, "schedule", property(lambda arm: replace(SCHEDULE, seed=arm.seed)))
    return built


def read(name: str) -> rows.Rows:
    arm = ARMS[name]
    return rows.Rows(arm, load_tokenizer(), arms.settings(arm, load_tokenizer(), 16))


def test_all_arms_read_the_same(short):
    """The same tokens in the same order with the same weights, whatever is planted; another seed, another order."""
    texts = {}
    for name in ("minilm-D1", "minilm-D2", "minilm-TML-4", "minilm-FIX-4", "minilm-D2-seed1"):
        found = read(name)
        assert len(found) == SCHEDULE.first(SCHEDULE.steps) == 12
        texts[name] = []
        for n in range(len(found)):
            ids, weights = found[n]
            assert len(ids) == len(weights) == (512 if n < 8 else 1024)
            kept = (ids != ANCHOR) & (weights > 0)
            assert (weights[ids == ANCHOR] == 1).all() and (ids[weights == 0] == found.end).all()
            texts[name].append((ids[kept].tolist(), weights[kept].tolist()))
    assert texts["minilm-D1"] == texts["minilm-D2"] == texts["minilm-TML-4"]
    longest = max(range(12), key=lambda n: len(texts["minilm-D1"][n][0]))
    for n, (ids, _) in enumerate(texts["minilm-FIX-4"]):  # what does not fit is cut
        whole = texts["minilm-D1"][n][0]
        assert ids == whole[: len(ids)] and len(ids) >= min(len(whole), (512 if n < 8 else 1024) * FIXED // (FIXED + 1))
    other = texts["minilm-D2-seed1"]
    assert sorted(other[:8]) == sorted(texts["minilm-D2"][:8]) and other != texts["minilm-D2"] and longest >= 8
    assert sorted(other[8:]) == sorted(texts["minilm-D2"][8:]) and other[8:] != texts["minilm-D2"][8:]


def test_what_rows_hold(short):
    """Text, retrieval, text, functions; as much as fits, in whole lines, with anchors behind them."""
    found, tokenizer, sizes = read("minilm-D2"), load_tokenizer(), []
    for n in range(12):
        g, (ids, weights) = found.order[n], found[n]
        text = tokenizer.decode(ids[weights > 0])
        sizes.append((weights > 0).float().mean().item())
        kind = rows.KINDS[g % 4]
        assert ids[0] == tokenizer.bos_token_id and ("def " in text if kind == "functions" else True)
        assert (weights == rows.ANSWER).any() == (kind == "retrieval")
        ends = arms.line_ends(tokenizer)
        at = np.flatnonzero(np.isin(ids, ends))
        assert (ids[at + 1] == ANCHOR).all()
    assert min(sizes) > 0.6 and np.mean(sizes) > 0.85


def test_rows_of_text_fit_with_their_anchors():
    """Whole lines, in order, as many as fit, whatever the length; a document's end needs room, too."""
    writer, documents = rows.Writer("minilm"), ["a = 1\nb\n", "cc\n", "d = 4\n\n\n", "e"]
    for length in range(12, 40):
        made = list(writer.texts(documents, iter([length] * 12)))
        sizes = []
        for row in made:
            ids, _ = writer.ids(row, True)
            sizes.append(len(plant(ids.tolist(), ANCHOR, set(arms.line_ends(load_tokenizer())), LONGEST)))
        assert max(sizes) <= length and min(sizes) > length - 9
        assert "".join(text for row in made for text, _ in row).startswith("".join(documents))


def test_rows_depend_on_nothing_else(short, tmp_path, monkeypatch):
    """One process or two, the same rows."""
    text = rows.TEXT.read_bytes()
    monkeypatch.setattr(rows, "BUILD", tmp_path)
    monkeypatch.setattr(rows, "TEXT", tmp_path / "text.jsonl.xz")
    rows.TEXT.write_bytes(text)
    rows.build("minilm", SCHEDULE, 1)
    for file in (short / "rows/minilm").iterdir():
        assert file.read_bytes() == (tmp_path / "rows/minilm" / file.name).read_bytes()


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_base_that_cannot_be_loaded(short, monkeypatch, everywhere):
    """Rows are not waited for: it says why, or, where only the processes beside it fail, that they did."""
    here, load = os.getpid(), kvlib.load

    def broken(name):
        if everywhere or os.getpid() != here:
            raise OSError("no such weights")
        return load(name)

    def too_long(*_):
        raise TimeoutError

    monkeypatch.setattr(kvlib, "load", broken)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        with pytest.raises(OSError if everywhere else BrokenProcessPool) as found:
            rows.build("minilm", SCHEDULE, 2)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert str(found.value) == "no such weights" or not everywhere


def test_text_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TEXT", tmp_path / "text.jsonl.xz")
    with pytest.raises(FileNotFoundError, match=r"make it with: python -m kvlib.anchored text"):
        rows.build("minilm", SCHEDULE, 1)
    monkeypatch.setattr(rows, "BUILD", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make them with: python -m kvlib.anchored rows"):
        read("minilm-D2")


# Training


def set_up(patch, built, folder) -> None:
    """A tiny model in place of minilm, few rows, and folders of its own."""
    load = kvlib.load

    def tiny_or_loaded(name, **arguments):
        if name != "minilm":
            return load(name, **arguments)
        model = tiny.build("llama-gqa", num_hidden_layers=16, vocab_size=4096, max_position_embeddings=4096)
        return model.float().requires_grad_(), load_tokenizer()

    for module in (kvlib, loading):  # which loads the model below an adapter
        patch.setattr(module, "load", tiny_or_loaded)
    for name, value in (
        ("WINDOWS", 1),
        ("WINDOW", 300),
        ("EVERY", 1),
        ("BUILD", folder),
        ("ADAPTERS", folder / "kept"),
    ):
        patch.setattr(train, name, value)
    patch.setattr(rows, "BUILD", built)
    patch.setattr(Arm, "schedule", property(lambda arm: replace(SCHEDULE, seed=arm.seed)))


@pytest.fixture
def small(built, tmp_path, monkeypatch):
    set_up(monkeypatch, built, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(built, tmp_path_factory):
    """A folder in which the paper's arm has been trained in one go."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch, built, folder)
        assert train.train("minilm-TML-4", 10, 0, "cpu")
    return folder


def curve(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "curve.csv")[["step", "loss", "heldout_loss"]]


def test_a_run_that_stops_goes_on(finished, small):
    while not train.train("minilm-TML-4", 0, 0, "cpu"):  # a step at a time
        pass
    whole, again = curve(finished / "runs/minilm-TML-4"), curve(small / "runs/minilm-TML-4")
    pd.testing.assert_frame_equal(again, whole, rtol=1e-5)
    assert whole["step"].tolist() == [1, 2, 3, 4] and whole["loss"].nunique() == 4
    kept = [(folder / "kept/minilm-TML-4" / adapters.FILE).read_bytes() for folder in (finished, small)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["minilm-D1", "minilm-TML-4", "minilm-D2-whole"])
def test_what_is_trained(small, name):
    """Adapters and the anchor's embedding, which begins as the newline's; or everything."""
    arm = ARMS[name]
    before = kvlib.load("minilm")[0].state_dict()
    model, tokenizer, lora = train.prepare(arm, "cpu")
    trained = train.Trained(model)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    if arm.whole:
        assert lora is None and len(trained) == len([*model.parameters()])
    else:
        of_anchor = [n for n in trained if "token_adapter" in n]
        assert len(of_anchor) == (arm.anchors != "none") and len(trained) == 2 * 4 * 16 + len(of_anchor)
    if of_anchor := [p for n, p in trained.items() if "token_adapter" in n]:
        torch.testing.assert_close(of_anchor[0][0], before["model.embed_tokens.weight"][newline])
    ids = read(name)[0][0][None]
    with train.attention(model):
        model(ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    seen = [n for n, p in trained.items() if "lora_A" not in n and p.grad.abs().sum() == 0]  # of A the first step is 0
    assert not seen


# Adapters


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["lora_A", "lora_B"]))
def test_eight_bits(seed, kind):
    """No number is further off than half a step of its scale, and the largest ones are exact."""
    tensor = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    tensor[0] = 0
    dim = adapters.along(f"a.{kind}.weight")
    packed, scale = adapters.quantised(tensor, dim)
    assert packed.dtype == torch.int8 and scale.shape[dim] == 1 and scale.numel() == (5 if kind == "lora_A" else 9)
    assert ((packed * scale - tensor).abs() <= scale / 2 + 1e-6).all()
    torch.testing.assert_close((packed * scale).abs().amax(dim), tensor.abs().amax(dim))


@pytest.mark.parametrize("name", ["minilm-TML-4", "minilm-D2-whole"])
def test_what_is_kept_is_what_was_trained(finished, small, name):
    """What is loaded has the base's weights and what was learnt beside them, to the rounding of eight bits."""
    folder = small if ARMS[name].whole else finished
    assert folder is finished or train.train(name, 10, 0, "cpu")
    model, _ = kvlib.load(folder / "kept" / name)
    learnt = torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)["model"]
    learnt = {n.replace("/", "."): p for n, p in learnt.items()}
    expected = kvlib.load("minilm")[0].state_dict()
    for n, p in learnt.items():
        if ARMS[name].whole:
            expected[n] = p.bfloat16().float()
        elif "token_adapter" in n:
            expected["model.embed_tokens.weight"][ANCHOR] = p[0]
        elif "lora_A" in n:
            factor = learnt[n.replace("lora_A", "lora_B")]
            change = 2 * factor @ p
            assert change.abs().max() > 1e-5
            of = n.replace("lora_A.default.", "")
            torch.testing.assert_close(
                model.state_dict()[of] - expected[of], change, rtol=0, atol=0.03 * change.abs().max()
            )
            expected[of] = model.state_dict()[of]
    assert type(model) is type(kvlib.load("minilm")[0])
    for n, p in model.state_dict().items():
        torch.testing.assert_close(p, expected[n], rtol=0, atol=0)
    assert getattr(model.config, "anchorcoder", None) == arms.settings(ARMS[name], load_tokenizer(), 16)
    row = pd.read_csv(folder / "runs" / name / "arm.csv").iloc[0]
    assert row["arm"] == name and row["steps"] == 4 and row["tokens"] == 4 * 2048 and row["heldout_bits"] > 0


def test_list_and_ship(finished, small, monkeypatch):
    """Lines of arms that were trained elsewhere stay; what is shipped is copied with its checksum, and loads."""
    for name, value in (("LISTED", small / "arms.csv"), ("MODELS", small)):
        monkeypatch.setattr(train, name, value)
    shutil.copytree(finished, small, dirs_exist_ok=True)
    main(["list"])
    first = pd.read_csv(small / "arms.csv", dtype=str)
    elsewhere = first.assign(arm="minilm-D2", sha256="0" * 64)
    pd.concat([elsewhere, first.assign(sha256="1" * 64)]).to_csv(small / "arms.csv", index=False)
    main(["list"])
    again = pd.read_csv(small / "arms.csv", dtype=str)
    assert again["arm"].tolist() == ["minilm-D2", "minilm-TML-4"]
    assert again["sha256"].tolist() == ["0" * 64, first["sha256"].item()]
    shipped = small / "minilm-TML-4"
    assert first["sha256"].item() in (shipped / "SHA256SUMS").read_text()
    assert kvlib.load(shipped)[0].config.anchorcoder["per"] == 4


def test_an_adapter_of_another_model(tmp_path):
    tensors = {"model.layers.99.self_attn.q_proj.lora_A.weight": torch.ones(32, 256)}
    adapters.write(tmp_path, "minilm", {}, tensors, train.LORA)
    with pytest.raises(ValueError, match=r"the adapter has .*layers\.99.*, which LlamaForCausalLM has not"):
        kvlib.load(tmp_path)


def test_arguments(capsys):
    for given_, message in (
        (["train", "--arms", "minilm-D9"], "unknown arm minilm-D9"),
        (["train"], "no GPU was found"),
    ):
        if message.startswith("no GPU") and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            main(given_)
        assert message in capsys.readouterr().err


# What held-out code costs


def test_bits_against_a_loop(small):
    """Behind a line nothing but the anchor can come, elsewhere anything else; what a free model pays is told apart."""
    text = "def f(a):\n    return a + 1\n\nx = f(2)"
    for name in ("minilm-D1", "minilm-TML-4"):
        model, tokenizer, _ = train.prepare(ARMS[name], "cpu")
        planted = model.eval().config.anchorcoder
        ids = anchored(text, tokenizer, planted) if planted else tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with train.attention(model), torch.no_grad():
            rows = model(ids, use_cache=False).logits[0].double().softmax(-1)
            found = bits.cost(model, tokenizer, text)
        expected = [0.0, 0.0]
        for row, token in zip(rows, ids[0, 1:].tolist()):
            if planted and token == ANCHOR:
                expected[1] -= row[token].log().item()
            else:
                expected[0] -= (row[token] / (row.sum() - (row[ANCHOR] if planted else 0))).log().item()
        assert found == pytest.approx(expected, rel=1e-5) and (found[1] > 0) == (planted is not None)


def test_a_table_of_bits_grows(finished, small, monkeypatch):
    """A row for every file of every arm; rows of an arm that was trained again are made again, others stay."""
    shutil.copytree(finished, small, dirs_exist_ok=True)
    for module, name, value in (
        (bits, "TABLE", small / "bits.parquet"), (bits, "LISTED", small / "arms.csv"), (bits, "CHARACTERS", 200),
        (bits, "LEAST", 40_000), (train, "LISTED", small / "arms.csv"), (train, "MODELS", small),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    train.gather()
    load = kvlib.load
    monkeypatch.setattr(kvlib, "load", lambda name: load(small / "kept" / name))
    bits.main(["minilm-TML-4"])
    first = pd.read_parquet(small / "bits.parquet")
    large = [file["file"] for file in heldout_files() if len(file["text"]) >= 40_000]
    assert first["file"].tolist() == large and (first["bits"] > 0).all() and (first["anchor_bits"] > 0).all()
    monkeypatch.setattr(bits, "measure", lambda *args: pytest.fail("measured again"))
    bits.main(["minilm-TML-4"])
    pd.testing.assert_frame_equal(pd.read_parquet(small / "bits.parquet"), first)
    listed = pd.read_csv(small / "arms.csv", dtype=str).assign(sha256="0" * 64)
    listed.to_csv(small / "arms.csv", index=False)
    monkeypatch.setattr(bits, "measure", lambda name, files: first.assign(sha256="0" * 64, bits=1.0))
    bits.main(["minilm-TML-4"])
    assert (pd.read_parquet(small / "bits.parquet")["bits"] == 1).all()


# What is shipped


without_smollm2 = pytest.mark.skipif(
    os.environ.get("MODEL") == "minilm" and not (smollm2.cache() / "smollm2").exists(),
    reason="MODEL=minilm: the real model was not fetched",
)
SHIPPED = ["minilm-TML-4", pytest.param("smollm2-TML-6", marks=without_smollm2)]


@cache
def shipped(name: str):
    model, tokenizer = kvlib.load(name)
    return model.double(), tokenizer


def prompt(name: str, lines: int) -> torch.Tensor:
    model, tokenizer = shipped(name)
    text = "".join(split(heldout_files()[2]["text"])[40 : 40 + lines])
    return torch.tensor([tokenizer("").input_ids + anchored(text[:-3], tokenizer, model.config.anchorcoder)])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_decode_as_they_were_trained(name):
    """Logits of the training's masks = prompt at once = in chunks = token by token, with what was freed gone."""
    (model, _), ids = shipped(name), prompt(name, 4)
    config, per = model.config, model.config.anchorcoder["per"]
    with torch.no_grad(), training(model, kvlib.method("anchorcoder")):
        expected = model(ids, use_cache=False).logits
    for sizes in ([ids.shape[1]], [12, 1, 5, ids.shape[1] - 18], [1] * ids.shape[1]):
        with kvlib.method("anchorcoder")(model) as run, torch.no_grad():
            cache, logits = None, []
            for part in ids.split(sizes, dim=1):
                out = model(part, past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-9)
            anchors = (ids[0] == config.anchorcoder["anchor"]).nonzero()[:, 0].tolist()
            kept = [0, *anchors, *range(anchors[-1] + 1, ids.shape[1])]
            full = len(range(0, config.num_hidden_layers, per))
            for layer in range(config.num_hidden_layers):
                assert run.kept(layer)[0][0].tolist() == (kept if layer % per else [*range(ids.shape[1])])
            entries = full * ids.shape[1] + (config.num_hidden_layers - full) * len(kept)
            assert run.stored_bytes() == entries * 2 * config.num_key_value_heads * config.head_dim * 8


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_write_anchors_where_lines_end(name):
    (model, _), ids = shipped(name), prompt(name, 4)
    with kvlib.method("anchorcoder")(model):
        written = model.generate(ids, max_new_tokens=24, do_sample=False)[0]
    anchor, ends = model.config.anchorcoder["anchor"], set(model.config.anchorcoder["ends"])
    behind = [b == anchor for a, b in zip(written[:-1].tolist(), written[1:].tolist()) if a in ends]
    assert len(behind) >= 4 and all(behind)
    assert sum(written == anchor) == len(behind)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_shipped_models_are(name):
    (model, tokenizer), listed = shipped(name), pd.read_csv(kvlib.paths.MODELS / "arms.csv").set_index("arm")
    assert model.config.anchorcoder == arms.settings(ARMS[name], tokenizer, model.config.num_hidden_layers)
    assert model.config.anchorcoder["longest"] == LONGEST
    file = kvlib.paths.MODELS / name / adapters.FILE
    assert listed.loc[name, "sha256"] == kvlib.checksums.digest(file)
