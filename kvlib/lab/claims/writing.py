"""The ledger as a CSV file, as data/VERDICTS.md, and in few rows in README."""

import os
from pathlib import Path

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.claims.claim import Claim, Revision
from kvlib.lab.claims.ledger import UNTESTABLE, VERDICTS, ledger, plain
from kvlib.lab.claims.registered import CLAIMS, read

README = paths.ROOT / "README.md"
MARKERS = ("<!-- verdicts -->", "<!-- end of verdicts -->")
SCORE = ("<!-- score -->", "<!-- end of score -->")
FOUR = ("VATP", "UNComp", "AnchorCoder", "TidalDecode")
COUNTED = {  # a column of the score -> verdicts
    "reproduced": ("reproduced here",),
    "not reproduced": ("not reproduced here",),
    "opposite": ("opposite here", "contradicted"),
    "undecided": ("undecided here",),
    "not testable": (UNTESTABLE,),
}
HEADER = """# Verdicts

Written by `make ledger` from the result tables and `claims.yaml`, where every claim stands with the rule that decides
it.

A verdict says what was found *here*, in the scope beside it, and no more. *Reproduced*, *opposite*, *not reproduced*:
the 95 % interval lies where the claim says, on the other side of no effect, or elsewhere outside. *Contradicted* is
said of universal claims, of which one budget is enough, and of our own. *On these families only*: it holds for other
prompts of these families; for other families like them (Student's t on one number a family) nothing is shown.
*Revised*: rule or scope were changed when there were rows; what was removed stands below, and the reason says what the
claim as registered before gives, where its rows are kept. A family is won if its own interval excludes 0; others count
against "most", and n is the number of families. p is two-sided, on these families / across families; the last column
is Holm's correction for all claims. Of speed the interval is that of repeated blocks on one machine, and there is no p.
"""


def to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def score(table: pd.DataFrame) -> str:
    """Counts per verdict, in a line; in brackets how many of them hold across families."""
    parts, sampled = [], bool((table["p"] != "").any())  # blocks of a clock are of no families
    for word in VERDICTS:
        said = table["verdict"][table["verdict"].map(plain) == word]
        wide = int((~said.str.endswith("only")).sum())
        across = f" ({wide} of them across families)" if sampled and word not in ("undecided here", UNTESTABLE) else ""
        parts += [f"{len(said)} {word}{across}"] if len(said) else []
    return ", ".join(parts)


def scores(table: pd.DataFrame) -> list[str]:
    """A line for each model: papers' claims and ours."""
    lines = []
    for models, group in table[table["scope"] != ""].groupby(table["scope"].str.partition("; ")[0], sort=False):
        ours = group["evidence"] == "ours"
        parts = {"papers and the field": group[~ours], "ours and controls": group[ours]}
        said = [f"{len(part)} claims of {name}: {score(part)}" for name, part in parts.items() if len(part)]
        lines.append(f"- On {models}: {'. '.join(said)}.")
    return lines


def of_four(claims: list[Claim], table: pd.DataFrame) -> str:
    """How many claims of each of the four papers have which verdict, as a table of markdown; all together below."""
    verdicts = table.set_index("id")["verdict"].map(plain)
    links = {claim.paper: linked(claim) for claim in claims if claim.paper in FOUR}
    rows = [
        (link, verdicts[[claim.id for claim in claims if claim.paper == paper and not claim.ours]])
        for paper, link in sorted(links.items(), key=lambda pair: FOUR.index(pair[0]))
    ]
    rows.append(("together", pd.concat([said for _, said in rows])))
    lines = [line("claims of", "all", *COUNTED), "|---|" + "---:|" * (1 + len(COUNTED))]
    for name, said in rows:
        lines.append(line(name, str(len(said)), *(str(int(said.isin(words).sum())) for words in COUNTED.values())))
    return "\n".join(lines)


def full_table(claims: list[Claim], table: pd.DataFrame) -> list[str]:
    """Lines of markdown: everything about these claims."""
    rows = table.set_index("id")
    lines = ["| claim | theirs | ours | scope | verdict | p | after Holm |", "|---|---|---|---|---|---|---|"]
    for claim in claims:
        row = rows.loc[claim.id]
        said = f"{linked(claim)}: {claim.claim} ({row['source']})"
        verdict = f"{bold(row)}: {row['reason']}"
        p, holm = (row[name] and f"{row[name]} / {row[f'{name}_across'] or '–'}" for name in ("p", "holm"))
        lines.append(line(said, row["theirs"], numbers(row), row["scope"], verdict, p, holm))
    return lines


def short_table(claims: list[Claim], table: pd.DataFrame) -> list[str]:
    """Lines of markdown: the claims that README shows."""
    rows = table.set_index("id")
    lines = ["| claim | theirs | ours | verdict |", "|---|---|---|---|"]
    for claim in claims:
        row = rows.loc[claim.id]
        lines.append(line(f"{linked(claim)}: {claim.claim}", row["theirs"], numbers(row), bold(row)))
    return lines


def linked(claim: Claim) -> str:
    return f"[{claim.paper}](https://arxiv.org/abs/{claim.arxiv})" if claim.arxiv else claim.paper


def numbers(row) -> str:
    return row["ours"].replace("; ", "<br>") + f"<br>n = {row['n']}" if row["ours"] else ""


def bold(row) -> str:
    return f"**{row['verdict']}**" + (f" (revised: {row['revised']})" if row["revised"] else "")


def line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) or "–" for cell in cells) + " |"


def page(claims: list[Claim], table: pd.DataFrame) -> str:
    """data/VERDICTS.md."""
    papers, ours = ([claim for claim in claims if claim.ours == own] for own in (False, True))
    revisions: dict[str, Revision] = {one.name: one for claim in claims for one in claim.revised}
    removed = [f"- *{one.name}* ({one.when}): {one.removed}" for one in revisions.values()]
    parts = [HEADER, *scores(table), "", "## Of papers and of the field", "", *full_table(papers, table), ""]
    parts += ["## Of ours, controls among them", "", *full_table(ours, table), ""]
    parts += ["## Revisions: what was removed", "", *(removed or ["None."])]
    return "\n".join(parts) + "\n"


def section(claims: list[Claim], table: pd.DataFrame) -> str:
    """The score and some rows, for README."""
    shown = [claim for claim in claims if claim.front]
    link = "All of them, with scopes, reasons and what was revised: [data/VERDICTS.md](data/VERDICTS.md)."
    return "\n".join([*scores(table), "", *short_table(shown, table), "", link])


def with_section(text: str, section: str, markers: tuple[str, str] = MARKERS) -> str:
    """`text` with everything between the markers replaced.

    Raises:
        ValueError: if the markers are not there once each, in this order.
    """
    start, end = markers
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise ValueError(f"README.md needs a line {start} and, after it, a line {end}, once each")
    return text[: text.index(start) + len(start)] + f"\n{section}\n" + text[text.index(end) :]


def build(claims: Path, results: Path, readme: Path) -> tuple[pd.DataFrame, dict[Path, str]]:
    """The ledger, and the text of each file that shows it."""
    registered = read(claims, results)
    table = ledger(registered, results)
    text = with_section(readme.read_text(encoding="utf-8"), section(registered, table))
    text = with_section(text, of_four(registered, table), SCORE)
    verdicts = claims.with_name("VERDICTS.md")
    return table, {results / "ledger.csv": to_csv(table), verdicts: page(registered, table), readme: text}


def write(
    claims: Path = CLAIMS, results: Path = paths.RESULTS, readme: Path = README, *, dry: bool = False
) -> tuple[pd.DataFrame, list[Path]]:
    """Write the ledger, the page of verdicts and the section of README, or none; with `dry` only see whether they are
    what they should be.

    Returns:
        the ledger, and the files that were (or would be) changed.

    Raises:
        ValueError: for a claim that is not well formed and for a README without its markers.
    """
    table, files = build(claims, results, readme)
    stale = [file for file, text in files.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if dry:
        return table, stale
    for file in stale:
        part = file.with_name(file.name + ".part")
        part.write_text(files[file], encoding="utf-8")
        os.replace(part, file)
    for file in (claims, *files):
        if file != readme:
            checksums.record(file)
    return table, stale
