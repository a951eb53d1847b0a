"""What held-out code costs every arm, file by file: bits per character, without anchors and of the anchors alone.

    python -m kvlib.anchored bits       all arms whose weights are here, for the files that the table lacks

Texts are read from their beginning, up to `CHARACTERS`, with the attention of training, which is that of decoding
(tested). Anchors are planted: behind a line their logit is all there is, elsewhere it is left out, as `generate` does
(`kvlib.methods.anchorcoder.Forced`). What they would cost a model that has to write them is a column of its own.
"""

import math

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.anchored import LISTED
from kvlib.anchored.train import attention
from kvlib.lab.evaluation.prompts import device_name, nats
from kvlib.lab.tasks.code import heldout_files
from kvlib.methods.anchorcoder import SETTINGS
from kvlib.methods.anchors import anchored

TABLE = paths.RESULTS / "03_bits.parquet"
CHARACTERS = 6000  # of a file; minilm's window has twice as many
LEAST = 1000  # of a file, or it is left out


@torch.no_grad()
def cost(model, tokenizer, text: str) -> tuple[float, float]:
    """Nats of a text without its anchors, and of its anchors where they are not planted. Inside `attention(model)`."""
    planted = getattr(model.config, SETTINGS, None)
    ids = anchored(text, tokenizer, planted) if planted else tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([tokenizer("").input_ids + ids], device=model.device)
    logits, targets = model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]
    if not planted:
        return nats(logits, targets).double().sum().item(), 0.0
    due = targets == planted["anchor"]
    of_anchors = nats(logits[due][None], targets[due][None]).double().sum().item()
    logits = logits.index_fill(-1, torch.tensor(planted["anchor"], device=logits.device), -math.inf)
    return nats(logits[~due][None], targets[~due][None]).double().sum().item(), of_anchors


def measure(name: str, files: list[int]) -> pd.DataFrame:
    """Rows of an arm: its checksum, file and its characters, bits and anchor_bits per character, device."""
    model, tokenizer = kvlib.load(name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows, sha256 = [], pd.read_csv(LISTED, dtype=str).set_index("arm").loc[name, "sha256"]
    with attention(model):
        for file in tqdm(files, name, disable=None):
            text = heldout_files()[file]["text"][:CHARACTERS]
            bits, of_anchors = (x / math.log(2) / len(text) for x in cost(model, tokenizer, text))
            row = {"arm": name, "sha256": sha256, "file": heldout_files()[file]["file"], "characters": len(text)}
            rows.append(row | {"bits": bits, "anchor_bits": of_anchors, "torch": torch.__version__})
    return pd.DataFrame(rows).assign(device=device_name(model))


def main(names: list[str]) -> None:
    """Measure these arms, and keep the rows of others that are listed as they were measured."""
    listed = pd.read_csv(LISTED, dtype=str)[["arm", "sha256"]]
    known = pd.read_parquet(TABLE).merge(listed) if TABLE.is_file() else pd.DataFrame({"arm": []})
    files = [n for n, file in enumerate(heldout_files()) if len(file["text"]) >= LEAST]
    for name in names:
        if name not in set(known["arm"]):
            known = pd.concat([known, measure(name, files)], ignore_index=True)
            order = {arm: n for n, arm in enumerate(listed["arm"])}
            known = known.sort_values("arm", key=lambda arms: arms.map(order), kind="stable", ignore_index=True)
            known.to_parquet(TABLE, compression="zstd", index=False)
            checksums.record(TABLE)
