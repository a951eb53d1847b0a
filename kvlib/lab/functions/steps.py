"""Steps of which generated functions are composed: what each asks for in English, and how it is written in Python.

They stand in `templates/KIND.yaml`, by the kind of value that they take:

    says: wordings of the task. Placeholders: $it is the value ("the prices", or "them"), $item or $items what it
        consists of, $key a dictionary's key, $k an operand, $purpose what a helper tells.
    filter: the condition for what is kept of a list; or map: what every item of a list becomes; or writes: the lines.
        Placeholders besides: $source and $result are variables, $helper is a function that stands above.
    gives: kind of the result, if not the same. result: its name; without one the lines return it themselves.
    of: what the result consists of, if not of the same; of a dictionary "item key".
    k: what $k may be. helper: kind of the helper. first: only as the first step, for it is slow on large numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("number", "numbers", "text", "words", "table")  # int, list[int], str, list[str], dict[str, int]
LOOPS = {
    "filter": "$result = []\nfor $item in $source:\n    if {}:\n        $result.append($item)",
    "map": "$result = []\nfor $item in $source:\n    $result.append({})",
}
KEPT = ("kept", "chosen", "selected")  # names of what a filter leaves


@dataclass(frozen=True)
class Step:
    """One step. `results`: names for what it gives, of which the first is taken that is free."""

    name: str
    takes: str
    gives: str
    says: tuple[Template, ...]
    body: Template
    results: tuple[str, ...]
    of: str
    operand: tuple[int, ...] | tuple[str, ...]
    helper: str | None
    first: bool


def read(name: str, takes: str, entry: dict) -> Step:
    loop = next((loop for loop in LOOPS if loop in entry), None)
    body = LOOPS[loop].format(entry[loop]) if loop else entry["writes"].rstrip()
    results = KEPT if loop == "filter" else tuple(entry.get("result", "").split())
    says = tuple(map(Template, entry["says"]))
    return Step(
        name, takes, entry.get("gives", takes), says, Template(body), results, entry.get("of", ""),
        tuple(entry.get("k", ())), entry.get("helper"), entry.get("first", False),
    )  # fmt: skip


def read_all() -> dict[str, Step]:
    """All steps by name, in the order of the files."""
    files = {kind: yaml.safe_load((TEMPLATES / f"{kind}.yaml").read_text("utf8")) for kind in KINDS}
    return {name: read(name, kind, entry) for kind, entries in files.items() for name, entry in entries.items()}


STEPS = read_all()
