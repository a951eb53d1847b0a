"""Draw anew the figures that follow from tables alone, by the lessons' own lines, without a model.

    python -m kvlib.lab.notebooks.redraw [LESSON]    of one lesson, such as 90_comparison, or of all

Of a lesson run the statements from where such a figure is begun to where it is saved, and those that they follow from
(`kvlib.lab.notebooks.slicing`). Figures saved with `live=True` show what a model has just computed and need their whole
lesson; so does a figure whose statements turn out to ask for a model.
"""

import argparse
import ast
import contextlib
import io
import multiprocessing
import sys
import time
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import kvlib
from kvlib.lab.notebooks.files import all_notebooks, code_cells, lesson, parse
from kvlib.lab.notebooks.parameters import parameters
from kvlib.lab.notebooks.slicing import needed, replaced, root
from kvlib.lab.plotting import use_style


class NeedsModel(Exception):
    """A statement has asked for a model."""


def statements(path: Path) -> list[tuple[str, ast.stmt]]:
    """The statements of a lesson with its solutions, in the default profile, each with the id of its cell."""
    found = []
    for cell in code_cells(lesson(path)):
        found += [(cell["id"], line) for line in parse(cell).body]
        if cell["id"] == "parameters":
            values = "\n".join(f"{name} = {value!r}" for name, value in parameters(path, "default").items())
            found += [("injected-parameters", line) for line in ast.parse(values).body]
    return found


def slices(path: Path) -> dict[str, set[int] | None]:
    """Of each figure of a lesson the places of the statements that it follows from; None if it is live."""
    lines, found = [line for _, line in statements(path)], {}
    for place, line in enumerate(lines):
        match line:
            case ast.Expr(ast.Call(ast.Name("save"), [figure, ast.Constant(name)], live)):
                begun = max((at for at in range(place) if root(figure) & replaced(lines[at])), default=0)
                found[name] = None if live else needed(lines, begun, place)
    return found


def draw(path: Path) -> list[str]:
    """Draw the figures of one lesson that need no model, and return their names."""
    matplotlib.use("agg")
    torch.set_num_threads(1)  # as for lessons: sums depend on it
    use_style()
    wanted = {name: places for name, places in slices(path).items() if places}
    variables = {"__name__": "__main__"}
    with (
        mock.patch.object(kvlib, "load", side_effect=NeedsModel),
        contextlib.chdir(path.parent),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for place, (cell, line) in enumerate(statements(path)):
            if any(place in places for places in wanted.values()):
                try:
                    exec(compile(ast.Module([line], []), f"{path.name}, cell {cell}", "exec"), variables)
                except NeedsModel:
                    wanted = {name: places for name, places in wanted.items() if place not in places}
    plt.close("all")
    return list(wanted)


def redraw(paths: list[Path]) -> None:
    """Draw the figures of some lessons that need no model, two lessons at a time, and say which they are."""
    start, found = time.monotonic(), {path: slices(path) for path in paths}
    some = [path for path, figures in found.items() if any(figures.values())]
    with multiprocessing.get_context("fork").Pool(2) as pool:  # importing torch takes seconds, once is enough
        drawn = [name for names in tqdm(pool.imap(draw, some), "lessons", len(some), disable=None) for name in names]
    every = [name for figures in found.values() for name in figures]
    others = [name for name in every if name not in drawn]
    seconds = f"{time.monotonic() - start:.0f} s"
    print(f"{len(drawn)} of {len(every)} figures are drawn, in {seconds}: {', '.join(drawn) or 'none'}")
    print(f"The others need their whole lesson and stay as they are: {', '.join(others) or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", nargs="?")
    stem, lessons = parser.parse_args().lesson, {path.stem: path for path in all_notebooks()}
    if stem and stem not in lessons:
        sys.exit(f"There is no lesson {stem!r}; there are {', '.join(lessons)}")
    redraw([lessons[stem]] if stem else list(lessons.values()))
