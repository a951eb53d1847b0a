"""The ledger: a row per claim, with its verdict and the reason for it.

A claim says in which region a statistic lies. The verdict says what was found *here*, in the scope beside it:

    of a paper           of ours        the 95 % interval lies
    reproduced here      holds          inside the region
    opposite here        contradicted   on the other side of no effect, where an effect is claimed
    not reproduced here  contradicted   outside
    undecided here       undecided here neither

A paper's claim is contradicted only if it is universal, said of every budget or task, and one of them is outside. On
these families prompts are what is resampled; across families, families are. What holds on the first level alone says
so. With several models all have to agree. What the tables cannot answer, and a rule that the expected value could not
meet, is not testable here. Claims of speed have no prompts: see `kvlib.lab.claims.timing`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib import paths
from kvlib.lab import statistics
from kvlib.lab.claims import timing
from kvlib.lab.claims.attaining import obstacle
from kvlib.lab.claims.claim import Claim, Side, cells_of, named, sides_of
from kvlib.lab.claims.deciding import LEVEL, Finding, corrected, deciding
from kvlib.lab.claims.examining import NO_EFFECT, Result, examine
from kvlib.lab.claims.registered import EVIDENCE
from kvlib.lab.claims.samples import Missing, load

WORDS = {  # of papers, of ours
    "inside": ("reproduced here", "holds"),
    "opposite": ("opposite here", "contradicted"),
    "outside": ("not reproduced here", "contradicted"),
    "undecided": ("undecided here", "undecided here"),
}
REAL = "smollm2"
UNTESTABLE = "not testable here"
VERDICTS = (
    "reproduced here", "holds", "not reproduced here", "opposite here", "contradicted", "undecided here", UNTESTABLE,
)  # fmt: skip
COLUMNS = (
    "id paper claim evidence source theirs ours n models length protocol scope detectable p p_across holm holm_across "
    "verdict revised reason"
).split()


class Tables(dict):
    """Result tables by name, read when asked for, which raises `Missing` if there is something wrong with one."""

    def __init__(self, results: Path):
        self.results = results

    def __missing__(self, name: str) -> pd.DataFrame:
        self[name] = load(self.results, name)
        return self[name]


def ledger(claims: list[Claim], results: Path = paths.RESULTS) -> pd.DataFrame:
    """A row per claim, by id; nothing that a table lacks raises."""
    tables = Tables(results)
    table = pd.DataFrame([row_of(claim, tables) for claim in sorted(claims, key=lambda claim: claim.id)])
    for level in ("", "_across"):
        tested = table[f"p{level}"].notna()
        table[f"holm{level}"] = np.nan
        table.loc[tested, f"holm{level}"] = statistics.holm(table.loc[tested, f"p{level}"])
        for name in (f"p{level}", f"holm{level}"):
            table[name] = table[name].map(lambda p: "" if pd.isna(p) else f"{p:.2g}")
    return table[COLUMNS].astype(str)


def of_model(claims: list[Claim], model: str) -> list[Claim]:
    """The claims about the real model, of another one; not those about models that were trained for them."""
    own = [claim for claim in claims if claim.models == (REAL,) and not any("model" in side for side in claim.sides)]
    return [replace(claim, models=(model,)) for claim in own]


def row_of(claim: Claim, tables: Tables) -> dict:
    """The row of one claim, before p-values are corrected for all of them."""
    row = {name: getattr(claim, name) for name in ("id", "paper", "claim", "evidence", "protocol")}
    row |= {"source": EVIDENCE[claim.evidence], "theirs": claim.published, "length": claim.length or ""}
    row |= {"models": "; ".join(claim.models)}
    row |= {"revised": "; ".join(revision.name for revision in claim.revised)}
    row |= judge(claim, tables)
    row.setdefault("scope", scope(claim, row["protocol"]))
    if claim.before:
        earlier = judge(claim.before, tables)
        seen = earlier["ours"] if earlier["verdict"] != UNTESTABLE else earlier["reason"]
        row["reason"] += f"; as registered before: {earlier['verdict']} ({seen})"
    return row


def judge(claim: Claim, tables: Tables) -> dict:
    """What the tables say: ours, n, models, protocol, detectable, p-values, verdict and reason."""
    row = {"ours": "", "n": "", "detectable": "", "p": None, "p_across": None, "verdict": UNTESTABLE}
    if claim.reason:
        return row | {"reason": claim.reason}
    if claim.timed:
        return row | judge_speed(claim, tables.results)
    try:
        table = tables[claim.table]
    except Missing as lack:
        return row | {"reason": str(lack)}
    at_length = table[table["length"] == claim.length]
    cells = cells_of(claim, tuple(sorted(at_length["task"].unique())))
    found, missing = {}, {}
    for model in claim.models:
        try:
            found[model] = [examine(tables, claim, model, cell) for cell in cells]
            for result in found[model]:
                if why := obstacle(claim, result.families, result.n // result.families):
                    raise Missing(f"the rule cannot be met: {why}")
        except Missing as lack:
            found.pop(model, None)
            missing[model] = str(lack)
    if not found:
        same = len(set(missing.values())) == 1
        lacks = [missing[claim.models[0]]] if same else [f"{model}: {lack}" for model, lack in missing.items()]
        return row | {"reason": "; ".join(lacks)}
    findings = {model: Finding.of(results, claim.primary) for model, results in found.items()}
    shown = {model: deciding(results, findings[model].where, claim.primary) for model, results in found.items()}
    largest = max((result.detectable for results in found.values() for result in results), key=sortable)
    across = [finding.p_across for finding in findings.values()]
    return row | {
        "ours": "; ".join(f"{model}{cell_label(result)}: {result.text}" for model, result in shown.items()),
        "n": "; ".join(str(result.n) for result in shown.values()),
        "models": "; ".join(shown),
        "protocol": "; ".join(sorted({result.protocol for results in found.values() for result in results})),
        "detectable": f"{largest:.3f}" if isinstance(largest, float) else largest,
        "p": max(finding.p for finding in findings.values()),
        "p_across": None if None in across else max(across),
        "verdict": verdict_of(claim, findings),
        "reason": reason_of(claim, findings, found, missing),
    }


def judge_speed(claim: Claim, results: Path) -> dict:
    """What a table of speed says; no p-values, since repeated blocks on one machine are no sample of anything."""
    try:
        speed = timing.examine(results, claim.timed)
    except Missing as lack:
        return {"reason": str(lack)}
    where = speed.lies(claim.rule)
    inside, outside = (f"it is {in_words(claim.rule, outside)} times as fast" for outside in (False, True))
    opposite = "it is slower" if speed.most < 1 else "it is faster"
    reasons = {"inside": inside, "opposite": opposite, "outside": outside}
    return {
        "ours": f"{speed.value:.2f} [{speed.least:.2f}, {speed.most:.2f}]",
        "n": str(speed.repeats),
        "models": timing.models(speed),
        "scope": timing.scope(claim.timed, speed),
        "verdict": WORDS[where][claim.ours],
        "reason": reasons.get(where, "some of the blocks say so, and some do not"),
    }


def sortable(detectable: float | str) -> float:
    return detectable if isinstance(detectable, float) else 0.0


def cell_label(result: Result) -> str:
    return f" {result.label}" if result.label else ""


def verdict_of(claim: Claim, findings: dict[str, Finding]) -> str:
    """What all models say, or that they do not say the same; and on which families."""
    said = {finding.where for finding in findings.values()}
    where = said.pop() if len(said) == 1 and set(findings) == set(claim.models) else "undecided"
    if where == "undecided" or all(finding.wide for finding in findings.values()):
        return word(claim, where)
    single = isinstance(claim.tasks, tuple) and len(claim.tasks) == 1
    return f"{word(claim, where)}, on {'this family' if single else 'these families'} only"


def word(claim: Claim, where: str) -> str:
    """A verdict in words; see the module."""
    if claim.universal and where in ("opposite", "outside"):
        return "contradicted"
    return WORDS[where][claim.ours]


def plain(verdict: str) -> str:
    """A verdict without saying on which families."""
    return verdict.split(", ")[0]


def scope(claim: Claim, protocol: str) -> str:
    """What was tested: models, tasks, length, protocol, settings, and which settings are the authors'."""
    if not claim.table:
        return ""
    parts = [
        " and ".join(claim.models),
        tasks_in_words(claim.tasks),
        f"{claim.length} tokens",
        protocol and f"protocol {protocol}",
        " against ".join(side_in_words(side) for side in sides_of(claim)),
        claim.budgets and f"at{' and'.join(share(budget) for budget in claim.budgets)}",
        claim.equal_bytes and f"equal {claim.equal_bytes} bytes",
        claim.authors and f"as the authors: {claim.authors}",
    ]
    return "; ".join(part for part in parts if part)


def side_in_words(side: Side) -> str:
    words = named(side.configuration) + share(side.configuration.budget)
    return f"{side.model} under {words}" if side.model else words


def share(budget) -> str:
    """A budget after the name of its method; nothing if it is left open."""
    return "" if budget is None else f" {budget:.0%}" if isinstance(budget, float) else f" {budget} tokens"


def tasks_in_words(names: str | tuple[str, ...]) -> str:
    if isinstance(names, str):
        return f"{names} tasks"
    if not names:
        return "families in natural language"
    return f"{len(names)} families" if len(names) > 3 else ", ".join(names)


def reason_of(claim: Claim, findings: dict, found: dict, missing: dict) -> str:
    """Why the verdict is what it is."""
    what = "the share of wins" if claim.statistic == "win_count" else f"the {claim.statistic.replace('_', ' ')}"
    phrases = {
        "inside": f"{what} is {in_words(claim.rule)}",
        "opposite": opposite_in_words(claim, what),
        "outside": f"{what} is {in_words(claim.rule, outside=True)}",
        "undecided": f"the interval does not tell whether {what} is {in_words(claim.rule)}",
    }
    where = {model: finding.where for model, finding in findings.items()}
    by_finding = {one: [model for model in where if where[model] == one] for one in where.values()}
    parts = [f"{phrases[one]} on {' and '.join(models)}" for one, models in by_finding.items()]
    parts += [f"{model}: {lack}" for model, lack in missing.items()]
    for model, results in found.items():
        if len(results) > 1:
            parts.append(tally(model, results, claim.primary))
        if clamped := max(result.clamped for result in results):
            parts.append(f"{model}: {clamped:.0%} of rows clamped")
    return "; ".join(parts)


def opposite_in_words(claim: Claim, what: str) -> str:
    if claim.statistic == "win_count":
        return "most families are lost"
    return f"{what} is {'below' if np.isfinite(claim.rule[0]) else 'above'} {NO_EFFECT.get(claim.statistic, 0)}"


def in_words(rule: tuple[float, float], outside: bool = False) -> str:
    """A region, or its outside."""
    low, high = rule
    if np.isfinite(low) and np.isfinite(high):
        return f"{'outside' if outside else 'inside'} {low:g} to {high:g}"
    return f"{'above' if np.isfinite(low) != outside else 'below'} {low if np.isfinite(low) else high:g}"


def tally(model: str, results: list[Result], primary: str) -> str:
    """How many cells are in the region and how many outside."""
    here = [result.here for result in results]
    inside, outside = (int((corrected(here, primary, name) <= LEVEL).sum()) for name in ("support", "against"))
    return f"{model}: of {len(results)} cells {inside} inside, {outside} outside"
