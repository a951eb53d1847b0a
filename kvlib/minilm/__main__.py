"""Make the embedded models again, step by step. Times are measured: two CPU cores where no GPU is named.

corpus     read the installed packages        47 s, 170 MB of disk
tokenizer  learn 4096 byte-pair tokens        8 s, 1 GB of memory
tokens     tokenise and compress the corpus   113 s, 25 MiB (130 MiB unpacked)
train      250 M tokens                       193 s on four H200, compilation included:
                                              torchrun --nproc-per-node 4 -m kvlib.minilm train
export     write the transformers folder      seconds, 22 MiB
evaluate   loss, retrieval, attention         95 s on one H200; any CPU will do, but takes far longer
card       README.md and SHA256SUMS           a second
all        everything above, in this order    needs a GPU
"""

import argparse
import os
from pathlib import Path

import torch

from kvlib.minilm import BUILD, MODEL, card, corpus, tokenizer, tokens
from kvlib.minilm.data import load_sequences
from kvlib.minilm.evaluate import evaluate
from kvlib.minilm.export import export
from kvlib.minilm.recipe import RECIPES
from kvlib.minilm.train import train

STEPS = ("corpus", "tokenizer", "tokens", "train", "export", "evaluate", "card", "all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.minilm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--recipe", choices=RECIPES, default="pilot")
    parser.add_argument("--out", type=Path, default=BUILD / "run", help="folder of the training run")
    parser.add_argument("--model", type=Path, help="folder of the exported model (pilot: data/models/minilm)")
    parser.add_argument("--minutes", type=float, default=600, help="save and stop training after this time")
    parser.add_argument("--workers", type=int, default=8, help="processes that make training data, per GPU")
    parser.add_argument("--samples", type=int, default=500, help="retrieval samples per task and length")
    arguments = parser.parse_args(argv)
    steps = STEPS[:-1] if arguments.step == "all" else (arguments.step,)
    recipe = RECIPES[arguments.recipe]
    # only the shipped recipe may replace the shipped model unasked
    folder = arguments.model or (MODEL if arguments.recipe == "pilot" else BUILD / arguments.recipe)
    if "train" in steps and not torch.cuda.is_available() and arguments.recipe != "tiny":
        parser.error("training takes minutes on a GPU, days without; no GPU was found (--recipe tiny runs on a CPU)")
    if {"train", "evaluate"} & set(steps):  # these run many processes, each of which would start a thread per core
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for step in steps:
        if step in ("corpus", "tokenizer", "tokens"):
            {"corpus": corpus, "tokenizer": tokenizer, "tokens": tokens}[step].build()
        elif step == "train":
            if not train(load_sequences(recipe), arguments.out, arguments.minutes, arguments.workers):
                return print("stopped by --minutes; the same command goes on from here")
        elif step == "export":
            export(arguments.out, folder)
        elif step == "evaluate":
            print(evaluate(folder, arguments.samples))
        elif step == "card":
            card.write(folder)


if __name__ == "__main__":
    main()
