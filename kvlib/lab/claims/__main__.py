"""The ledger: what papers claim, what was registered to decide it, and what the result tables say.

python -m kvlib.lab.claims            claims.yaml -> results/ledger.csv, VERDICTS.md, the verdicts in README.md
python -m kvlib.lab.claims --check    fail if they are not what the result tables say now
"""

import argparse
import sys

from kvlib import paths
from kvlib.lab.claims.ledger import VERDICTS, plain
from kvlib.lab.claims.registered import CLAIMS
from kvlib.lab.claims.writing import README, scores, write


def main() -> None:
    """Write the ledger and what shows it, and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.lab.claims", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    options = parser.parse_args()
    try:
        table, stale = write(CLAIMS, paths.RESULTS, README, dry=options.check)
    except ValueError as error:
        sys.exit(str(error))
    for row in table.sort_values("verdict", key=lambda said: said.map(plain).map(VERDICTS.index)).to_dict("records"):
        print(f"{row['verdict']}: {row['claim']} [{row['id']}]")
    print(*scores(table), "data/VERDICTS.md has the numbers", sep="\n")
    if options.check and stale:
        sys.exit(f"{', '.join(file.name for file in stale)}: not what claims and tables say now: make ledger")


if __name__ == "__main__":
    main()
