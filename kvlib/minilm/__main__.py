"""Make the embedded model again, step by step. Times are measured: two CPU cores where no GPU is named.

corpus     fetch and read packages            87 s after 3 minutes of downloads (0.4 GB)
tokenizer  learn 4096 byte-pair tokens        13 s, 1 GB of memory
tokens     tokenise and compress the corpus   191 s, 47 MiB (188 MB unpacked), 1.6 GB of memory
train      by --recipe                        one H200 and 14 processes: 12 minutes (base), 4 (pilots, two at once)
           on several GPUs: torchrun --nproc-per-node 4 -m kvlib.minilm train (two were slower than one)
export     write the transformers folder      seconds
evaluate   loss, tasks, attention             5 minutes on a shared H200, hours on two CPU cores
card       README.md and SHA256SUMS           a second
keep       copy statistics of a pilot into data/models/pilots
overview   compare with the pilots; data/models/README.md and the catalogue in data/README.md

`make minilm` runs all of it, for the model and every pilot.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from kvlib.minilm import BUILD, MODEL, PILOTS, card, corpus, overview, tokenizer, tokens
from kvlib.minilm.data import load_sequences
from kvlib.minilm.export import export
from kvlib.minilm.recipe import RECIPES
from kvlib.minilm.report import report
from kvlib.minilm.train import train

STEPS = ("corpus", "tokenizer", "tokens", "train", "export", "evaluate", "card", "keep", "overview")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.minilm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP", help="one or several, in order")
    parser.add_argument("--recipe", choices=RECIPES, default="base")
    parser.add_argument("--out", type=Path, help="folder of the training run (default: build/minilm/runs/RECIPE)")
    parser.add_argument("--model", type=Path, help="folder of the exported model (default: where it is shipped)")
    parser.add_argument("--minutes", type=float, default=600, help="save and stop training after this time")
    parser.add_argument("--workers", type=int, default=8, help="processes that make training data, per GPU")
    parser.add_argument("--samples", type=int, default=200, help="samples per family and length in `evaluate`")
    arguments = parser.parse_args(argv)
    recipe = RECIPES[arguments.recipe]
    run = arguments.out or BUILD / "runs" / arguments.recipe
    shipped = arguments.recipe == "base"  # no other recipe replaces the shipped model unasked
    folder = arguments.model or (MODEL if shipped else BUILD / "models" / arguments.recipe)
    if "train" in arguments.steps and not torch.cuda.is_available() and arguments.recipe != "tiny":
        parser.error("training takes minutes on a GPU, days without; no GPU was found (--recipe tiny runs on a CPU)")
    if {"train", "evaluate"} & set(arguments.steps):  # many processes, each of which would start a thread per core
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for step in arguments.steps:
        if step in ("corpus", "tokenizer", "tokens"):
            {"corpus": corpus, "tokenizer": tokenizer, "tokens": tokens}[step].build()
        elif step == "train":
            if not train(load_sequences(recipe), run, arguments.minutes, arguments.workers):
                sys.exit("stopped by --minutes; the same command goes on from here")
        elif step == "export":
            export(run, folder)
        elif step == "evaluate":
            report(folder, arguments.samples)
        elif step == "card":
            card.write(folder)
        elif step == "keep":
            card.keep(folder, PILOTS / arguments.recipe)
        else:
            overview.write()


if __name__ == "__main__":
    main()
