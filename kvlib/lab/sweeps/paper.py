"""Published benchmarks on any model: `python -m kvlib.lab.sweeps.paper MODEL [STUDY ...] [--samples N]`.

MODEL is what `kvlib.load` takes. Each study is a sweep (`kvlib.lab.sweeps.sweep`) into build/paper-MODEL, where a run
that is stopped goes on. Data come from the folder of KVLIB_DATA or from the hub; what neither has is passed over, and
the line that says so names the file. Behind each study its scores are printed, as a table that is also written to
STUDY.md, and drawn, method by method, in build/paper-MODEL/figures.

The study `code` runs what the model writes, in processes with limits that hold off accidents, not attacks: use a
machine or container that has nothing to lose.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from kvlib import paths
from kvlib.lab.results.paper_studies import STUDIES
from kvlib.lab.sweeps.differences import against_full, draw, page
from kvlib.lab.sweeps.sweep import sweep
from kvlib.nearest import unknown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.sweeps.paper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all; known: {', '.join(STUDIES)}")
    parser.add_argument("--samples", type=int, metavar="N", help="of each task, the first ones; default: all")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="side by side, shared among the GPUs")
    parser.add_argument("--ray", metavar="ADDRESS", help="a cluster: auto, HOST:PORT or local, as for a sweep")
    given = parser.parse_args(argv)
    for name in given.studies:
        if name not in STUDIES:
            parser.error(str(unknown("study", name, STUDIES)))
    if given.samples is not None and given.samples < 1:
        parser.error("--samples: a number >= 1")
    folder = paths.ROOT / "build" / f"paper-{Path(given.model).name}"
    for name in given.studies or STUDIES:
        try:
            table = sweep(name, given.model, given.samples, folder, processes=given.processes, ray=given.ray)
        except (OSError, ValueError) as error:
            print(f"{name}: not measured, {error}", file=sys.stderr)
            continue
        except RuntimeError as error:
            sys.exit(f"{name}: {error}")
        show(name, pd.read_parquet(table), folder)


def show(name: str, rows: pd.DataFrame, folder: Path) -> None:
    """Print, write and draw what methods cost on a study's tasks."""
    bits = any(STUDIES[name].find(task).metric == "bits" for task in rows["task"].unique())
    differences = against_full(rows, 1 if bits else 100)
    text = page(name, differences, "bits per character" if bits else "points of 100")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    for figure in draw(name, differences, "bits per character" if bits else "points", folder / "figures"):
        print(figure)


if __name__ == "__main__":
    main()
