"""Which layers of a model can read the cache of another, for `kvsharer`.

    python -m kvlib.calibration.layer_sharing MODEL [--count COUNT] [--folder FOLDER]

The search of the paper: the keys and values of short texts, averaged over them, say how far apart two layers are. Pairs
are tried one after the other, the least alike first; a pair stays if the last hidden states keep a cosine of more than
a half with what they were, on average over the texts. Two controls try pairs the other way round and in random order.
What is found goes into `kvsharer.json`, which `kvlib.method("kvsharer", pairs=NAME)` reads.
"""

import argparse
import json
import random
from datetime import date
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.calibration import fingerprint
from kvlib.calibration.selection_layers import readable
from kvlib.lab.evaluation.prompts import device_name
from kvlib.lab.tasks.natural import texts
from kvlib.methods.systems.kvsharer import FILE, ORDERS

TOKENS, WINDOWS = 64, 15  # of each of two texts, so many windows of so many tokens
THRESHOLD, SEED = 0.5, 0

Pair = tuple[int, int]


def windows(tokenizer) -> torch.Tensor:
    """Token ids `(2 x WINDOWS, TOKENS)`."""
    found = []
    for text in (texts.novel(), texts.code()):
        start = "".join(text.pieces)[: 20 * TOKENS * WINDOWS]  # more characters than these tokens have
        ids = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids
        found.append(ids[0, : TOKENS * WINDOWS].view(WINDOWS, TOKENS))
    return torch.cat(found)


def distances(model, ids: torch.Tensor) -> dict[Pair, float]:
    """(layer, earlier layer) -> how far apart their caches are: the mean distance of averaged keys, and of values."""
    layers = [[x.mean(0) for x in (key, value)] for _, key, value, *_ in kvlib.snapshot(model, ids).layers]
    found = {}
    for i, later in enumerate(layers):
        for j, before in enumerate(layers[:i]):
            apart = [torch.linalg.vector_norm(x - y, dim=-1).mean().item() for x, y in zip(later, before)]
            found[i, j] = sum(apart) / 2
    return found


def arranged(apart: dict[Pair, float], order: str) -> list[Pair]:
    """All pairs, the first to be tried first."""
    pairs = sorted(apart, key=apart.get, reverse=order == "dissimilar")
    if order == "random":
        random.Random(SEED).shuffle(pairs)
    return pairs


@torch.no_grad()
def last_hidden(model, ids: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
    """Last hidden states of each text in one vector, `(texts, tokens x width)`, where these layers share."""
    method = kvlib.method("kvsharer", pairs=pairs) if pairs else kvlib.method("full")
    with method(model):
        hidden = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    return hidden.flatten(1).float()


def search(model, ids: torch.Tensor, ordered: list[Pair], count: int, progress=iter) -> dict:
    """The first `count` pairs that can stay, the cosine with each and those before it, and how many were tried."""
    exact, pairs, cosines, tried = last_hidden(model, ids, []), [], [], 0
    for pair in progress(ordered):
        if pair[0] in dict(pairs):
            continue
        tried += 1
        cosine = torch.cosine_similarity(exact, last_hidden(model, ids, [*pairs, pair]), dim=1).mean().item()
        if cosine > THRESHOLD:
            pairs.append(pair)
            cosines.append(round(cosine, 4))
            if len(pairs) == count:
                break
    return {"pairs": pairs, "cosines": cosines, "tried": tried}


def write(folder: Path, model, name: str, tokenizer, count: int, progress=iter) -> Path:
    """Search in all orders, write what was found, and note the file's checksum."""
    ids = windows(tokenizer).to(model.device)
    apart = distances(model, ids)
    recorded = {
        "model": name,
        "fingerprint": fingerprint(model),
        "orders": {order: search(model, ids, arranged(apart, order), count, progress) for order in ORDERS},
        "threshold": THRESHOLD,
        "texts": f"Moby-Dick from chapter 1 on and held-out code from its first file on, {WINDOWS} windows of "
        f"{TOKENS} tokens each",
        "made": [date.today().isoformat(), f"torch {torch.__version__}", f"transformers {transformers.__version__}"],
        "device": device_name(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(readable(json.loads(json.dumps(recorded))) + "\n", encoding="utf-8")
    checksums.record(folder / FILE)
    return folder / FILE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's name, hub id or folder, as for `kvlib.load`")
    parser.add_argument("--count", type=int, help="layers that share, at most (default: a quarter of them)")
    parser.add_argument("--folder", type=Path, help="where to write; default: data/calibration/ and the model's name")
    given = parser.parse_args(arguments)
    model, tokenizer = kvlib.load(given.model, dtype=torch.float32)
    name = Path(given.model).name
    count = given.count or model.config.get_text_config().num_hidden_layers // 4
    folder = given.folder or paths.DATA / "calibration" / name
    print(write(folder, model, name, tokenizer, count, lambda pairs: tqdm(pairs, disable=None)))


if __name__ == "__main__":
    main()
