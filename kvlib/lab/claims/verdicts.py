"""What is claimed of the real model, decided on another one: a column of verdicts of your own.

python -m kvlib.lab.claims.verdicts MODEL      MODEL: what `kvlib.load` takes, a hub id or a folder

It measures how fast this machine is, prints what there is to do and how long it will take, and does it: the rows that
the claims need, no others, in build/verdicts/MODEL. What is interrupted goes on with the same command. Then the claims
are decided by these rows, printed, and written to VERDICTS.md beside them. Weights are of the type they are stored in,
on one GPU if there is one; a window of 2 048 tokens is needed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.claims.__main__ import show
from kvlib.lab.claims.ledger import ledger, of_model
from kvlib.lab.claims.needed import needed
from kvlib.lab.claims.registered import CLAIMS, read
from kvlib.lab.claims.writing import page
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.results import tables
from kvlib.lab.results.keys import keys
from kvlib.lab.results.making import Block, as_file, blocks, gathered, loaded, make_block, places
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study


def studies_of(cells: pd.DataFrame, model: str) -> dict[str, Study]:
    """Studies of one model with the configurations, tasks and samples of `cells` (`needed`), and no others."""
    found = {}
    for name, own in cells.groupby("table"):
        settings = own[["method", "budget", "arguments"]].drop_duplicates()
        found[name] = replace(
            STUDIES[name],
            tasks=tuple(sorted(own["task"].unique())),
            configurations=tuple(Configuration(*each) for each in settings.itertuples(index=False)),
            fewer=(),
            models={model: int(own["samples"].max())},
        )
    return found


class Making:
    """One table on its way: its blocks, and what has been made of them."""

    def __init__(self, name: str, study: Study, folder: Path, size: int):
        self.name, self.study, self.size = name, study, size
        self.shards, self.table = places(name, folder)
        self.wanted, self.none = keys(study), pd.DataFrame(columns=tables.COLUMNS)
        by_metric = sorted(blocks(study, size), key=metric)
        self.groups = [list(group) for _, group in groupby(by_metric, key=metric)]

    def make(self, block: Block) -> int:
        """The number of new rows."""
        return make_block(block, self.study, self.shards, self.none, self.wanted, loaded)

    def timed(self) -> Iterator[tuple[int, float]]:
        """Rows to come and the seconds they will take, by tasks that are measured alike; makes a block of each."""
        for group in self.groups:
            for number, block in enumerate(group, start=1):
                begun = time.monotonic()
                if new := self.make(block):
                    left = sum(len(b.samples) * len(b.configurations) for b in group[number:])
                    yield left, left * (time.monotonic() - begun) / new
                    break

    def finish(self) -> None:
        """Make the rest, and the table."""
        for block in tqdm([block for group in self.groups for block in group], desc=self.name):
            self.make(block)
        tables.write(gathered(self.study, self.size, self.shards, self.table), self.table)


def metric(block: Block) -> str:
    return tasks.find(block.task).metric


def plan(making: list[Making]) -> list[str]:
    """Lines: rows that are left, rows a second and hours, by table and together."""
    lines, total = [f"{'table':16}{'rows':>9}{'rows/s':>9}{'hours':>8}"], [0, 0.0]
    for each in making:
        parts = [*each.timed()]
        rows, seconds = sum(left for left, _ in parts), sum(took for _, took in parts)
        lines.append(line(each.name, rows, seconds))
        total = [total[0] + rows, total[1] + seconds]
    return [*lines, line("together", *total)]


def line(name: str, rows: int, seconds: float) -> str:
    rate = f"{rows / seconds:.1f}" if rows else ""
    return f"{name:16}{rows:9}{rate:>9}{seconds / 3600:8.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.claims.verdicts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts per prefill; fewer take less memory")
    options = parser.parse_args(argv)
    claims = of_model(read(CLAIMS), options.model)
    studies = studies_of(needed(claims), options.model)
    folder = paths.ROOT / "build" / "verdicts" / as_file(options.model)
    try:
        loaded(options.model)  # which says best what is wrong with a name
        with tables.owner(folder.name):
            making = [Making(name, study, folder, options.block) for name, study in studies.items()]
            making[0].make(making[0].groups[0][0])  # the first one takes longer
            print(*plan(making), "Interrupt it at any time; the same command goes on.", sep="\n", flush=True)
            for each in making:
                each.finish()
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"kvlib: {error}")
    decided = ledger(claims, folder)
    show(decided, numbers=True)
    (folder / "VERDICTS.md").write_text(page(claims, decided), encoding="utf-8")
    print(f"{folder / 'VERDICTS.md'} has scopes and reasons")


if __name__ == "__main__":
    main()
