"""Rows of a table of measurements: in place of those that they replace, and which command made them."""

import argparse
import csv
import shlex
import sys
from pathlib import Path


def rounded(row: dict) -> dict:
    """The row, numbers to four digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def write(rows: list[dict], out: Path, identity: tuple[str, ...]) -> None:
    """Put rows into a table, sorted, in place of those that the columns `identity` say are of the same measurement."""
    new = {tuple(str(row[key]) for key in identity) for row in rows}
    if out.exists():
        with out.open(newline="") as file:
            rows = rows + [row for row in csv.DictReader(file) if tuple(row[key] for key in identity) not in new]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: [str(row.get(key)) for key in (*identity, "budget", "baseline")]))


def command(parser: argparse.ArgumentParser, argv: list[str] | None) -> str:
    """The command as it was given, but for `--out`: where the table went is nobody's business."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return shlex.join([*parser.prog.split(), *words])
