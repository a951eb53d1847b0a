"""The ledger: a row per claim, with its verdict and the reason for it.

A claim says in which region a statistic lies. On each shipped model it *holds* if the 95 % interval lies inside the
region, and is *contradicted* if it lies outside; everything else is inconclusive. The verdict is that of the models if
they all agree, and inconclusive if they do not or if one of them has no rows. What the tables cannot answer at all is
not testable here, with the reason.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from kvlib import paths
from kvlib.lab.claims.claim import Claim, cells_of
from kvlib.lab.claims.deciding import LEVEL, conclude, corrected, deciding
from kvlib.lab.claims.examining import Result, examine
from kvlib.lab.claims.samples import Missing, load

MODELS = ("minilm", "minilm-gqa")  # a claim has to hold on both
VERDICTS = ("holds", "contradicted", "inconclusive", "not testable here")
COLUMNS = "id paper claim evidence theirs ours n models length protocol detectable verdict reason".split()


def ledger(claims: list[Claim], results: Path = paths.RESULTS) -> pd.DataFrame:
    """A row per claim, by id; nothing that a table lacks raises."""
    tables: dict[str, pd.DataFrame | Missing] = {}
    rows = []
    for claim in sorted(claims, key=lambda claim: claim.id):
        if claim.table and claim.table not in tables:
            tables[claim.table] = load(results, claim.table)
        rows.append(judge(claim, tables.get(claim.table)))
    return pd.DataFrame(rows, columns=COLUMNS).astype(str)


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
