"""What the lessons share, what they compute beside the library, and the checks of their exercises.

    model, tokenizer = lessons.setup(model_name, device)        style, no gradients, a banner for another model
    lessons.prefill(model, ids)                                 a snapshot of one prompt, kept on disk between runs
    lessons.read_on(model, snapshot, ids)                       the snapshot of that prompt with ids behind it
    lessons.ask(...), lessons.answers(model, ..., prompt, {name: method}, later=False)
                                                                what the model writes from a compressed cache
    lessons.budget_axis(axes), lessons.interval_lines(axes, summary)
                                                                means with intervals over the share of bytes
    lessons.interval_points(axes, table)                        a point with its interval per row
    lessons.interval_bars(axes, places, found, **look)          the same upright, over places on the horizontal axis
    lessons.annotated_grid(axes, table, label, limits=...)      coloured cells with numbers; `neutral` for differences
    lessons.strips(axes, {method: kept}, marks={...})           which tokens each method keeps
    lessons.recompute(name, samples, seed)                      a table of `data/results`, verified by a few samples
    lessons.verdicts(ids)                                       claims and what became of them
    comparing.changes(table, {label: (first, second, budget)}, tasks)
                                                                one setting minus another, on the prompts of both

Drawings take methods by their names in `kvlib.METHODS`, with arguments as in the column `configuration`
("snapkv (kernel=15)"), and write them as in print (`kvlib.lab.plotting.printed`). An exercise is a cell `x-stub` and a
cell `x-check` tagged `check` and `raises-exception` in the lesson, and a cell `x-solution` in the notebook of the same
name in `notebooks/solutions`, which a run puts behind the stub.
"""

from kvlib.lab.lessons.asking import answers, ask
from kvlib.lab.lessons.drawing import (
    annotated_grid,
    budget_axis,
    interval_bars,
    interval_lines,
    interval_points,
    strips,
)
from kvlib.lab.lessons.prefills import prefill, read_on
from kvlib.lab.lessons.start import setup
from kvlib.lab.lessons.tables import recompute, verdicts

__all__ = [
    "annotated_grid", "answers", "ask", "budget_axis", "interval_bars", "interval_lines", "interval_points", "prefill",
    "read_on", "recompute", "setup", "strips", "verdicts",
]  # fmt: skip
