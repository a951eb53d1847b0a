"""`python -m kvlib.calibration.head_groups MODEL`: the entropy of every head's queries, for UNComp's groups.

Measured on windows of prose and of code, spread evenly over each text: the truncated entropy of each head's rotated
queries, by which heads are grouped, and the scores of layers by the full entropy, by which layers are. Groups follow
from these numbers when they are read (`kvlib.methods.head_groups`): how far windows and texts agree can be asked, too.

The result is `uncomp.json` in the folder of the model's calibration.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import kvlib
from kvlib import calibration, checksums
from kvlib.calibration.selection_layers import readable, shipped
from kvlib.core.support import kv_heads
from kvlib.lab.evaluation.prompts import device_name
from kvlib.lab.tasks.natural import texts
from kvlib.methods.entropy import entropy, spectrum, truncation
from kvlib.methods.head_groups import CALIBRATION
from kvlib.methods.layer_groups import layer_scores

CORPORA = {"prose": ("Moby-Dick from chapter 1 on", texts.novel), "code": ("held-out code", texts.code)}
CHARACTERS = 20  # that a token has at most, on average


def windows(text: str, tokenizer, count: int, length: int) -> list[torch.Tensor]:
    """`count` windows of token ids `(1, length)` that begin at evenly spread characters, with BOS if texts have one.

    Raises:
        ValueError: if the text is too short.
    """
    found = []
    for window in range(count):
        start = len(text) * window // count
        piece = text[start : start + CHARACTERS * length]
        ids = tokenizer(piece, truncation=True, max_length=length, return_tensors="pt").input_ids
        if ids.shape[1] < length:
            raise ValueError(f"the text is too short: window {window} has {ids.shape[1]} tokens, not {length}")
        found.append(ids)
    return found


def spectra(model, ids: torch.Tensor) -> torch.Tensor:
    """Spectra of all heads' rotated queries, `(layers, query_heads, head_dim)` on the CPU. ids: `(1, tokens)`."""
    layers = kvlib.snapshot(model, ids.to(model.device)).layers
    return torch.stack([spectrum(query[0]).cpu() for query, *_ in layers])


def rounded(x: torch.Tensor) -> list:
    return [rounded(row) for row in x] if x.ndim > 1 else [round(value, 4) for value in x.tolist()]


def store(
    folder: Path, name: str, model, tokenizer, count: int, length: int, k: int | None = None, progress: Callable = iter
) -> Path:
    """Measure a model on `count` windows of `length` tokens of each corpus, write the file, and record its checksum.

    Args:
        k: eigenvalues that count in a head's entropy; None: `truncation(head_dim)`.

    Raises:
        ValueError: if the file is that of another model.
    """
    file = folder / CALIBRATION
    if file.is_file():
        calibration.require_same(model, json.loads(file.read_text(encoding="utf-8"))["fingerprint"], file)
    corpora = {}
    for corpus, (title, text) in CORPORA.items():
        ids = windows("".join(text().pieces), tokenizer, count, length)
        measured = torch.stack([spectra(model, window) for window in progress(ids)])
        head_dim = measured.shape[-1]
        k = truncation(head_dim) if k is None else k
        scores = layer_scores(entropy(measured), head_dim)
        corpora[corpus] = {"text": title, "entropy": rounded(entropy(measured, k)), "layer_scores": rounded(scores)}
    recorded = {
        "model": name,
        "fingerprint": calibration.fingerprint(model),
        "queries": "after rotary embedding",
        "kv_heads": kv_heads(model),
        "head_dim": head_dim,
        "k": k,
        "length": length,
        "made": [date.today().isoformat(), f"torch {torch.__version__}", f"transformers {transformers.__version__}"],
        "device": device_name(model),
        "corpora": corpora,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(readable(recorded) + "\n", encoding="utf-8")
    part.replace(file)
    checksums.record(file)
    return file


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kvlib.calibration.head_groups", description=__doc__)
    parser.add_argument("model", help="what `kvlib.load` takes")
    parser.add_argument("--folder", type=Path, help="of the calibration (default: data/calibration/MODEL if shipped)")
    parser.add_argument("--windows", type=int, default=16, help="of each text (default: 16)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window (default: 2048)")
    parser.add_argument("--k", type=int, help="eigenvalues that count in a head's entropy (default: a quarter)")
    options = parser.parse_args(arguments)
    options.folder = options.folder or shipped(options.model)
    if options.folder is None:
        parser.error("--folder: where the calibration of a model goes that is not shipped")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model, tokenizer = kvlib.load(options.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    where = (options.folder, options.model, model, tokenizer, options.windows, options.length, options.k)
    print(store(*where, progress=lambda windows: tqdm(windows, disable=None)))


if __name__ == "__main__":
    main()
