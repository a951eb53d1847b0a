"""The model beside its pilots (data/models/README.md) and the task catalogue (a section of data/README.md)."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib.lab import tasks
from kvlib.lab.tasks import planted
from kvlib.minilm import MODEL, PILOTS
from kvlib.minilm.card import by_length, cell_size, percent, table
from kvlib.minilm.heads import KINDS, SINK, compare, sinks
from kvlib.minilm.report import load_tokenizer
from kvlib.paths import DATA, MODELS

GUIDE = DATA / "README.md"
BEGIN, END = "<!-- catalogue: written by `python -m kvlib.minilm overview` -->\n", "<!-- end of catalogue -->\n"
EXAMPLE = 256  # tokens of the samples that examples are taken from
DRAFTS = 100  # prompts whose answers are counted
OTHER = {"exact": "see the card", "similarity": "judged by similarity", "bits": "bits per character"}

PAGE = """\
# The embedded model

`minilm` is shipped with its weights and has a card of its own. Under `pilots/` are the statistics, not the weights, of
smaller runs: two depths, by which its depth was chosen, and two more seeds. This page is written by
`python -m kvlib.minilm overview` from the files in the folders. `smollm2/` is the card of the real model.

Until 2026-11-29 there was a second one, `minilm-gqa`, with 5.3 million parameters and grouped queries. It shared
recipe, corpus and prompts with `minilm` and so was no second opinion; since there is a real model, which has grouped
queries too, it is neither shipped nor in any table.

{models}

## Tasks at {length} tokens

Share of right answers, full cache, greedy. "No" in the second column: never trained on.

{families}

## Attention sinks

A head has a sink when more than {sink:.0%} of its attention goes to the same four positions of a window (held-out code,
rows from 32 on). Below, layers and heads count from 0; "BOS" is the share of the first token. The last column says, for
models of the same shape, how many of these heads are sinks in `minilm` too. `pilots/pilot16` starts from the weights of
`minilm` and sees fewer tokens; the others start from other weights.

{sinks}

{each}

## Where attention goes

Share of attention by kind of token, mean over all heads.

{kinds}
"""


def folders() -> dict[str, Path]:
    """Name -> folder of every model that has statistics, the shipped one first."""
    found = [MODEL, *sorted(PILOTS.glob("*"))]
    return {path.relative_to(MODELS).as_posix(): path for path in found if (path / "evaluation.json").is_file()}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def models_table(models: dict[str, Path]) -> str:
    rows = []
    for name, folder in models.items():
        training, heldout = read(folder, "training"), read(folder, "evaluation")["heldout"]
        r = training["recipe"]
        rows.append(
            (
                f"`{name}`",
                f"{r['layers']} × {r['width']}, {r['mlp']}",
                f"{r['heads']} / {r['kv_heads']}",
                f"{training['parameters'] / 1e6:.1f}",
                f"{training['tokens'] / 1e6:.0f}",
                r["seed"],
                training["minutes"],
                *(f"{heldout[kind]['bits_per_character']:.3f}" for kind in ("code", "prose")),
            )
        )
    header = "model | layers × width, SwiGLU | heads / KV | M parameters | M tokens | seed | minutes"
    return table(f"{header} | bits/character: code | prose", rows)


def shared_sinks(models: dict[str, Path], reports: dict[str, pd.DataFrame], name: str) -> int | str:
    """How many heads are sinks both of a model and of `minilm`; nothing where heads are not comparable."""
    shapes, places = [], []
    for each in (name, MODEL.name):
        recipe, found = read(models[each], "training")["recipe"], sinks(reports[each])
        shapes.append([recipe[key] for key in ("layers", "width", "mlp", "heads", "kv_heads")])
        places.append(set(zip(found["layer"], found["head"])))
    return len(places[0] & places[1]) if shapes[0] == shapes[1] else ""


def families_table(models: dict[str, Path], length: int) -> str:
    records = [read(folder, "evaluation")["retrieval"] for folder in models.values()]
    scores = [by_length(each) for each in records]
    names = [*tasks.FAMILIES, *tasks.DROPPED, "long_generation"]
    rows = [("samples a cell", "", *map(cell_size, records))]
    rows += [
        (f"`{n}`", "yes" if tasks.CATALOGUE[n].trained else "no", *(percent(s[n][length]) for s in scores))
        for n in names
    ]
    return table(" | ".join(["family", "trained", *(f"`{name}`" for name in models)]), rows, text=2)


def page() -> str:
    models = folders()
    reports = {name: pd.read_csv(folder / "attention.csv") for name, folder in models.items()}
    length = max(r["length"] for r in read(MODEL, "evaluation")["retrieval"])
    side = compare(reports)
    columns = "model | heads with a sink | of all | layers | most attended token | largest share of BOS"
    rows = [
        (
            *(f"`{r.model}`", r.sink_heads, percent(r.sink_share), r.layers, f"`{r.sink_token}`"),
            *(percent(r.largest_bos), shared_sinks(models, reports, r.model)),
        )
        for r in side.itertuples()
    ]
    each = [
        f"- `{name}`: "
        + (
            ", ".join(f"{r.layer}.{r.head} {r.top_four:.0%} (BOS {r.bos:.0%})" for r in sinks(report).itertuples())
            or "none"
        )
        for name, report in reports.items()
    ]
    kinds = [(f"`{r['model']}`", *(percent(r[kind]) for kind in KINDS)) for _, r in side.iterrows()]
    return PAGE.format(
        models=models_table(models),
        length=length,
        families=families_table(models, length),
        sink=SINK,
        sinks=table(f"{columns} | also in `{MODEL.name}`", rows),
        each="\n".join(each),
        kinds=table(" | ".join(["model", *KINDS]), kinds),
    )


def example(task: str) -> str:
    """The end of a prompt and its answer, in one line of Markdown."""
    drawn = tasks.sample(task, max(EXAMPLE, tasks.find(task).shortest), 0, tokenizer=load_tokenizer())
    question = drawn.text.rstrip("\n").split("\n")[-1].strip()
    answer = drawn.answer.split("\n")
    return f"`{question}` → `{answer[0]}`" + (" …" if len(answer) > 1 else "")


def floor(task: str, length: int, records: list[dict]) -> str:
    """What guessing scores: `commonest`, or for completions of real code what `minilm` knows without the source."""
    measured = by_length(records, "source")
    return percent(measured[task][length]) if task in measured else commonest(task, length)


def commonest(task: str, length: int) -> str:
    """Share of the questions about one prompt that the answer given most often there gets right: what knowing all
    answers, and not which belongs to the question, is worth. Mean over `DRAFTS` prompts; empty if one question is all.
    """
    if tasks.find(task).draw is not planted.prompt:
        return ""
    shares = []
    for seed in range(DRAFTS):
        questions = tasks.draft(task, length, tasks.Draw(random.Random(seed), "test")).questions
        answers = Counter(answer for _, answer in questions)
        shares.append(max(answers.values()) / len(questions) if len(questions) > 1 else float("nan"))
    return "" if np.isnan(shares).all() else f"{np.nanmean(shares):.0%}"


def catalogue() -> str:
    """The families of the embedded model: group, what they ask, an example, whether trained, and at the greatest
    length what guessing and the model score."""
    records = read(MODEL, "evaluation")["retrieval"]
    scores = by_length(records)
    length = max(scores["needle"])
    rows = []
    for name in (*tasks.FAMILIES, *tasks.DROPPED, *tasks.PROBES, *tasks.COMPLETIONS, "code_bits"):
        family = tasks.find(name)
        what = family.make.__doc__.strip().split("\n\n")[0].replace("\n", " ")
        other = OTHER[family.metric]
        score = percent(scores[name][length]) if name in scores else other
        trained = "yes" if family.trained else "no"
        rows.append((family.group, f"`{name}`", what, example(name), trained, floor(name, length, records), score))
    order = {group: i for i, group in enumerate((*tasks.GROUPS, "probe", "completion", "label-free"))}
    rows.sort(key=lambda row: order[row[0]])
    header = "group | family | what is asked | end of a prompt → answer | trained | guessing"
    header += f" | `minilm` at {length}"
    return table(header, [[str(cell).replace("|", "\\|") for cell in row] for row in rows], text=5) + "\n"


def write() -> None:
    """Write both pages."""
    (MODELS / "README.md").write_text(page())
    before, rest = GUIDE.read_text().split(BEGIN)
    GUIDE.write_text(before + BEGIN + catalogue() + END + rest.split(END)[1])
