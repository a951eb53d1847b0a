"""The ledger in short, by paper and by method. The whole of it, with scopes and p-values, is data/VERDICTS.md."""

import csv
import re
from itertools import groupby
from pathlib import Path

from kvlib.lab.book.tables import table

HEAD = ["claim", "theirs", "here, with 95 % interval", "verdict"]
OWN = "ours"  # the evidence of claims that nobody made but this project


def ledger(root: Path) -> list[dict]:
    """All claims, those of papers first."""
    with (root / "data" / "results" / "ledger.csv").open() as file:
        return sorted(csv.DictReader(file), key=lambda row: (row["evidence"] == OWN, row["paper"].lower(), row["id"]))


def short(claims) -> str:
    """A table of claims, without scopes."""
    said = [(row["claim"], row["theirs"], row["ours"], f"**{row['verdict']}**") for row in claims]
    return table(HEAD, [[cell or "–" for cell in row] for row in said])


def about(name: str, claims: list[dict]) -> str:
    """The claims of papers and of the field that a run of the method decides; not those in which it is the baseline."""
    ran = re.compile(rf"; (?:\S+ under )?{name}(?!\w)")
    own = [row for row in claims if row["evidence"] != OWN and ran.search(row["scope"])]
    return short(own) if own else "No claim that was tested is about it."


def page(root: Path) -> str:
    """All claims, in sections by paper."""
    parts = []
    for own, claims in groupby(ledger(root), key=lambda row: row["evidence"] == OWN):
        parts += ["## Ours, controls among them" if own else "## Of papers and of the field"]
        for paper, of_paper in groupby(claims, key=lambda row: row["paper"]):
            parts += [f"### {'On ' if own else ''}{paper}", short(of_paper)]
    return "\n\n".join(parts) + "\n"
