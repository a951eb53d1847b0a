"""The directions in which a model's keys vary most, for `loki`.

    python -m kvlib.calibration.key_directions MODEL [--rotated] [--folder FOLDER]

Principal components of the keys of every layer and KV head, over the first pages of a novel and of held-out code: of
keys as they were before rotary embedding or, with `--rotated`, after it. Half of them go into `loki.safetensors`.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import kvlib
from kvlib import checksums, paths
from kvlib.calibration import fingerprint
from kvlib.core.rotary import rotaries, rotate
from kvlib.lab.tasks.natural import texts
from kvlib.methods.loki import FILE, principal

TOKENS, WINDOWS = 2048, 2  # of each text, so many windows of so many tokens


def windows(tokenizer) -> list[torch.Tensor]:
    """Token ids `(1, TOKENS)` of each window."""
    found = []
    for text in (texts.novel(), texts.code()):
        start = "".join(text.pieces)[: 20 * TOKENS * WINDOWS]  # more characters than these tokens have
        ids = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids
        found += ids[:, : TOKENS * WINDOWS].split(TOKENS, dim=1)
    return found


def components(model, windows: list[torch.Tensor], rotated: bool) -> torch.Tensor:
    """Principal components `(layers, kv_heads, head_dim, head_dim)` of the keys of these windows, in columns."""
    turns = rotaries(model)
    read = [kvlib.snapshot(model, ids.to(model.device)).layers for ids in windows]
    found = []
    for turn, layers in zip(turns, zip(*read)):
        keys = []
        for _, key, *_ in layers:
            back = -torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
            keys.append(key if rotated or turn is None else rotate(key, back, turn))
        keys = torch.cat(keys, dim=2)[0]
        found.append(principal(keys, torch.ones_like(keys[..., 0], dtype=torch.bool)).cpu())
    return torch.stack(found)


def write(folder: Path, model, name: str, tokenizer, rotated: bool) -> Path:
    """Write the components of a model, with what they were made of, and note the file's checksum."""
    ids = windows(tokenizer)
    found = components(model, ids, rotated)
    made = {
        "fingerprint": json.dumps(fingerprint(model)),
        "model": name,
        "keys": "after rotary embedding" if rotated else "before rotary embedding",
        "texts": f"Moby-Dick from chapter 1 on and held-out code from its first file on, {WINDOWS} windows of "
        f"{TOKENS} tokens each",
        "tokens": str(sum(x.shape[1] for x in ids)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    half = found[..., : found.shape[-1] // 2].half().contiguous()
    save_file({"directions": half}, folder / FILE, metadata=made)
    checksums.record(folder / FILE)
    return folder / FILE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's name, hub id or folder, as for `kvlib.load`")
    parser.add_argument("--rotated", action="store_true", help="of keys after rotary embedding")
    parser.add_argument("--folder", type=Path, help="where to write; default: data/calibration/ and the model's name")
    given = parser.parse_args(arguments)
    model, tokenizer = kvlib.load(given.model)
    name = Path(given.model).name
    print(write(given.folder or paths.DATA / "calibration" / name, model, name, tokenizer, given.rotated))


if __name__ == "__main__":
    main()
