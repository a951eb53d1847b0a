"""The ledger: what papers claim, what was registered to decide it, and what the result tables say.

    python -m kvlib.lab.claims            data/claims.yaml -> data/results/ledger.csv -> the verdict table in README.md
    python -m kvlib.lab.claims --check    fail if they are not what the result tables say now

A claim says in which region a statistic lies. On each shipped model it *holds* if the 95 % interval lies inside the
region, and is *contradicted* if it lies outside; everything else is inconclusive. The verdict is that of the models if
they all agree, and inconclusive if they do not or if one of them has no rows. What the tables cannot answer at all is
not testable here, with the reason.

Several cells may decide one claim. If *every* cell has to be in the region, "holds" needs no correction, because all
tests have to succeed (an intersection-union test: Berger, Technometrics 24, 1982), but "contradicted" needs only one of
them, so these p-values are corrected (Holm). If *some* cell has to be, it is the other way round.
"""

import argparse
import sys

from kvlib import paths
from kvlib.lab.claims.ledger import VERDICTS
from kvlib.lab.claims.registered import CLAIMS
from kvlib.lab.claims.writing import README, score, write


def main() -> None:
    """Write the ledger and the verdict table of README, and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.lab.claims", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    options = parser.parse_args()
    try:
        table, stale = write(CLAIMS, paths.RESULTS, README, dry=options.check)
    except ValueError as error:
        sys.exit(str(error))
    for row in table.sort_values("verdict", key=lambda verdict: verdict.map(VERDICTS.index)).to_dict("records"):
        print(f"{row['verdict']:<18} {row['claim']}")
    print(f"{score(table)}; README.md has the numbers")
    if options.check and stale:
        sys.exit(f"{', '.join(file.name for file in stale)}: not what claims and tables say now: make ledger")


if __name__ == "__main__":
    main()
