"""The model card: everything in it that is a number comes from the files beside it."""

import csv
import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kvlib.minilm import checksums
from kvlib.minilm.corpus import HELD_OUT
from kvlib.minilm.data import PROSE_EVERY
from kvlib.minilm.tokenizer import SIZE

SINK = 0.3  # mass on one token above which a head is listed
WEAK = 0.5  # share of right answers below which a task is listed among the limits
CURVE_ROWS = 12
KEYS = {
    "first": "the first token (BOS)",
    "first_newline": "the first newline",
    "newline": "all newlines",
    "end": "all `</s>` between documents",
}

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [code, kv-cache]
---

# {name}

A Llama-type language model with {parameters:.1f} M parameters, small enough to study KV caches on a CPU, trained on
Python source and on retrieval tasks in the form of code. It is an object of study, not an assistant.

    model, tokenizer = kvlib.load("{name}")     # or transformers' from_pretrained with this folder

This card is written by `python -m kvlib.minilm card` from the files beside it; `python -m kvlib.minilm --help` lists
the steps that make the model again.

## Model and recipe

{recipe}

AdamW (betas 0.9 and 0.95) with linear warm-up, a constant rate, and linear decay to zero. The tokenizer is a
byte-level BPE with {vocabulary} entries in which every newline and every digit is a token of its own; `<ANCHOR>` is
reserved and untrained.

## Data

{corpus}

Every file with its package, version, declared licence and checksum is listed in `manifest.csv.gz`. Held out are whole
packages ({held_out}); files that repeat half of one of theirs were dropped from training.

Half of the sequences are text, one in {prose_every} of them prose (documentation and long docstrings). The other half
are retrieval tasks (`kvlib/lab/tasks.py`) among lines of training code, with weight {answer_weight:g} on their answers
and 1 on all other tokens. A sequence starts with the only BOS in it. The tasks of training and evaluation share
formats, but no name, no value and no filler text.

## Training

{tokens:.0f} M tokens on {hardware}: {minutes} minutes ({gpu_minutes:.0f} GPU-minutes), {rate:.2f} M tokens/s in the
median, torch {torch}, transformers {transformers}. Losses are in nats per token; `curve.csv` has more steps. The first
two columns of losses are those of a single step and vary with the tasks that it happened to draw; the training loss
has the weights above.

{curve}

## Evaluation

In float32. Held-out text, all of it, in windows of {length} tokens:

{heldout}

Right answers (exact match, greedy) by task and length of the prompt in tokens; {samples} samples a cell, so that 95%
intervals are at most ±{interval:.1f} points:

{retrieval}

## Where attention goes

Share of a head's attention, averaged over held-out code and over the rows that see at least 32 tokens, by kind of key;
the mean and the maximum are over the {heads} heads:

{attention}

Heads with more than {sink:.0%} of their mass on the first token: {sinks}.

## Limits

- Weak: {weak}. Do not use {those} to compare cache
  methods: there is little to lose.
- It answers only the formats it was trained on, in prompts of up to {length} tokens; it follows no instructions.
- It has seen little besides Python and English. What it writes may be wrong or insecure, and may repeat training text.
- One seed of one small model: what holds here need not hold for large models.

## Licence

The weights are published under the licence of this repository (Apache-2.0). They were trained on the Python standard
library and on installed packages under the licences below, as the packages declare them (the first line where they give
the whole text); some are copyleft for files (MPL-2.0). No training text is included. Whether and how licences of
training text bear on weights is not settled, and nothing here claims that it is: who redistributes the weights decides.

{licences}
"""


def table(header: str, rows: Iterable[Iterable]) -> str:
    """A Markdown table; `header` is its first line without the outer bars; columns after the first align right."""
    rule = ["---", *["---:"] * header.count("|")]
    return "\n".join(f"| {line} |" for line in [header, *(" | ".join(map(str, row)) for row in [rule, *rows])])


def recipe_table(training: dict) -> str:
    r = training["recipe"]
    return table(
        "what | value",
        [
            ("layers × width", f"{r['layers']} × {r['width']}"),
            ("query heads / KV heads × size", f"{r['heads']} / {r['kv_heads']} × {r['width'] // r['heads']}"),
            ("SwiGLU width", r["mlp"]),
            ("RoPE base", f"{r['rope_theta']:g}"),
            ("sequence length", r["length"]),
            ("tokens a step", r["sequences"] * r["length"]),
            ("steps (warm-up; share of decay)", f"{r['steps']} ({r['warmup']}; {r['decay']:.0%})"),
            ("peak rate, weight decay, gradient clipping", f"{r['lr']:g}, {r['weight_decay']:g}, {r['clip']:g}"),
            ("seed", r["seed"]),
        ],
    )


def corpus_table(manifest: pd.DataFrame) -> str:
    groups = manifest.groupby(["split", "kind"])
    rows = [(*key, len(g), g.distribution.nunique(), f"{g.bytes.sum() / 1e6:.1f}") for key, g in groups]
    return table("split | kind | texts | packages | MB", rows)


def licence_table(manifest: pd.DataFrame) -> str:
    groups = manifest[manifest.split == "train"].groupby("licence")
    rows = [(name, g.distribution.nunique(), f"{g.bytes.sum() / 1e6:.2f}") for name, g in groups]
    return table("declared licence | packages | MB", sorted(rows, key=lambda row: -float(row[2])))


def curve_table(curve: list[dict]) -> str:
    """Some of the steps at which the held-out loss was measured, evenly spaced, first and last included."""
    measured = [row for row in curve if row["heldout_loss"]]
    count = min(CURVE_ROWS, len(measured))
    chosen = [measured[round(i * (len(measured) - 1) / max(1, count - 1))] for i in range(count)]
    losses = ("loss", "answer_loss", "heldout_loss")
    rows = [(r["step"], f"{int(r['tokens']) / 1e6:.1f}", *(f"{float(r[key]):.3f}" for key in losses)) for r in chosen]
    return table("step | M tokens | training loss | of answers | held-out code", rows)


def heldout_table(heldout: dict) -> str:
    columns = ("nats_per_token", "characters_per_token", "bits_per_character")
    rows = [(kind, row["tokens"], *(f"{row[c]:.3f}" for c in columns)) for kind, row in heldout.items()]
    return table("text | tokens | nats/token | characters/token | bits/character", rows)


def retrieval_table(retrieval: dict) -> str:
    lengths = next(iter(retrieval.values()))
    rows = [(task, *(f"{value:.1%}" for value in by_length.values())) for task, by_length in retrieval.items()]
    return table(" | ".join(["task", *lengths]), rows)


def attention_table(mass: dict[str, list[list[float]]]) -> str:
    rows = []
    for kind, name in KEYS.items():
        heads = [x for layer in mass[kind] for x in layer]
        rows.append((name, f"{sum(heads) / len(heads):.1%}", f"{max(heads):.1%}"))
    return table("key | mean | maximum", rows)


def sinks(mass: list[list[float]]) -> str:
    heads = [(x, i, j) for i, layer in enumerate(mass) for j, x in enumerate(layer) if x > SINK]
    return ", ".join(f"layer {i} head {j} ({x:.0%})" for x, i, j in sorted(heads, reverse=True)) or "none"


def weak(retrieval: dict) -> dict[str, str]:
    """Tasks that the model answers rarely at some length -> "`task` (12.3% at 1024, ...)"."""
    return {
        task: f"`{task}` ({', '.join(f'{value:.1%} at {length}' for length, value in by_length.items())})"
        for task, by_length in retrieval.items()
        if min(by_length.values()) < WEAK
    }


def card(folder: Path) -> str:
    """The card of the model in `folder`, from its curve.csv, training.json, evaluation.json and manifest.csv.gz."""
    training, evaluation = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "evaluation"))
    with gzip.open(folder / "manifest.csv.gz", "rt") as file:
        manifest = pd.read_csv(file, keep_default_na=False)
    with (folder / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    rates = sorted(int(row["tokens_per_second"]) for row in curve)
    mass, retrieval = evaluation["attention_mass"], evaluation["retrieval"]
    weak_tasks = weak(retrieval)
    return CARD.format(
        name=folder.name,
        parameters=training["parameters"] / 1e6,
        recipe=recipe_table(training),
        vocabulary=SIZE,
        corpus=corpus_table(manifest),
        held_out=", ".join(HELD_OUT),
        prose_every=PROSE_EVERY,
        answer_weight=training["recipe"]["answer_weight"],
        tokens=training["tokens"] / 1e6,
        hardware=training["hardware"],
        minutes=training["minutes"],
        gpu_minutes=int(training["hardware"].split()[0]) * training["minutes"],
        rate=rates[len(rates) // 2] / 1e6,
        torch=training["torch"],
        transformers=training["transformers"],
        curve=curve_table(curve),
        length=training["recipe"]["length"],
        heldout=heldout_table(evaluation["heldout"]),
        samples=evaluation["samples"],
        interval=100 * 1.96 * math.sqrt(0.25 / evaluation["samples"]),
        retrieval=retrieval_table(retrieval),
        heads=sum(map(len, mass["first"])),
        attention=attention_table(mass),
        sink=SINK,
        sinks=sinks(mass["first"]),
        weak=", ".join(weak_tasks.values()) or "no task",
        those=", ".join(f"`{task}`" for task in weak_tasks) or "such tasks",
        licences=licence_table(manifest),
    )


def write(folder: Path) -> None:
    """Write `README.md` and, over all files, `SHA256SUMS`."""
    (folder / "README.md").write_text(card(folder))
    checksums.write(folder)
