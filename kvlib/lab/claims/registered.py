"""Claims as they are registered in data/claims.yaml, whose first lines say what the fields mean.

A claim names a table, one or two configurations, tasks and a length; a statistic over samples; and a rule, the region
that the claim says the statistic lies in. `kvlib.lab.claims.ledger` decides it. A claim of speed names rows of a table
of times and a rule (`kvlib.lab.claims.timing`).
"""

from dataclasses import replace
from datetime import date
from math import inf
from pathlib import Path

import yaml

from kvlib import paths
from kvlib.anchored.arms import ARMS
from kvlib.lab import tasks
from kvlib.lab.claims.attaining import obstacle
from kvlib.lab.claims.claim import Claim, Revision, Timed, cells_of
from kvlib.lab.claims.samples import MEASURES
from kvlib.lab.results.studies import STUDIES
from kvlib.nearest import unknown

CLAIMS = paths.DATA / "claims.yaml"
EVIDENCE = {  # what was read
    "paper": "the body of the paper was read",
    "abstract": "the abstract was read, not the paper",
    "authors": "the authors' code or README was read, not the paper",
    "secondary": "source not read: somebody else's summary",
    "follow-up": "a later paper or thread was read that ran the method again",
    "field": "no source read: commonly taken for granted",
    "ours": "nobody's claim but this project's: a control, or a finding to be tested",
}
INDEPENDENT = ("smollm2", "minilm")
STATISTICS = ("mean", "mean_difference", "ratio", "win_count")
PRIMARY = ("mean over tasks", "every task", "some task", "every budget", "some budget")
REQUIRED = ("id", "paper", "claim", "evidence", "registered")
DESCRIBING = (*REQUIRED, "arxiv", "published", "note", "front")
REVISING = ("revised", "before")
DECIDING = ("table", "models", "tasks", "length", "statistic", "rule")  # and `compare` or `value`
OPTIONAL = (
    "compare", "value", "budgets", "measure", "primary", "equal_bytes", "protocol", "authors", "expected",
    "samples",
)  # fmt: skip
TIMED = ("timed", "rule")
SIDE = ("method", "budget", "arguments", "model", "table", "protocol")


def read(path: Path = CLAIMS, results: Path = paths.RESULTS) -> list[Claim]:
    """The claims of a file, in its order.

    Raises:
        ValueError: naming everything that is wrong with every claim.
    """
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    good = isinstance(text, dict) and isinstance(text.get("claims"), list)
    require(good, f"{path.name} holds no list of claims")
    known = known_tables(results) | set(text.get("tables") or {})
    revisions = {name: Revision(name, **fields) for name, fields in (text.get("revisions") or {}).items()}
    claims, problems = [], []
    for place, entry in enumerate(text["claims"], start=1):
        name = entry.get("id", f"claim {place}") if isinstance(entry, dict) else f"claim {place}"
        try:
            claims.append(parse(entry, known, revisions))
        except (ValueError, TypeError) as error:
            problems.append(f"{name}: {error}")
    ids = [claim.id for claim in claims]
    problems += [f"{name}: this id is used {ids.count(name)} times" for name in sorted(set(ids)) if ids.count(name) > 1]
    if problems:
        raise ValueError("\n".join([f"{path.name}:", *problems]))
    return claims


def known_tables(results: Path) -> set[str]:
    """Names of result tables: those of the studies, made or not, and those that are there, of times too."""
    return set(STUDIES) | {file.stem for end in ("*.parquet", "*_speed.csv") for file in results.glob(end)}


def parse(entry: dict, known: set[str], revisions: dict[str, Revision]) -> Claim:
    """A claim from its entry, with what it was before it was revised.

    Raises:
        ValueError: for what is missing, unknown or contradictory, and for a rule that cannot be met.
    """
    require(isinstance(entry, dict), f"not a claim with fields: {entry!r}")
    fields = {name: value for name, value in entry.items() if name not in REVISING}
    names, before = entry.get("revised", []), entry.get("before")
    require(isinstance(names, list), f"revised lists revisions, not {names!r}")
    revised = tuple(revisions[one_of("revision", name, revisions)] for name in names)
    require(before is None or bool(revised), "`before` needs a revision")
    claim = parse_one(fields, known)
    if why := unattainable(claim):
        raise ValueError(f"the rule cannot be met: {why}")
    earlier = parse_one(fields | before, known) if before else None
    return replace(claim, revised=revised, before=earlier)


def parse_one(entry: dict, known: set[str]) -> Claim:
    """A claim as it stands."""
    testable = entry.get("testable", True)
    require(isinstance(testable, bool), f"testable is true or false, not {testable!r}")
    needed = ("reason",) if not testable else TIMED if "timed" in entry else DECIDING
    allowed = (*DESCRIBING, "testable", *needed, *(OPTIONAL if needed is DECIDING else ()))
    for field in entry:
        one_of("field", field, (*allowed, *REVISING))
    missing = [name for name in (*REQUIRED, *needed) if entry.get(name) in (None, "")]
    require(not missing, f"lacks {', '.join(missing)}")
    for name in ("id", "paper", "claim", "note", "arxiv", "reason", "protocol", "authors"):
        require(isinstance(entry.get(name, ""), str), f"{name} is {entry.get(name)!r}, not a text: put it in quotes")
    one_of("evidence", entry["evidence"], EVIDENCE)
    registered = entry["registered"]
    require(isinstance(registered, date), f"registered is {registered!r}, not a date like 2026-11-21")
    described = {name: entry[name] for name in DESCRIBING if name in entry} | {"published": theirs(entry)}
    if not testable:
        return Claim(**described, reason=entry["reason"])
    if "timed" in entry:
        return Claim(**described, rule=region(entry["rule"], "ratio"), timed=of_speed(entry["timed"], known))
    return parse_test(entry, Claim(**described), known)


def of_speed(entry, known: set[str]) -> Timed:
    """What a claim of speed compares."""
    allowed = {"table", "fast", "slow", "per_text"}
    good = isinstance(entry, dict) and {"table", "fast"} <= set(entry) <= allowed
    require(good, f"timed holds a table and fast, and maybe slow and per_text: {entry!r}")
    for side in {"fast", "slow"} & set(entry):
        require(isinstance(entry[side], dict) and bool(entry[side]), f"{side} is column: value, not {entry[side]!r}")
    one_of("table", entry["table"], {name for name in known if name.endswith("_speed")})
    require(isinstance(entry.get("per_text", False), bool), f"per_text is true or false, not {entry.get('per_text')!r}")
    require("slow" in entry or not entry.get("per_text"), "per_text shares the time of two rows, and there is no slow")
    return Timed(**entry)


def unattainable(claim: Claim) -> str:
    """`obstacle`, for tasks and numbers of samples that are known; the ledger asks again when all are."""
    families = len(claim.tasks) if isinstance(claim.tasks, tuple) else 0
    return obstacle(claim, families, claim.samples) if claim.samples and families else ""


def parse_test(entry: dict, claim: Claim, known: set[str]) -> Claim:
    """The claim with what decides it."""
    one_of("table", entry["table"], known)
    one_of("statistic", entry["statistic"], STATISTICS)
    length, measure = entry["length"], one_of("measure", entry.get("measure", "value"), MEASURES)
    require(isinstance(length, int) and length > 0, f"length is {length!r}, not a number of tokens")
    require(isinstance(entry["models"], list), f"models is a list, not {entry['models']!r}")
    models = tuple(one_of("independent model", model, INDEPENDENT) for model in entry["models"])
    primary = one_of("primary", entry.get("primary", "mean over tasks"), PRIMARY)
    equal = entry.get("equal_bytes", "")
    require(equal in ("", "stored", "read"), f"equal_bytes is stored or read, not {equal!r}")
    budgets = entry.get("budgets", [])
    require(isinstance(budgets, list) and all(map(number, budgets)), f"budgets is a list of budgets, not {budgets!r}")
    require(bool(budgets) == primary.endswith("budget"), "`budgets` and a primary of every or some budget go together")
    compared = sides(entry, known)
    require(not equal or len(compared) == 2, "equal_bytes compares two sides")
    if entry["statistic"] == "win_count":
        require(primary == "mean over tasks", "win_count counts over all tasks; primary is for the other statistics")
    expected, samples = entry.get("expected"), entry.get("samples", 0)
    require(expected is None or (number(expected) and abs(expected) <= 1), f"expected is a share, not {expected!r}")
    require(isinstance(samples, int) and samples >= 0, f"samples is {samples!r}, not a number of samples")
    claim = replace(
        claim, table=entry["table"], sides=compared, budgets=tuple(budgets), length=length, measure=measure,
        statistic=entry["statistic"], rule=region(entry["rule"], entry["statistic"]), tasks=task_names(entry["tasks"]),
        primary=primary, equal_bytes=equal, protocol=entry.get("protocol", ""), models=models, expected=expected,
        samples=samples, authors=entry.get("authors", ""),
    )  # fmt: skip
    for cell in cells_of(claim, ()):  # methods say themselves what can never work
        for side in cell.sides:
            side.configuration.make()
    return claim


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def number(value) -> bool:
    """Is `value` a number? YAML reads 1e-3 as a text."""
    return type(value) in (int, float)


def one_of(what: str, value, allowed):
    """`value` if it is allowed; the error names the nearest one that is."""
    if value not in allowed:
        raise unknown(what, value, sorted(allowed))
    return value


def theirs(entry: dict) -> str:
    """The published number with its source, or an empty text."""
    published = entry.get("published")
    if published is None:
        return ""
    good = isinstance(published, dict) and set(published) == {"value", "source"}
    require(good and not {None, ""} & set(published.values()), "published holds a value and a source")
    return f"{published['value']} ({published['source']})"


def sides(entry: dict, known: set[str]) -> tuple[dict, ...]:
    """The sides that a claim is about: one for a mean, two for everything else."""
    compare, value = entry.get("compare"), entry.get("value")
    require((compare is None) != (value is None), "needs either `compare` (first and second) or `value`")
    alone = entry["statistic"] == "mean"
    require(alone == (compare is None), f"{entry['statistic']} needs {'`value`' if alone else '`compare`'}")
    if compare is not None:
        require(isinstance(compare, dict) and set(compare) == {"first", "second"}, "compare holds first and second")
    found = (value,) if alone else (compare["first"], compare["second"])
    open_budget = str(entry.get("primary", "")).endswith("budget")
    for side in found:
        require(isinstance(side, dict) and "method" in side, f"a side needs a method: {side!r}")
        for field in side:
            one_of("field", field, SIDE)
        if "model" in side:
            one_of("model", side["model"], ARMS)
        if "table" in side:
            one_of("table", side["table"], known)
        require(isinstance(side.get("protocol", ""), str), f"protocol is {side.get('protocol')!r}, not a text")
        require("budget" in side or open_budget, f"{side['method']} needs a budget")
    require(not open_budget or any("budget" not in side for side in found), "no side leaves its budget to `budgets`")
    return found


def task_names(given) -> str | tuple[str, ...]:
    """Task names of a list, a group of the catalogue, "families", "natural" or
    "natural GROUP"; "all" is left to the table."""
    if given == "all":
        return given
    if given == "families":
        return tuple(sorted(tasks.FAMILIES))
    if isinstance(given, str) and given.split(" ")[0] == "natural":
        group = given.removeprefix("natural").strip()
        one_of("group", group, ("", *tasks.GROUPS))
        return tuple(sorted(name for name, family in tasks.NATURAL.items() if group in ("", family.group)))
    if given in tasks.GROUPS:
        return tuple(sorted(name for name, family in tasks.FAMILIES.items() if family.group == given))
    listed = isinstance(given, list) and bool(given)
    require(listed, f"tasks is a list, all, families, natural or a group, not {given!r}")
    require(len(set(given)) == len(given), f"tasks names one twice: {given}")
    return tuple(sorted(tasks.find(name).name for name in given))


def region(rule, statistic: str) -> tuple[float, float]:
    """The open interval of {above: a}, {below: b} or {within: [a, b]}."""
    require(isinstance(rule, dict) and len(rule) == 1, f"a rule is one of above, below, within, not {rule!r}")
    ((kind, bound),) = rule.items()
    one_of("rule", kind, ("above", "below", "within"))
    bounds = bound if kind == "within" else [bound]
    numbers = isinstance(bounds, list) and all(map(number, bounds))
    require(numbers and len(bounds) == (2 if kind == "within" else 1), f"{kind}: {bound!r} is not what it needs")
    require(bounds == sorted(set(bounds)), f"within: {bound!r} is empty")
    if statistic == "win_count":
        share = kind == "above" and 0 < bound < 1
        require(share, "a win_count is decided by the share of wins, above a bound between 0 and 1")
    low = -inf if kind == "below" else float(bounds[0])
    return low, inf if kind == "above" else float(bounds[-1])
