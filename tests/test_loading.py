"""Loading: models shipped here, folders and hub ids, and what is missing in them."""

import hashlib
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kvlib
from kvlib import paths

KNORM = kvlib.method("knorm", budget=0.5)
GREEDY = {"max_new_tokens": 2, "do_sample": False}


def save(folder):
    """A model and its tokenizer."""
    tiny.build("llama-gqa", torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped models with one model in it, `minilm-test`."""
    folder = save(tmp_path / "minilm-test")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    monkeypatch.setattr(paths, "MODELS", tmp_path)
    return folder


def test_a_shipped_model_loads(shipped):
    model, tokenizer = kvlib.load("minilm-test")
    assert model.dtype == torch.float32 and not model.training
    assert kvlib.load("minilm-test", dtype=torch.float16)[0].dtype == torch.float16
    inputs = tokenizer(["a b b", "b"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    with KNORM(model) as run:
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GREEDY)
    assert len(tiny.kept(run)) == 2
    assert torch.equal(kvlib.load(str(shipped))[0].lm_head.weight, model.lm_head.weight)  # a path is a name too


def test_missing_checkpoints(shipped):
    with pytest.raises(FileNotFoundError, match="no shipped model 'minilm-gone'; there are: minilm-test"):
        kvlib.load("minilm-gone")
    (shipped / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="minilm-test: model.safetensors is missing; restore it with git"):
        kvlib.load("minilm-test")
    (shipped / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="no shipped model 'minilm-test'; there are: none"):
        kvlib.load("minilm-test")


def test_changed_checkpoints(shipped):
    weights = bytearray((shipped / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (shipped / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        ValueError, match="minilm-test: model.safetensors does not match its checksum; restore it with git"
    ):
        kvlib.load("minilm-test")


def test_the_hub_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = r"cannot load 'nobody/nothing' \(HF_HUB_OFFLINE is set\): not a shipped model, not a local path"
    with pytest.raises(OSError, match=message):
        kvlib.load("nobody/nothing")


def test_pickled_weights_are_not_loaded(tmp_path):
    folder = save(tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot load '.*mine': Error no file named model.safetensors"):
        kvlib.load(folder)
    torch.save(tiny.build("llama-gqa").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot load '.*mine': it has pickled weights only, and safetensors are needed"):
        kvlib.load(str(folder))
    with pytest.raises(ValueError, match="use_safetensors=False: pickled weights are not loaded"):
        kvlib.load(folder, use_safetensors=False)


@pytest.mark.parametrize("kind", [Path, str, os.fsencode], ids=["path", "string", "relative"])
def test_folders(kind, tmp_path, monkeypatch):
    """Whatever they are called, and however they are given."""
    folder = save(tmp_path / "minilm-mine")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = kvlib.load("minilm-mine" if kind is os.fsencode else kind(folder), use_safetensors=True)
    assert model.dtype == torch.bfloat16 and tokenizer("a b").input_ids == [1, 2]


def test_a_shipped_model_is_not_a_folder_of_its_name(shipped, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "minilm-test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kvlib.load("minilm-test")[0].dtype == torch.float32
    with pytest.raises(ValueError, match="minilm-test. Should have .* config.json"):
        kvlib.load(Path("minilm-test"))
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing'"):
        kvlib.load(Path("nobody/nothing"))


def test_folders_inside_folders(tmp_path):
    save(tmp_path / "inside")
    assert kvlib.load(tmp_path, subfolder="inside")[1]("b").input_ids == [2]
    (tmp_path / "inside" / "model.safetensors").rename(tmp_path / "inside" / "pytorch_model.bin")
    with pytest.raises(OSError, match="it has pickled weights only"):
        kvlib.load(tmp_path, subfolder="inside")


def test_both_are_told_where_files_are(tmp_path, monkeypatch):
    told = {}

    def noting(cls, real):
        def from_pretrained(name, **arguments):
            told[cls] = arguments
            return real(name)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls in (AutoModelForCausalLM, AutoTokenizer):
        noting(cls, cls.from_pretrained)
    where = {"gguf_file": "x.gguf", "subfolder": "y", "revision": "z", "cache_dir": "c", "token": "t"}
    kvlib.load(save(tmp_path / "mine"), dtype=torch.float32, **where)
    assert told[AutoTokenizer] == {"padding_side": "left", **where}
    assert told[AutoModelForCausalLM] == {"dtype": torch.float32, "use_safetensors": True, **where}
