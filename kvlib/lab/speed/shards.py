"""A study by one process and by several, one a GPU: how long it takes, and whether the table is the same.

    python -m kvlib.lab.speed.shards 00_real --samples 8         1, 2, ... processes -> data/results/shards.csv

Seconds are those of the whole command, from loading the model to the table. `equal_rows` are those of which every
number that was measured is as with one process. Processes take GPUs in turn; where there are none they share the CPU.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from kvlib import paths
from kvlib.lab.evaluation.evaluate import BLOCK, CELL, MEASURED
from kvlib.lab.results import making
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import machine

IDENTITY = ("study", "model", "device", "gpus", "processes")


def timed(name: str, study: Study, processes: int) -> tuple[pd.DataFrame, float]:
    """The table of a study, made in a folder that is thrown away, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        table = making.make(name, study, BLOCK, processes, Path(folder))
        return table, time.perf_counter() - begin


def same(one: pd.DataFrame, other: pd.DataFrame) -> int:
    """Rows whose measured numbers are the same in both tables, to the bit."""
    one, other = (table.set_index([*CELL, "sample"])[list(MEASURED)].sort_index() for table in (one, other))
    equal = (one == other) | (one.isna() & other.isna())
    return int(equal.all(axis=1).sum())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.shards", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY")
    parser.add_argument("--samples", type=int, default=8, help="of every task; default: %(default)s")
    parser.add_argument("--most", type=int, help="processes; default: as many as there are GPUs, at least 2")
    parser.add_argument("--out", type=Path, default=paths.RESULTS / "shards.csv", help="default: %(default)s")
    given = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    study = STUDIES[given.study]
    study = replace(study, models=dict.fromkeys(study.models, given.samples))
    alone, rows = timed(given.study, study, 1), []
    for processes in range(1, (given.most or max(gpus, 2)) + 1):
        table, seconds = timed(given.study, study, processes) if processes > 1 else alone
        row = {"study": given.study, "model": " ".join(study.models), "gpus": gpus, "processes": processes}
        row |= {"rows": len(table), "equal_rows": same(alone[0], table), "seconds": seconds}
        row |= {"rows_per_second": len(table) / seconds, "speed_up": alone[1] / seconds}
        rows.append(rounded(row | machine("cuda" if gpus else "cpu") | {"command": command(parser, argv)}))
        print(*(f"{key} {rows[-1][key]}" for key in "processes rows equal_rows seconds speed_up".split()), flush=True)
    write(rows, given.out, IDENTITY)


if __name__ == "__main__":
    main()
