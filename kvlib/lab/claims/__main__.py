"""The ledger: what papers claim, what was registered to decide it, and what the result tables say.

python -m kvlib.lab.claims            claims.yaml -> results/ledger.csv, VERDICTS.md, the verdicts in README.md
python -m kvlib.lab.claims --check    fail if they are not what the result tables say now
python -m kvlib.lab.claims --model NAME [--results FOLDER]
                                      print what is claimed of the real model, decided by another model's rows
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from kvlib import paths
from kvlib.lab.claims.ledger import VERDICTS, ledger, of_model, plain
from kvlib.lab.claims.registered import CLAIMS, read
from kvlib.lab.claims.writing import README, scores, write


def show(table: pd.DataFrame, numbers: bool = False) -> None:
    """Print verdicts and score."""
    for row in table.sort_values("verdict", key=lambda said: said.map(plain).map(VERDICTS.index)).to_dict("records"):
        said = f" ({row['ours'] or row['reason']})" if numbers else ""
        print(f"{row['verdict']}{said}: {row['claim']} [{row['id']}]")
    print(*scores(table), sep="\n")


def main() -> None:
    """Write the ledger and what shows it, and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.lab.claims", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    parser.add_argument("--model", help="decide the claims about the real model by this one's rows, and write nothing")
    parser.add_argument("--results", type=Path, help="where its tables are; default: data/results")
    options = parser.parse_args()
    if options.results and not options.model:
        parser.error("--results goes with --model")
    if options.model:
        return show(ledger(of_model(read(CLAIMS), options.model), options.results or paths.RESULTS), numbers=True)
    try:
        table, stale = write(CLAIMS, paths.RESULTS, README, dry=options.check)
    except ValueError as error:
        sys.exit(str(error))
    show(table)
    print("data/VERDICTS.md has the numbers")
    if options.check and stale:
        sys.exit(f"{', '.join(file.name for file in stale)}: not what claims and tables say now: make ledger")


if __name__ == "__main__":
    main()
