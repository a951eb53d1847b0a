"""Benchmarks on any model: `python -m kvlib.lab.results.paper MODEL [STUDY ...] [--samples N]`.

MODEL is what `kvlib.load` takes. Data come from the folder of KVLIB_DATA or from the hub; a benchmark of which neither
has the data is passed over, and the line that says so names the file. Rows go to build/paper/MODEL/STUDY.jsonl, one
after the other, so that a run that is stopped goes on where it was; a row is made anew when checkpoint, question,
parameters or code are others. At the end STUDY.csv has the means in per cent.

The study `code` runs what the model writes, in processes with limits that hold off accidents, not attacks: use a
machine or container that has nothing to lose.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from kvlib import paths
from kvlib.lab.evaluation.benchmarks.answering import PROTOCOL, answer, key
from kvlib.lab.evaluation.benchmarks.questions import questions
from kvlib.lab.evaluation.evaluate import CELL
from kvlib.lab.evaluation.prompts import window_of
from kvlib.lab.results.keys import checkpoint
from kvlib.lab.results.making import Loader, as_file
from kvlib.lab.results.paper_studies import STUDIES, PaperStudy
from kvlib.nearest import unknown

BUILD = paths.ROOT / "build" / "paper"


def known(file: Path) -> dict[tuple, dict]:
    """Rows by sample, task and key; a line that a stopped run has left unfinished is passed over."""
    rows = []
    for line in file.read_text().split("\n") if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return {(row["task"], row["sample"], row["key"]): row for row in rows}


def rows_of(name: str, pair: tuple, study: PaperStudy, samples: int | None, file: Path) -> Iterator[dict]:
    """The rows of a study for a model, by its name and with its tokenizer; what is missing is added to the file."""
    model, tokenizer = pair
    done, which, window = known(file), checkpoint(name), window_of(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    for task in study.tasks:
        try:
            asked = questions(task, tokenizer, study.length, window, samples)
        except (OSError, ImportError, ValueError) as error:
            print(f"{task}: not measured, {error}", file=sys.stderr)
            continue
        for sample, question in enumerate(tqdm(asked, desc=task, disable=None)):
            for configuration in study.configurations:
                now = key(which, question, configuration)
                if (row := done.get((task, sample, now))) is None:
                    cell = {
                        "model": name,
                        **asdict(configuration),
                        "task": task,
                        "length": study.length if window is None else min(study.length, window),
                        "protocol": PROTOCOL,
                    }
                    row = {**cell, "sample": sample, **answer(model, tokenizer, configuration, question), "key": now}
                    with file.open("a") as out:
                        out.write(f"\n{json.dumps(row)}")  # the newline first: a torn line stays alone
                yield row


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean scores in per cent and the stored share of the cache in per cent, for every cell."""
    shares = rows.assign(score=100 * rows["value"], stored=100 * rows["stored_bytes"] / rows["full_bytes"])
    grouped = shares.groupby(CELL, sort=False)
    return grouped[["score", "stored"]].mean().join(grouped.size().rename("samples")).round(2).reset_index()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.results.paper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all; known: {', '.join(STUDIES)}")
    parser.add_argument("--samples", type=int, help="of each task, the first ones; default: all")
    given = parser.parse_args(argv)
    for name in given.studies:
        if name not in STUDIES:
            parser.error(str(unknown("study", name, STUDIES)))
    if given.samples is not None and given.samples < 1:
        parser.error("--samples: a number >= 1")
    pair = Loader()(given.model)
    for name in given.studies or STUDIES:
        file = BUILD / as_file(given.model) / f"{name}.jsonl"
        rows = pd.DataFrame(rows_of(given.model, pair, STUDIES[name], given.samples, file))
        if rows.empty:
            continue
        table = summary(rows)
        table.to_csv(file.with_suffix(".csv"), index=False, lineterminator="\n")
        print(f"{name}: scores in per cent")
        shown = table.assign(arguments=table["arguments"].replace("{}", ""))
        print(shown.pivot(index=["method", "arguments", "budget"], columns="task", values="score").to_string())


if __name__ == "__main__":
    main()
