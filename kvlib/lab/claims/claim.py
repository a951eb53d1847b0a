"""A claim, and the cells of a result table that decide it."""

import json
from dataclasses import dataclass
from datetime import date

from kvlib.lab.evaluation.configuration import Configuration


@dataclass(frozen=True)
class Revision:
    """A change of rule or scope after there were rows: when, and what was removed."""

    name: str
    when: date
    removed: str


@dataclass(frozen=True)
class Timed:
    """What a claim of speed compares.

    table: of data/results, a CSV. fast, slow: column -> value, of one row each; without slow, the row of fast holds its
    ratio to a baseline that took turns with it. per_text: time is shared by the texts of a batch, whose sizes differ.
    """

    table: str
    fast: dict
    slow: dict | None = None
    per_text: bool = False


@dataclass(frozen=True)
class Claim:
    """One claim; what decides it is empty if it is not testable here."""

    id: str
    paper: str
    claim: str
    evidence: str
    registered: date
    arxiv: str = ""
    published: str = ""
    note: str = ""
    front: bool = False  # shown in README
    revised: tuple[Revision, ...] = ()
    before: "Claim | None" = None  # as it was registered before a revision
    reason: str = ""  # why it is not testable here
    table: str = ""
    models: tuple[str, ...] = ()
    sides: tuple[dict, ...] = ()  # first and second, or one alone: fields of `Side`, with those of its configuration
    budgets: tuple = ()
    tasks: str | tuple[str, ...] = ()
    length: int = 0
    statistic: str = ""
    measure: str = "value"
    rule: tuple[float, float] = ()  # the open interval that the claim says the statistic lies in
    expected: float | None = None  # the statistic if the claim is as true as its source says
    samples: int = 0  # of each task, at least
    primary: str = "mean over tasks"
    equal_bytes: str = ""
    protocol: str = ""
    authors: str = ""  # which settings are the authors'
    timed: Timed | None = None  # of speed: what is compared, in place of everything from `table` on but the rule

    @property
    def ours(self) -> bool:
        """Nobody's claim but this project's."""
        return self.evidence == "ours"

    @property
    def universal(self) -> bool:
        """Said of every cell, so that one is enough to contradict it."""
        return self.primary.startswith("every")


@dataclass(frozen=True)
class Side:
    """Rows that a claim is about: of a configuration, and of the claim's table, models and protocol or of others.

    Where models are trained for a method they are compared themselves, and need not stand in one table.
    """

    configuration: Configuration
    table: str
    protocol: str
    model: str = ""  # "": one after the other, the claim's


@dataclass(frozen=True)
class Cell:
    """What one test looks at."""

    label: str
    tasks: tuple[str, ...]
    sides: tuple[Side, ...]


def cells_of(claim: Claim, all_tasks: tuple[str, ...]) -> list[Cell]:
    """The cells that decide a claim; `all_tasks` are those that its table has."""
    names = all_tasks if claim.tasks == "all" else claim.tasks
    if claim.budgets:
        return [Cell(f"at {budget:g}", names, sides_of(claim, budget)) for budget in claim.budgets]
    made = sides_of(claim)
    if claim.primary.endswith("task"):
        return [Cell(f"on {name}", (name,), made) for name in names] or [Cell("", (), made)]
    return [Cell("", names, made)]


def sides_of(claim: Claim, budget=None) -> tuple[Side, ...]:
    return tuple(
        Side(
            Configuration(side["method"], side.get("budget", budget), json.dumps(side.get("arguments") or {})),
            side.get("table", claim.table),
            side.get("protocol", claim.protocol),
            side.get("model", ""),
        )
        for side in claim.sides
    )


def named(configuration: Configuration) -> str:
    arguments = json.loads(configuration.arguments)
    pairs = ", ".join(f"{name}={value}" for name, value in sorted(arguments.items()))
    return f"{configuration.method} ({pairs})" if pairs else configuration.method
