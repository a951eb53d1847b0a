"""Prompts that were read once, kept on disk: reading is the slow part of a live cell."""

import hashlib
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, save

import kvlib
from kvlib import paths
from kvlib.core.snapshot import Recorder, Snapshot

FOLDER = paths.ROOT / "build" / "prefills"
FILES = 12  # of up to 240 MB each; the ones used longest ago go


def prefill(model, ids: list[int], folder: Path = FOLDER) -> Snapshot:
    """`kvlib.snapshot` of one prompt, from disk if this very model has read these very tokens before.

    The file's name is a hash over weights, configuration, tokens, device, versions and the library's core; the
    file holds the hash of its content. One that is damaged or cut short is read as if it were not there.

    Args:
        ids: tokens of the prompt.
    """
    inputs = torch.tensor([ids], device=model.device)
    file = folder / f"{key(model, ids)}.safetensors"
    tensors = stored(file)
    if tensors is None:
        tensors = parts(kvlib.snapshot(model, inputs))
        write(file, tensors)
    file.touch()
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    layers = [
        (*(tensors[f"{layer}.{part}"] for part in PARTS), scaling)
        for layer, scaling in enumerate(tensors["scaling"].tolist())
    ]
    positions = torch.arange(len(ids), device=model.device)[None]
    return Snapshot(layers, inputs, positions, torch.tensor([len(ids)]), tensors["logits"])


@torch.no_grad()
def read_on(model, snapshot: Snapshot, ids: list[int]) -> Snapshot:
    """The snapshot of a prompt and of `ids` behind it, of which only these are read, in one pass.

    What a token is computed from stands in front of it, so that the prompt's own part stays what it is.

    Args:
        snapshot: of one prompt.
    """
    more, recorder = torch.tensor([ids], device=model.device), Recorder()
    with recorder(model) as run:
        cache = run.fork(snapshot)
        logits = model(more, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    layers = [
        (*(torch.cat(both, dim=2) for both in zip(before[:3], behind[:3])), behind[3])
        for before, behind in zip(snapshot.layers, recorder.layers)
    ]
    whole = torch.cat([snapshot.ids, more], dim=1)
    positions = torch.arange(whole.shape[1], device=model.device)[None]
    return Snapshot(layers, whole, positions, snapshot.counts + len(ids), logits)


PARTS = ("query", "key", "value")


def parts(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """A snapshot as tensors with names."""
    scaling = torch.tensor([factor for *_, factor in snapshot.layers], dtype=torch.float64)
    found = {"logits": snapshot.logits.cpu(), "scaling": scaling}
    for layer, (*tensors, _) in enumerate(snapshot.layers):
        found |= {f"{layer}.{part}": x.cpu().contiguous() for part, x in zip(PARTS, tensors)}
    return found


def key(model, ids: list[int]) -> str:
    """What the prefill follows from, as a hash."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    code = [file.read_text() for file in sorted((paths.ROOT / "kvlib" / "core").glob("*.py"))]
    rest = (model.config.to_json_string(), ids, str(model.device), torch.__version__, transformers.__version__, code)
    found.update(repr(rest).encode())
    return found.hexdigest()


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """All or nothing, so that an interrupted run or another one at the same time leaves no half file."""
    content = save(tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as stream:
        stream.write(hashlib.sha256(content).digest())
        stream.write(content)
    part.replace(file)
    files = sorted(file.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)
    for old in files[:-FILES]:
        old.unlink(missing_ok=True)


def stored(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file that is there and intact."""
    if not file.exists():
        return None
    with file.open("rb") as stream:
        digest, content = stream.read(32), stream.read()
    return load(content) if hashlib.sha256(content).digest() == digest else None
