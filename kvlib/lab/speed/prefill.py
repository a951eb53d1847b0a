"""Milliseconds to read a prompt: stock transformers, and what kvlib, scoring, typing of heads and stages add to it.

    python -m kvlib.lab.speed.prefill                       what fits this machine -> data/results/prefill_speed.csv
    python -m kvlib.lab.speed.prefill --device cpu --lengths 1024 2048 --pairs 3 --out FILE

One prompt of random tokens, on models with random weights. Stock reads it with sdpa into a `DynamicCache`; each of
`METHODS` does what the one in `BEFORE` does and one thing more, so that the ratio to that one, less 1, is what this
costs as a share of prefill:

    full                 kvlib's cache
    snapkv               scoring: attention of the last 8 queries, the choice of a tenth of the tokens, packing them
    h2o                  scoring by sums: the weights that every token gets from all queries behind it
    stages               stages: later layers compute fewer tokens. An overhead below 0 is what they save. With it, 8
                         rows of attention that decoding goes on from
    uncomp               typing: entropy of every head's queries. With it those rows, and heads of different lengths
    uncomp_stage         typing and stages, beside typing alone
    participation        stages, and typing by a ratio that needs no eigenvalues

"stages" is `uncomp_stage` whose heads all have the same budget, so that no entropy is worked out.

All compute the logits of the last position alone. What a method makes of the model beforehand is not counted. Every
contestant reads the prompt once before the clock counts, and then in turn (`kvlib.lab.speed.turns`); no new turn after
`LIMIT` seconds for each contestant, and two turns. Rows of a length are written when it has ended.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

import kvlib
from kvlib import paths
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import SHAPES, STOCK, WINDOW, build, machine
from kvlib.lab.speed.turns import Contestant, compared, now, take_turns

FILE = paths.RESULTS / "prefill_speed.csv"
METHODS = {  # what a contestant is called -> a registered method and its arguments
    "full": ("full", {}),
    "snapkv": ("snapkv", {"window": 8}),
    "h2o": ("h2o", {}),
    "stages": ("uncomp_stage", {"spread": 0.0}),
    "uncomp": ("uncomp", {}),
    "uncomp_stage": ("uncomp_stage", {}),
    "participation": ("uncomp_stage", {"statistic": "participation"}),
}
BEFORE = {
    "full": STOCK,
    "snapkv": "full",
    "h2o": "full",
    "stages": "snapkv",
    "uncomp": "snapkv",
    "uncomp_stage": "uncomp",
    "participation": "stages",
}
BUDGET = 0.1  # of all but `full`; in the paper 384 of up to 4096 tokens
PAIRS, LIMIT = 8, 120.0
IDENTITY = ("model", "dtype", "device", "tokens", "method")  # a measurement replaces rows with the same
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
MODELS = {"cpu": ["SmolLM2-135M"], "cuda": ["SmolLM2-135M", "Llama-3.1-8B, 8 layers"]}
LENGTHS = {"cpu": [2**i for i in range(10, 14)], "cuda": [2**i for i in range(10, 16)]}
SHOWN = "method budget baseline ms baseline_ms ratio ratio_min ratio_max pairs"


def contest(model, ids: torch.Tensor, pairs: int, clock: Callable[[], float]) -> list[dict]:
    """Rows of all methods for a prompt `(1, tokens)`: against stock, and against the method before."""
    methods = {name: method(name) for name in METHODS}
    contestants = {name: Contestant(model, ids, clock, method) for name, method in ({STOCK: None} | methods).items()}
    for contestant in contestants.values():
        contestant.read()
    turns = take_turns({name: x.read for name, x in contestants.items()}, pairs, clock, LIMIT * len(contestants))
    return [
        {"method": name, "arguments": json.dumps(METHODS[name][1]), "budget": budget(name), "baseline": baseline}
        | compared(name, baseline, turns, "ms")
        for name in METHODS
        for baseline in dict.fromkeys((STOCK, BEFORE[name]))
    ]


def method(name: str):
    """A contestant's method."""
    registered, arguments = METHODS[name]
    return kvlib.method(registered, budget=budget(name), **arguments)


def budget(name: str) -> float:
    return 1.0 if name == "full" else BUDGET


def measure(name: str, model, tokens: int, pairs: int, clock: Callable[[], float], **more) -> list[dict]:
    """All rows of a length. name: of the model. more: columns to add."""
    shared = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "tokens": tokens}
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    rows = contest(model, ids, pairs, clock)
    return [rounded(shared | machine(model.device.type) | row | more) for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.prefill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=DTYPE, default=found, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="MODEL", help=f"default: {MODELS}")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help=f"default: {LENGTHS}")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="timed passes of each contestant; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=FILE, help="default: %(default)s")
    given = parser.parse_args(argv)
    if given.pairs < 1:
        parser.error("--pairs is a whole number >= 1")
    if given.device == "cuda" and found == "cpu":
        parser.error("--device cuda needs a GPU")
    lengths = given.lengths or LENGTHS[given.device]
    for length in lengths:
        if not 2 <= length <= WINDOW:
            parser.error(f"--lengths {length}: a prompt has 2 tokens or more, and the models' window is {WINDOW}")
    for name in given.models or MODELS[given.device]:
        model = build(name, given.device, DTYPE[given.device])
        for length in lengths:
            rows = measure(name, model, length, given.pairs, now, command=command(parser, argv))
            write(rows, given.out, IDENTITY)
            print("{model}, {dtype}, {tokens} tokens; {device}".format(**rows[0]))
            print(pd.DataFrame(rows)[SHOWN.split()].to_string(index=False), end="\n\n")


if __name__ == "__main__":
    main()
