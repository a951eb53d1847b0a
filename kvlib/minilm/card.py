"""The model card: everything in it that is a number comes from the files beside it."""

import csv
import gzip
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kvlib import checksums
from kvlib.lab.tasks import CATALOGUE
from kvlib.minilm import MODEL
from kvlib.minilm.corpus import HELD_OUT
from kvlib.minilm.data import PROSE_EVERY
from kvlib.minilm.heads import SINK, sinks
from kvlib.minilm.tokenizer import SIZE

MANIFEST = "manifest.csv.gz"
STATISTICS = ("training.json", "curve.csv", "evaluation.json", "attention.csv")
SWEPT = ("depth", "lines", "source")  # options of tasks, in records beside those of the families by length
WEAK = 0.5  # share of right answers below which a task is listed among the limits
CURVE_ROWS = 12
KEYS = {
    "bos": "the first token (BOS)",
    "first_four": "the first four tokens",
    "first_newline": "the first newline",
    "newline": "all newlines",
    "end": "all `</s>` between documents",
    "punctuation": "punctuation",
    "blank": "indentation and blanks",
    "digit": "digits",
    "word": "words and parts of words",
    "previous": "the token before",
    "self": "the token itself",
    "recent": "the last 32 tokens",
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

Every file with its package, version, declared licence and checksum is listed in `data/models/minilm/manifest.csv.gz`.
Held out are whole packages ({held_out});
files that repeat a tenth of one of theirs were dropped from training.

Half of the sequences are text, one in {prose_every} of them prose (documentation and long docstrings). The other half
are retrieval tasks (`kvlib/lab/tasks/`) among lines of training code, with weight {answer_weight:g} on their answers
and 1 on all other tokens. A sequence starts with the only BOS in it. The tasks of training and evaluation share
formats, but no name, no value and no filler text.

## Training

{tokens:.0f} M tokens on {hardware}: {minutes} minutes ({gpu_minutes:.0f} GPU-minutes), {rate:.2f} M tokens/s in the
median, torch {torch}, transformers {transformers}. Losses are in nats per token; `curve.csv` has more steps. The first
two columns of losses are those of a single step and vary with the tasks that it happened to draw; the training loss
has the weights above. The held-out loss is over windows of {length} tokens: as long as sequences of {short} tokens are
learnt from, most of it comes from positions that the model has not seen yet.

{curve}

## Evaluation

In float32. Held-out text, all of it, in windows of {length} tokens:

{heldout}

Tasks (`data/README.md` describes them): share of right answers (exact match, greedy) by family and length of prompt and
answer in tokens. {samples} samples a cell, so that 95% intervals are at most ±{interval:.1f} points. Families marked
"no" were never trained on. `long_generation` (48 lines, more than 512 tokens from 2048 on) counts the lines before the
first mistake.

{families}

What the completions of real code score without the source, another identifier standing wherever the one asked for did:

{floors}

Needles by depth in the prompt (0 = first line), {needle_samples} samples a cell:

{needles}

A constant used so many lines after its definition, {distance_samples} samples a cell, {distance_length} tokens:

{distances}

## Where attention goes

Share of a head's attention, averaged over held-out code and over the rows that see at least 32 tokens; the mean, the
median and the maximum are over the {heads} heads. `attention.csv` has all of them.

{attention}

Sinks, heads with more than {sink:.0%} of their attention on the same four positions of a window:

{sinks}

## Limits

- {weak}
- It answers only the formats it was trained on and close ones, in prompts of up to {length} tokens; it follows no
  instructions.
- It has seen little besides Python and English. What it writes may be wrong or insecure, and may repeat training text.
- One seed of one small model: what holds here need not hold for large models. `../README.md` compares it with others.

## Licence

The weights are published under the licence of this repository (Apache-2.0). They were trained on the Python standard
library and on installed packages under the licences below, as the packages declare them (the first line where they give
the whole text); some are copyleft for files (MPL-2.0). No training text is included. Whether and how licences of
training text bear on weights is not settled, and nothing here claims that it is: who redistributes the weights decides.

{licences}
"""


def table(header: str, rows: Iterable[Iterable], text: int = 1) -> str:
    """A Markdown table; `header` is its first line without the outer bars; the first `text` columns align left."""
    rule = ["---"] * text + ["---:"] * (header.count("|") + 1 - text)
    return "\n".join(f"| {line} |" for line in [header, *(" | ".join(map(str, row)) for row in [rule, *rows])])


def recipe_table(training: dict) -> str:
    r = training["recipe"]
    return table(
        "what | value",
        [
            ("layers × width", f"{r['layers']} × {r['width']}"),
            ("query heads / KV heads × size", f"{r['heads']} / {r['kv_heads']} × {r['head_dim']}"),
            ("SwiGLU width", r["mlp"]),
            ("sequences of", f"{r['short']} tokens for {r['short_share']:.0%} of the steps, then {r['length']}"),
            ("RoPE base", f"{r['rope_theta']:g}"),
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


def percent(value: float) -> str:
    return f"{value:.1%}"


def by_length(records: list[dict], option: str | None = None) -> dict[str, dict[int, float]]:
    """Family -> length -> score, of the records with that option, by default of those without any."""
    scores = {}
    for record in records:
        if (option in record) if option else not set(SWEPT) & set(record):
            scores.setdefault(record["task"], {})[record["length"]] = record["score"]
    return scores


def families_table(records: list[dict]) -> str:
    scores = by_length(records)
    lengths = sorted({length for row in scores.values() for length in row})
    rows = [
        (
            f"`{task}`",
            CATALOGUE[task].group,
            "yes" if CATALOGUE[task].trained else "no",
            *(percent(row[n]) if n in row else "" for n in lengths),
        )
        for task, row in scores.items()
    ]
    return table(" | ".join(["family", "group", "trained", *map(str, lengths)]), rows, text=3)


def floors_table(records: list[dict]) -> str:
    floors = by_length(records, "source")
    lengths = sorted({length for row in floors.values() for length in row})
    rows = [(f"`{task}`", *(percent(row[n]) for n in lengths)) for task, row in floors.items()]
    return table(" | ".join(["family", *map(str, lengths)]), rows)


def sweep_table(records: list[dict], option: str, name: str) -> str:
    """Scores by length (rows) and an option (columns)."""
    swept = [record for record in records if option in record]
    values = sorted({record[option] for record in swept})
    lengths = sorted({record["length"] for record in swept})
    score = {(record["length"], record[option]): record["score"] for record in swept}
    rows = [(n, *(f"{score[n, value]:.0%}" for value in values)) for n in lengths]
    return table(" | ".join([f"tokens \\ {name}", *(f"{value:g}" for value in values)]), rows)


def cell_size(records: list[dict], option: str | None = None) -> int:
    """Samples in a cell of the sweep over `option`, or of the families."""
    return next(r["n"] for r in records if (option in r if option else not set(SWEPT) & set(r)))


def attention_table(report: pd.DataFrame) -> str:
    columns = [(name, report[key]) for key, name in KEYS.items()]
    return table(
        "key | mean | median | maximum",
        [(name, percent(c.mean()), percent(c.median()), percent(c.max())) for name, c in columns],
    )


def sinks_table(report: pd.DataFrame) -> str:
    rows = [
        (f"{r.layer}.{r.head}", percent(r.bos), percent(r.top_four), f"`{r.top_token}`")
        for r in sinks(report).itertuples()
    ]
    return table("layer.head | on BOS | on four positions | most attended token", rows) if rows else "None."


def weak(records: list[dict]) -> str:
    """The families that the model answers rarely at the greatest length, with their scores there."""
    length = max(record["length"] for record in records)
    poor = [(task, row[length]) for task, row in by_length(records).items() if row[length] < WEAK]
    named = ", ".join(f"`{task}` {percent(score)}" for task, score in poor) or "no family"
    return f"Below {WEAK:.0%} at {length} tokens: {named}. Where little is right, little is left to lose."


def card(folder: Path) -> str:
    """The card of the model in `folder`, from its curve, training, evaluation, attention and the corpus' manifest."""
    training, evaluation = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "evaluation"))
    with gzip.open(MODEL / MANIFEST, "rt") as file:
        manifest = pd.read_csv(file, keep_default_na=False)
    with (folder / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    report = pd.read_csv(folder / "attention.csv")
    records = evaluation["retrieval"]
    rates = sorted(int(row["tokens_per_second"]) for row in curve)
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
        short=training["recipe"]["short"],
        heldout=heldout_table(evaluation["heldout"]),
        samples=cell_size(records),
        interval=100 * 1.96 * math.sqrt(0.25 / cell_size(records)),
        families=families_table(records),
        floors=floors_table(records),
        needle_samples=cell_size(records, "depth"),
        needles=sweep_table(records, "depth", "depth"),
        distance_samples=cell_size(records, "lines"),
        distance_length=max(record["length"] for record in records if "lines" in record),
        distances=sweep_table(records, "lines", "lines"),
        heads=len(report),
        attention=attention_table(report),
        sink=SINK,
        sinks=sinks_table(report),
        weak=weak(records),
        licences=licence_table(manifest),
    )


def write(folder: Path) -> None:
    """Write `README.md` and, over all files, `SHA256SUMS`."""
    (folder / "README.md").write_text(card(folder))
    checksums.write(folder)


def keep(folder: Path, to: Path) -> None:
    """Copy the statistics of a model, but not its weights, and write their checksums."""
    to.mkdir(parents=True, exist_ok=True)
    for name in STATISTICS:
        shutil.copy(folder / name, to / name)
    checksums.write(to)
