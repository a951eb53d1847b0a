"""The ledger: what papers claim, what was registered to decide it, and what the result tables say.

    python -m kvlib.lab.ledger            data/claims.yaml -> data/results/ledger.csv -> the verdict table in README.md
    python -m kvlib.lab.ledger --check    fail if they are not what the result tables say now

A claim says in which region a statistic lies. On each shipped model it *holds* if the 95 % interval lies inside the
region, and is *contradicted* if it lies outside; everything else is inconclusive. The verdict is that of the models if
they all agree, and inconclusive if they do not or if one of them has no rows. What the tables cannot answer at all is
not testable here, with the reason.

Several cells may decide one claim. If *every* cell has to be in the region, "holds" needs no correction, because all
tests have to succeed (an intersection-union test: Berger, Technometrics 24, 1982), but "contradicted" needs only one of
them, so these p-values are corrected (Holm). If *some* cell has to be, it is the other way round.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from kvlib import paths
from kvlib.lab import statistics
from kvlib.lab.claims import CLAIMS, Cell, Claim, cells_of, named, read
from kvlib.lab.studies import Configuration

README = paths.ROOT / "README.md"
MARKERS = ("<!-- verdicts -->", "<!-- end of verdicts -->")

MODELS = ("minilm", "minilm-gqa")  # a claim has to hold on both
VERDICTS = ("holds", "contradicted", "inconclusive", "not testable here")
LEVEL = 0.05
BYTES_AGREE = 0.02  # rounding to whole tokens per head makes methods differ by a per cent at small budgets

MEASURES = {  # what is measured -> columns it needs, and how it follows from them
    "value": (["value"], lambda rows: rows["value"]),
    "stored": (["stored_bytes", "full_bytes"], lambda rows: rows["stored_bytes"] / rows["full_bytes"]),
    "read": (["read_bytes", "full_bytes"], lambda rows: rows["read_bytes"] / rows["full_bytes"]),
    "prefill": (["prefill_flops"], lambda rows: rows["prefill_flops"]),
}
COLUMNS = "id paper claim evidence theirs ours n models length protocol detectable verdict reason".split()


# Rows


class Missing(Exception):
    """What a table lacks to decide a claim."""


def rows_of(table: pd.DataFrame, claim: Claim, model: str, cell: Cell, configuration: Configuration) -> pd.DataFrame:
    """The rows of one configuration on the tasks of a cell.

    Raises:
        Missing: if a task has none, naming the budgets that there are.
    """
    rows = table[
        (table["model"] == model) & (table["method"] == configuration.method) & (table["length"] == claim.length)
    ]
    wanted = json.loads(configuration.arguments)
    same = [text for text in rows["arguments"].unique() if json.loads(text) == wanted]
    rows = rows[rows["arguments"].isin(same) & rows["task"].isin(cell.tasks)]
    if claim.protocol:
        rows = rows[rows["protocol"] == claim.protocol]
    found = rows[rows["budget"] == configuration.budget]
    lacking = sorted(set(cell.tasks) - set(found["task"]))
    if lacking or not cell.tasks:
        budgets = ", ".join(f"{budget:g}" for budget in sorted(rows["budget"].unique()))
        where = f" on {', '.join(lacking)}" if len(found) else f" (budgets there: {budgets})" if budgets else ""
        raise Missing(f"no rows of {named(configuration)} at {configuration.budget:g}, length {claim.length}{where}")
    return found


def per_sample(rows: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """By task and sample, averaged over seeds because samples are what is resampled: the claim's measure as `measured`.

    Raises:
        Missing: if a row is there twice or has no value, or the table lacks a column.
    """
    identity = ["task", "sample", *(["seed"] if "seed" in rows else [])]
    if rows.duplicated(identity).any():
        raise Missing("the table has rows twice")
    needed, measured = MEASURES[claim.measure]
    equal = [f"{claim.equal_bytes}_bytes"] if claim.equal_bytes else []
    if absent := [name for name in (*needed, *equal) if name not in rows]:
        raise Missing(f"the table has no column {', '.join(absent)}")
    if not all(pd.api.types.is_numeric_dtype(rows[name]) for name in (*needed, *equal)):
        raise Missing(f"the table holds no numbers in {', '.join((*needed, *equal))}")
    rows = rows.assign(measured=measured(rows))
    if not np.isfinite(rows["measured"]).all():
        raise Missing("the table has rows without a value")
    return rows.groupby(["task", "sample"], sort=True)[["measured", "clamped", *equal]].mean()


# Results


@dataclass(frozen=True)
class Result:
    """What a cell says on one model; `support` and `against` are p-values for inside and outside the claim's region."""

    text: str
    support: float
    against: float
    detectable: float | str
    label: str = ""
    n: int = 0
    clamped: float = 0.0
    protocol: str = ""


def examine(table: pd.DataFrame, claim: Claim, model: str, cell: Cell) -> Result:
    """The statistic of one cell on one model.

    Raises:
        Missing: if rows are missing or wrong, or the sides differ in protocol, samples or bytes.
    """
    found = [rows_of(table, claim, model, cell, configuration) for configuration in cell.configurations]
    protocols = sorted(set().union(*(side["protocol"] for side in found)))
    if len(protocols) > 1:
        raise Missing("there are rows of several protocols, and the claim names none")
    found = [per_sample(side, claim) for side in found]
    if not all(side.index.equals(found[0].index) for side in found):
        raise Missing("the two sides do not have the same samples")
    if claim.equal_bytes:
        first, second = (float(side[f"{claim.equal_bytes}_bytes"].mean()) for side in found)
        if not abs(first - second) <= BYTES_AGREE * second:
            raise Missing(f"{claim.equal_bytes} bytes are not equal: {first:.4g} and {second:.4g}")
    groups = [[side["measured"].xs(name).to_numpy() for name in cell.tasks] for side in found]
    result = count_wins(claim, groups) if claim.statistic == "win_count" else bootstrap(claim, groups)
    clamped = max(float(side["clamped"].mean()) for side in found)
    return replace(result, label=cell.label, n=len(found[0]), clamped=clamped, protocol=protocols[0])


def bootstrap(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
    """Mean, difference or ratio with its interval; the effect that so many samples can show."""
    function: Callable = {
        "mean": statistics.mean,
        "mean_difference": statistics.paired_difference,
        "ratio": statistics.paired_ratio,
    }[claim.statistic]
    try:
        estimate = function(*groups)
    except ValueError as error:  # a ratio to zero
        raise Missing(str(error)) from None
    support, against = evidence(claim.rule, estimate.above, estimate.below)
    sign = "+" if claim.statistic == "mean_difference" else ""
    value, low, high = (rounded(x) for x in (estimate.value, estimate.low, estimate.high))
    return Result(f"{value:{sign}.3f} [{low:.3f}, {high:.3f}]", support, against, smallest(claim, groups))


def rounded(x: float) -> float:
    """Three digits, and no -0.000."""
    return round(x, 3) + 0.0


def smallest(claim: Claim, groups: list[list[np.ndarray]]) -> float | str:
    """The smallest difference, or shift of a mean, that as many samples show with 80 % power.

    How much samples vary, as disagreement or variance, is taken from the data.
    """
    if claim.statistic == "ratio":
        return ""
    changes = groups[0] if len(groups) == 1 else [first - second for first, second in zip(*groups)]
    n = round(len(changes) ** 2 / sum(1 / len(change) for change in changes))  # all, if tasks have equally many
    exact_match = all(np.isin(group, (0, 1)).all() for side in groups for group in side)
    if len(groups) == 2 and exact_match:
        return statistics.detectable(n, float(np.mean([np.abs(change).mean() for change in changes])))
    variance = float(np.mean([change.var() for change in changes]))
    if exact_match:  # as in the bootstrap: 200 of 200 is not certainty
        variance = (variance * n + 0.5) / (n + 2)
    return statistics.detectable_shift(n, variance**0.5)


def count_wins(claim: Claim, groups: list[list[np.ndarray]]) -> Result:
    """Tasks won and lost by mean, and the share of wins among them with its exact binomial interval."""
    changes = [round(float(first.mean() - second.mean()), 12) for first, second in zip(*groups)]
    wins, losses = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    ties = len(changes) - wins - losses
    needed = statistics.wins_needed(len(changes))
    tied, chance = f", {ties} tied" if ties else "", statistics.sign_test(wins, losses)
    text = f"{wins} of {len(changes)} won{tied} (p = {chance:.2g})"

    def test(alternative: str) -> Callable:
        def two_sided(share: float) -> float:
            one = stats.binomtest(wins, wins + losses, share, alternative).pvalue if wins + losses else 1.0
            return min(1.0, 2 * float(one))

        return two_sided

    support, against = evidence(claim.rule, test("greater"), test("less"))
    detectable = f"{needed} of {len(changes)}" if needed else f"none of {len(changes)}"
    return Result(text, support, against, detectable)


def evidence(rule: tuple[float, float], above: Callable, below: Callable) -> tuple[float, float]:
    """p-values for "the statistic lies in the region" and for "it lies outside"."""
    bounds = [(above, below, rule[0]), (below, above, rule[1])]
    finite = [(within(bound), beyond(bound)) for within, beyond, bound in bounds if np.isfinite(bound)]
    inside, outside = zip(*finite)
    return max(inside), min(outside)  # outside is on one side or on the other, and p-values are two-sided already


def corrected(results: list[Result], primary: str) -> tuple[np.ndarray, np.ndarray]:
    """p-values for and against, corrected where one cell is enough; see the module about several cells."""
    support, against = (np.array([getattr(result, name) for result in results]) for name in ("support", "against"))
    if primary.startswith("some"):
        return statistics.holm(support), against
    return support, statistics.holm(against)


def conclude(results: list[Result], primary: str) -> str:
    """The verdict of one model."""
    support, against = (p_values <= LEVEL for p_values in corrected(results, primary))
    some = primary.startswith("some")
    if support.any() if some else support.all():
        return "holds"
    return "contradicted" if (against.all() if some else against.any()) else "inconclusive"


def deciding(results: list[Result], verdict: str, primary: str) -> Result:
    """The cell to show: the weakest where all had to agree on the verdict, the strongest where one was enough."""
    fails, some = verdict == "contradicted", primary.startswith("some")
    choose = max if fails == some else min
    return choose(results, key=lambda result: result.against if fails else result.support)


# The ledger


def ledger(claims: list[Claim], results: Path = paths.RESULTS) -> pd.DataFrame:
    """A row per claim, by id; nothing that a table lacks raises."""
    tables: dict[str, pd.DataFrame | Missing] = {}
    rows = []
    for claim in sorted(claims, key=lambda claim: claim.id):
        if claim.table and claim.table not in tables:
            tables[claim.table] = load(results, claim.table)
        rows.append(judge(claim, tables.get(claim.table)))
    return pd.DataFrame(rows, columns=COLUMNS).astype(str)


def load(results: Path, name: str) -> pd.DataFrame | Missing:
    """A result table, or what is wrong with it."""
    file = results / f"{name}.parquet"
    if not file.is_file():
        return Missing(f"there is no table {file.name} yet")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError):  # pyarrow's errors are of these kinds
        return Missing(f"{file.name} is not a readable table")
    needed = "model method budget arguments task length sample value clamped protocol".split()
    if absent := [column for column in needed if column not in table]:
        return Missing(f"{file.name} has no column {', '.join(absent)}")
    try:
        for text in table["arguments"].unique():
            json.loads(text)
        return table.astype({"budget": float, "value": float, "clamped": bool})
    except (TypeError, ValueError):
        return Missing(f"{file.name} holds values of another type than results have")


def judge(claim: Claim, table: pd.DataFrame | Missing | None) -> dict:
    """The row of one claim."""
    row = {name: getattr(claim, name) for name in ("id", "paper", "claim", "evidence", "protocol")}
    row |= {"theirs": claim.published, "length": claim.length or "", "verdict": VERDICTS[3]}
    row |= {"ours": "", "n": "", "models": "", "detectable": ""}
    if claim.reason or isinstance(table, Missing):
        return row | {"reason": claim.reason or str(table)}
    at_length = table[table["length"] == claim.length]
    cells = cells_of(claim, tuple(sorted(at_length["task"].unique())))
    found, missing = {}, {}
    for model in MODELS:
        try:
            found[model] = [examine(table, claim, model, cell) for cell in cells]
        except Missing as lack:
            missing[model] = str(lack)
    if not found:
        same = len(set(missing.values())) == 1
        lacks = [missing[MODELS[0]]] if same else [f"{model}: {lack}" for model, lack in missing.items()]
        return row | {"reason": "; ".join(lacks)}
    verdicts = {model: conclude(results, claim.primary) for model, results in found.items()}
    shown = {model: deciding(results, verdicts[model], claim.primary) for model, results in found.items()}
    largest = max((result.detectable for results in found.values() for result in results), key=sortable)
    return row | {
        "ours": "; ".join(f"{model}{cell_label(result)}: {result.text}" for model, result in shown.items()),
        "n": "; ".join(str(result.n) for result in shown.values()),
        "models": "; ".join(shown),
        "protocol": "; ".join(sorted({result.protocol for results in found.values() for result in results})),
        "detectable": f"{largest:.3f}" if isinstance(largest, float) else largest,
        "verdict": verdict_of(verdicts),
        "reason": reason_of(claim, verdicts, found, missing),
    }


def sortable(detectable: float | str) -> float:
    return detectable if isinstance(detectable, float) else 0.0


def cell_label(result: Result) -> str:
    return f" {result.label}" if result.label else ""


def verdict_of(verdicts: dict[str, str]) -> str:
    """What all shipped models say, or that they do not say the same."""
    said = set(verdicts.values())
    return said.pop() if len(said) == 1 and set(verdicts) == set(MODELS) else "inconclusive"


def reason_of(claim: Claim, verdicts: dict, found: dict, missing: dict) -> str:
    """Why the verdict is what it is."""
    what = "the share of wins" if claim.statistic == "win_count" else f"the {claim.statistic.replace('_', ' ')}"
    phrases = {
        "holds": f"{what} is {in_words(claim.rule)}",
        "contradicted": f"{what} is {in_words(claim.rule, outside=True)}",
        "inconclusive": f"the interval does not tell whether {what} is {in_words(claim.rule)}",
    }
    by_verdict = {verdict: [model for model in verdicts if verdicts[model] == verdict] for verdict in verdicts.values()}
    parts = [f"{phrases[verdict]} on {' and '.join(models)}" for verdict, models in by_verdict.items()]
    parts += [f"{model}: {lack}" for model, lack in missing.items()]
    for model, results in found.items():
        if len(results) > 1:
            parts.append(tally(model, results, claim.primary))
        if share := max(result.clamped for result in results):
            parts.append(f"{model}: {share:.0%} of rows clamped")
    return "; ".join(parts)


def in_words(rule: tuple[float, float], outside: bool = False) -> str:
    """A region, or its outside."""
    low, high = rule
    if np.isfinite(low) and np.isfinite(high):
        return f"{'outside' if outside else 'inside'} {low:g} to {high:g}"
    return f"{'above' if np.isfinite(low) != outside else 'below'} {low if np.isfinite(low) else high:g}"


def tally(model: str, results: list[Result], primary: str) -> str:
    """How many cells are in the region and how many outside."""
    inside, outside = (int((p_values <= LEVEL).sum()) for p_values in corrected(results, primary))
    return f"{model}: of {len(results)} cells {inside} inside, {outside} outside"


# Files


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


def main() -> None:
    """Write the ledger and the verdict table of README, and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.lab.ledger", description=main.__doc__)
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
