"""The ledger in short, paper by paper. The whole of it, with scopes and p-values, is data/VERDICTS.md."""

import csv
from itertools import groupby
from pathlib import Path

from kvlib.lab.book.tables import table

HEAD = ["claim", "theirs", "here, with 95 % interval", "verdict"]
OWN = "ours"  # the evidence of claims that nobody made but this project


def page(root: Path) -> str:
    with (root / "data" / "results" / "ledger.csv").open() as file:
        ledger = sorted(csv.DictReader(file), key=lambda row: (row["evidence"] == OWN, row["paper"].lower(), row["id"]))
    parts = []
    for own, claims in groupby(ledger, key=lambda row: row["evidence"] == OWN):
        parts += ["## Ours, controls among them" if own else "## Of papers and of the field"]
        for paper, of_paper in groupby(claims, key=lambda row: row["paper"]):
            body = [
                [row["claim"], row["theirs"] or "–", row["ours"] or "–", f"**{row['verdict']}**"] for row in of_paper
            ]
            parts += [f"### {'On ' if own else ''}{paper}", table(HEAD, body)]
    return "\n\n".join(parts) + "\n"
