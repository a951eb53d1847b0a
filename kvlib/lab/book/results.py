"""What the result tables say about one method, and which lessons are about it."""

import csv
import re
from pathlib import Path

from kvlib.lab.book.tables import table
from kvlib.lab.notebooks.files import all_notebooks, read
from kvlib.lab.results.studies import STUDIES

CATALOGUES = {"natural": "sixteen families of questions", "families": "fourteen families of questions"}
ANSWERS = {"answers", "stepwise"}  # measures whose values are shares of right answers
HEAD = ["settings", "budget", "stored", "points", "95 %", "prompts"]


def lessons(root: Path) -> dict[str, str]:
    """Lesson, as a link -> its text, in which methods and tables are looked for."""
    return {
        f"[{path.stem.partition('_')[0]}](../notebooks/{path.name})": "\n".join(
            c["source"] for c in read(path)["cells"]
        )
        for path in all_notebooks(root)
    }


def read_rows(path: Path) -> list[dict]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get("tasks") in CATALOGUES]


def means(root: Path) -> dict[str, list[dict]]:
    """Study -> the rows of its summary that are means over a catalogue of families."""
    files = sorted((root / "data" / "results").glob("*.csv"))
    found = {path.stem: read_rows(path) for path in files if path.stem in STUDIES}
    return {name: body for name, body in found.items() if body and STUDIES[name].measure in ANSWERS}


def section(name: str, texts: dict[str, str], measured: dict[str, list[dict]]) -> str:
    """Means of the method with all its settings, a table for each study, and the lessons that are about it."""
    named = re.compile(rf"""["'`]{name}(?:["'`]| \()""")
    about = [link for link, text in texts.items() if named.search(text)]
    parts = [f"Lessons that use it: {', '.join(about)}." if about else "No lesson uses it."]
    for study, body in measured.items():
        own = [row for row in body if re.fullmatch(rf"{name}(?: \(.*\))?", row["configuration"])]
        own.sort(key=lambda row: row["configuration"] != name)  # the defaults first
        if own:
            where = [link for link, text in texts.items() if f'"{study}"' in text or f"{study}.parquet" in text]
            parts += [scope(study, own[0], where), table(HEAD, [line(row, name) for row in own], numbers=5)]
            parts += full(body)
    if len(parts) == 1:
        parts += ["No table has its mean over a whole catalogue of questions."]
    return "\n\n".join(parts)


def scope(study: str, row: dict, where: list[str]) -> str:
    of = STUDIES[study]
    seen = f"; shown in {', '.join(where)}" if where else ""
    catalogue = CATALOGUES[row["tasks"]]
    return f"**`{study}`**: {row['model']}, {catalogue}, {of.length:,} tokens, protocol *{of.protocol}*{seen}."


def line(row: dict, name: str) -> list[str]:
    settings = row["configuration"].removeprefix(name).strip(" ()") or "defaults"
    budget = f"{float(row['budget']):.0%}" if row["budget"] else "–"
    points = [f"{100 * float(row[part]):.1f}" for part in ("mean", "low", "high")]
    stored = f"{float(row['stored']):.1%}" if row["stored"] else "–"
    return [settings, budget, stored, points[0], f"{points[1]} to {points[2]}", row["samples"]]


def full(body: list[dict]) -> list[str]:
    """What there is to lose: the full cache on the same prompts."""
    rows = [row for row in body if row["configuration"] == "full"]
    return [f"The full cache has {100 * float(rows[0]['mean']):.1f} points there."] if rows else []
