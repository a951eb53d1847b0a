"""What result tables have to hold for the registered claims to be decided.

python -m kvlib.lab.claims.needed [TABLE ...]      list it, and what the studies lack of it
"""

import json
import sys
from itertools import product

import pandas as pd

from kvlib.lab.claims.claim import Claim, cells_of, named
from kvlib.lab.claims.registered import read
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study

COLUMNS = ["table", *CELL, "samples"]


def needed(claims: list[Claim]) -> pd.DataFrame:
    """Columns table, `CELL`, samples: every cell that decides a claim, with the most samples that one asks for."""
    rows = [
        row(side.table, side.model or model, side.configuration, task, claim.length, side.protocol, claim.samples)
        for claim in claims
        for model in claim.models
        for cell in cells_of(claim, ())
        for side, task in product(cell.sides, cell.tasks)
    ]
    found = pd.DataFrame(rows, columns=COLUMNS).groupby(COLUMNS[:-1], as_index=False, sort=True)
    return found["samples"].max()


def held(studies: dict[str, Study]) -> pd.DataFrame:
    """The same columns: what tables of these studies hold when they are made."""
    rows = [
        row(name, model, configuration, task, study.length, study.protocol, study.samples(model, task, configuration))
        for name, study in studies.items()
        for model, task, configuration in product(study.models, study.tasks, study.everything)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def row(table: str, model: str, configuration: Configuration, task: str, length: int, protocol: str, samples: int):
    """One row; arguments in one order, so that the same ones are equal as texts."""
    arguments = json.dumps(json.loads(configuration.arguments), sort_keys=True)
    cell = (model, configuration.method, float(configuration.budget), arguments, task, length, protocol)
    return (table, *cell, samples)


def lacking(wanted: pd.DataFrame, there: pd.DataFrame) -> pd.DataFrame:
    """The rows of `needed` of which `held` has fewer samples or none, with what there is in a column `held`."""
    both = wanted.merge(there.rename(columns={"samples": "held"}), on=COLUMNS[:-1], how="left").fillna({"held": 0})
    return both[both["held"] < both["samples"]].astype({"held": int})


def listed(cells: pd.DataFrame) -> list[str]:
    """Lines: for every table, model, protocol, tasks and number of samples the methods with their budgets."""
    settings = [*COLUMNS[:2], "length", "protocol", "samples", "method", "arguments", "budget"]
    by_tasks: dict[tuple, list[tuple]] = {}
    for (*scope, samples, method, arguments, budget), own in cells.groupby(settings, sort=True):
        by_tasks.setdefault((*scope, samples, *own["task"]), []).append((method, arguments, budget))
    lines = []
    for (*scope, samples), tasks, methods in ((key[:5], key[5:], value) for key, value in sorted(by_tasks.items())):
        lines.append(f"{' '.join(map(str, scope))}, {samples} samples of each of {', '.join(tasks)}:")
        budgets: dict[str, list[str]] = {}
        for method, arguments, budget in methods:
            budgets.setdefault(named(Configuration(method, budget, arguments)), []).append(f"{budget:g}")
        lines += [f"    {name}: {' '.join(values)}" for name, values in budgets.items()]
    return lines


def main() -> None:
    cells = needed(read())
    cells = cells[cells["table"].isin(sys.argv[1:])] if sys.argv[1:] else cells
    print(*listed(cells), sep="\n")
    less = lacking(cells, held(STUDIES))
    print(f"\nThe studies lack {len(less)} of these {len(cells)} cells:", *listed(less), sep="\n")


if __name__ == "__main__":
    main()
