"""The ledger as a CSV file and as the verdict table of README."""

import os
from pathlib import Path

import pandas as pd

from kvlib import paths
from kvlib.lab.claims.claim import Claim
from kvlib.lab.claims.ledger import VERDICTS, ledger
from kvlib.lab.claims.registered import CLAIMS, read

README = paths.ROOT / "README.md"
MARKERS = ("<!-- verdicts -->", "<!-- end of verdicts -->")


def to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def score(table: pd.DataFrame) -> str:
    """Counts per verdict, in a line."""
    counts = table["verdict"].value_counts()
    return ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS) + f" ({len(table)} claims)"


def to_markdown(claims: list[Claim], table: pd.DataFrame) -> str:
    """The verdict table of README, and the score."""
    links = {claim.id: f"[{claim.paper}](https://arxiv.org/abs/{claim.arxiv})" if claim.arxiv else claim.paper
             for claim in claims}  # fmt: skip
    lines = ["| paper | claim | theirs | ours | verdict |", "|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        ours = row["ours"].replace("; ", "<br>") + (f"<br>n = {row['n']}" if row["n"] else "")
        cited, verdict = f"{links[row['id']]} ({row['evidence']})", f"**{row['verdict']}**: {row['reason']}"
        cells = (cited, row["claim"], row["theirs"] or "–", ours or "–", verdict)
        lines.append("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |")
    return "\n".join([f"Score: {score(table)}.", "", *lines])


def with_section(text: str, section: str) -> str:
    """`text` with everything between the markers replaced.

    Raises:
        ValueError: if the markers are not there once each, in this order.
    """
    start, end = MARKERS
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise ValueError(f"README.md needs a line {start} and, after it, a line {end}, once each")
    return text[: text.index(start) + len(start)] + f"\n{section}\n" + text[text.index(end) :]


def build(claims: Path, results: Path, readme: Path) -> tuple[pd.DataFrame, dict[Path, str]]:
    """The ledger, and the text of each file that shows it."""
    registered = read(claims, results)
    table = ledger(registered, results)
    text = with_section(readme.read_text(encoding="utf-8"), to_markdown(registered, table))
    return table, {results / "ledger.csv": to_csv(table), readme: text}


def write(
    claims: Path = CLAIMS, results: Path = paths.RESULTS, readme: Path = README, *, dry: bool = False
) -> tuple[pd.DataFrame, list[Path]]:
    """Write the ledger and the section of README, or neither; with `dry` only see whether they are what they should be.

    Returns:
        the ledger, and the files that were (or would be) changed.

    Raises:
        ValueError: for a claim that is not well formed and for a README without its markers.
    """
    table, files = build(claims, results, readme)
    stale = [file for file, text in files.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for file in [] if dry else stale:
        part = file.with_name(file.name + ".part")
        part.write_text(files[file], encoding="utf-8")
        os.replace(part, file)
    return table, stale
