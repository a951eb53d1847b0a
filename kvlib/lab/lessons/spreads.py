"""UNComp's groups and spreads in two tables, each against one budget for all heads."""

import pandas as pd

from kvlib.lab.lessons.comparing import changes
from kvlib.lab.lessons.typing_heads import moved
from kvlib.methods.head_groups import Measured

UNIFORM = "uncomp (spread=0.0)"  # one budget for all heads
BUDGET, NARROW, WIDE = 0.2, 1 / 3, 2 / 3  # of the mean head; spreads
LOTS = ("uncomp_random", "uncomp_random (seed=1)", "uncomp_random (seed=2)")
SETTINGS = {  # model -> (kind, groups, spread, configuration)
    "smollm2": [
        ("by entropy", 3, NARROW, f"uncomp (spread={NARROW})"),
        ("by entropy", 3, WIDE, "uncomp"),
        ("by entropy", 3, 0.95, "uncomp (spread=0.95)"),
        ("over all layers", 2, NARROW, f"uncomp (types=smollm2, across=True, groups=2, spread={NARROW})"),
        ("over all layers", 8, WIDE, f"uncomp (types=smollm2, across=True, groups=8, spread={WIDE})"),
        *(("by lot", 3, WIDE, lot) for lot in LOTS),
        ("by lot", 3, 0.95, "uncomp_random (spread=0.95)"),
    ],
    "minilm": [
        ("by entropy", 2, NARROW, f"uncomp (groups=2, spread={NARROW})"),
        ("by entropy", 4, NARROW, f"uncomp (groups=4, spread={NARROW})"),
        ("by entropy", 8, NARROW, f"uncomp (spread={NARROW})"),
        ("by entropy", 2, WIDE, "uncomp (groups=2)"),
        ("by entropy", 4, WIDE, "uncomp (groups=4)"),
        ("by entropy", 8, WIDE, "uncomp"),
        ("by entropy", 2, 0.95, "uncomp (groups=2, spread=0.95)"),
        *(
            ("over all layers", groups, WIDE, f"uncomp (types=minilm, across=True, groups={groups})")
            for groups in (2, 8)
        ),
        *(("by lot", 8, WIDE, lot) for lot in LOTS),
        ("by lot", 2, 0.95, "uncomp_random (groups=2, spread=0.95)"),
    ],
}


def above(tables: dict, families: dict, measured: dict[str, Measured]) -> pd.DataFrame:
    """What each setting is ahead of one budget for all heads, at the same bytes and on the same prompts.

    Args:
        tables, families, measured: model -> rows of its table; tasks over which the mean is; how many heads it has.

    Returns:
        a row per setting: model, kind (who has chosen budgets), groups, spread; "moved, %", of all kept tokens
        (`moved`); what `changes` returns, in percentage points.
    """
    rows = []
    for name, settings in SETTINGS.items():
        for kind, groups, spread, setting in settings:
            layers = measured[name].layer_scores["prose"].shape[1] if kind == "over all layers" else 1
            given = 100 * moved(measured[name].kv_heads * layers, groups, spread)
            named = {"model": name, "kind": kind, "groups": groups, "spread": spread, "moved, %": given}
            change = changes(tables[name], {"": (setting, UNIFORM, BUDGET)}, families[name])
            rows.append(named | dict(change.iloc[0]))
    return pd.DataFrame(rows)
