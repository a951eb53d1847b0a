"""Train AnchorCoder's arms on minilm and SmolLM2, step by step, once there is `python -m kvlib.minilm corpus`.

text     pack a part of minilm's corpus, 12 MiB
rows     text, retrieval tasks and functions as tokens, for a base model
train    arms: all of a base, or those that are named
list     data/models/arms.csv, and the adapters that are shipped
bits     what held-out code costs the arms whose weights are here: data/results/03_bits.parquet (minutes, on a CPU)

Interrupted, `train` goes on where it was. On a machine with several GPUs arms are trained side by side.
"""

import argparse
import os
import sys

import torch

from kvlib.anchored import bits, here, rows
from kvlib.anchored.arms import ARMS, BASES
from kvlib.anchored.side_by_side import train_all
from kvlib.anchored.train import gather

STEPS = ("text", "rows", "train", "list", "bits")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.anchored", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP", help="one or several, in order")
    parser.add_argument("--base", choices=BASES, default="minilm")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"default: all of the base; known: {', '.join(ARMS)}")
    parser.add_argument("--minutes", type=float, default=600, help="save and stop an arm after this time")
    parser.add_argument("--workers", type=int, default=4, help="processes that plant anchors, for each arm")
    parser.add_argument("--side-by-side", type=int, default=1, help="arms that share a GPU")
    arguments = parser.parse_args(argv)
    names = arguments.arms or [name for name, arm in ARMS.items() if arm.base == arguments.base]
    if unknown := set(names) - set(ARMS):
        parser.error(f"unknown arm {', '.join(sorted(unknown))}; known: {', '.join(ARMS)}")
    if "train" in arguments.steps and not torch.cuda.is_available():
        parser.error("training takes minutes on a GPU, days without; no GPU was found")
    for step in arguments.steps:
        if step == "text":
            rows.pack()
        elif step == "rows":
            rows.build(arguments.base, ARMS[names[0]].schedule, os.cpu_count() or 1)
        elif step == "train":
            if not train_all(names, arguments.minutes, arguments.side_by_side, arguments.workers):
                sys.exit("not all arms are done; the same command goes on from here")
        elif step == "list":
            gather()
        else:
            bits.main(here(names))


if __name__ == "__main__":
    main()
