"""From a training run to a transformers folder: bfloat16 shards, tokenizer, and how they were made."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from kvlib.minilm import MODEL
from kvlib.minilm.recipe import Recipe

SHARD = "12MB"  # no tracked file may exceed 16 MiB
BESIDE = ("tokenizer.json", "tokenizer_config.json")  # made before training, in data/models/minilm


def export(run: Path, folder: Path) -> None:
    """Write config, shards, tokenizer, `curve.csv` and `training.json` of a finished run into `folder`.

    Raises FileNotFoundError when the run is not finished.
    """
    if not (run / "training.json").is_file():
        raise FileNotFoundError(f"{run} holds no finished run; finish it with: python -m kvlib.minilm train")
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(Recipe(**state["recipe"]).config())
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    for name in ("curve.csv", "training.json"):
        shutil.copy(run / name, folder / name)
    if folder.resolve() != MODEL:
        for name in BESIDE:
            shutil.copy(MODEL / name, folder / name)
