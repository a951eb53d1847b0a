"""Figures that follow from tables are drawn by the lessons' own lines, without a model; all others are named."""

import ast
import hashlib
import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

import kvlib
from kvlib.lab import plotting
from kvlib.lab.notebooks import files, redraw, slicing
from kvlib.paths import FIGURES, ROOT

COMMITTED = json.loads((FIGURES / "manifest.json").read_text())
FROM_TABLES = {file.removesuffix(".svg") for file, entry in COMMITTED.items() if not entry["live"]}


# Slices


PROGRAMS = {
    "what is replaced is not needed": """
x = model()
x = 1  # needed
y = x + 1  # needed
use(y)""",
    "what may be replaced is": """
x = 1  # needed
y = 3  # needed
if y:  # needed
    x = 2
use(x)""",
    "what is added to": """
x = []  # needed
x += [1]  # needed
use(x)""",
    "columns": """
frame = read()  # needed
frame["x"] = 1  # needed
other["x"] = 1
use(frame)""",
    "attributes, below an index": """
panels = read()  # needed
panels[0].title.text = "a"  # needed
use(panels)""",
    "methods": """
rows = []  # needed
rows.append(1)  # needed
last = rows.pop()  # needed
there = rows.get(1)
use(rows)""",
    "generators draw in order": """
lot = generator(0)  # needed
first = lot.random()  # needed
second = lot.random()  # needed
use(second)""",
    "handed over for its effect": """
rows, seed = [1, 2], 0  # needed
print(rows)
shuffle(rows)  # needed
use(rows)""",
    "but numbers and texts stay what they are": """
seed = 0  # needed
show(seed)
use(seed)""",
    "loops that fill": """
rows, other = [], []  # needed
for number in range(3):  # needed
    rows.append(number)
for number in range(3):
    other.append(number)
use(rows)""",
    "loops over what they change": """
frames = read()  # needed
for frame in frames:  # needed
    frame["x"] = 1
for frame in frames:
    y = frame["x"]
use(frames)""",
    "names of a loop": """
name = model()
show = {}  # needed
for name in ("a", "b"):  # needed
    twice = 2 * name
    show[twice] = name
use(show)""",
    "names of a comprehension": """
name, key = model()
rows = {key: name for key, name in pairs if key}  # needed
longest = max(rows, key=lambda name: len(name))  # needed
use(longest)""",
    "but not where it begins": """
rows = [1]  # needed
rows = [row for row in rows for rows in row]  # needed
use(rows)""",
    "nor where a function does": """
x = 1  # needed
each = [lambda x=x: 2 * x, 1]  # needed
use(each)""",
    "functions": """
def twice(x):  # needed
    y = 2 * x
    return y
y = model()
x = model()
use(twice(1))""",
    "what functions look at when they are called": """
def scaled(x):  # needed
    return factor * x
factor = 2  # needed
use(scaled(1))""",
    "what functions change": """
rows = []  # needed
def add(x):  # needed
    rows.append(x)
add(1)  # needed
use(rows)""",
    "names in queries": """
share = 0.5  # needed
frame = read()  # needed
use(frame.query("budget == @share"))""",
    "imports": """
import os.path as place, sys  # needed
from maths import sine as sin  # needed
place.chdir("x")
place.settings["x"] = 1  # needed
use(place, sin)""",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_slice_has_all_that_a_statement_follows_from(name):
    text = PROGRAMS[name].strip()
    lines, wanted = ast.parse(text).body, [number for number, line in enumerate(text.splitlines(), 1) if "# n" in line]
    taken = slicing.needed(lines, len(lines) - 1, len(lines) - 1)
    assert [lines[place].lineno for place in sorted(taken)] == [*wanted, lines[-1].lineno]


def test_what_is_taken_as_a_whole_may_change_things_under_any_name():
    lines = ast.parse("a = 1\nb = 2\nfigure, axes = plots()\ntwin = axes.twin()\ntwin.plot(b)\nsave(figure)").body
    assert slicing.needed(lines, 2, 5) == {1, 2, 3, 4, 5}


# A toy


PARAMETERS = 'model_name = "toy"\nbudget = 0.2'
TABLES = """
table = pd.read_csv("77_toy.csv")
recomputed = model(table["budget"])
table["score"] = 100 * table["score"]
shown = []
shown.append("score")
"""
FIGURE = """
assert False, "checks are not run"

figure, axes = plt.subplots()
for name in shown:
    axes.plot(table["budget"] / budget, table[name])
axes.set_title("a table")
twin = axes.twinx()
twin.set_ylabel("twice")
save(figure, "77_toy_table")
table.round(1)
"""
LIVE = 'figure, axes = plt.subplots()\naxes.plot(model([1]))\nsave(figure, "77_toy_live", live=True);'
MIXED = 'figure, axes = plt.subplots()\naxes.axhline(budget * recomputed)\nsave(figure, "77_toy_mixed");'
SETUP = """
import matplotlib.pyplot as plt
import pandas as pd

import kvlib
from kvlib.lab.plotting import save

model = kvlib.load(model_name)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A lesson with one figure from a table, a live one, and one that is not live and needs the model."""
    parameters = nbformat.v4.new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]})
    cells = [parameters, *(nbformat.v4.new_code_cell(text) for text in (SETUP, TABLES, FIGURE, LIVE, MIXED))]
    path = tmp_path / "notebooks" / "77_toy.ipynb"
    (path.parent / "params").mkdir(parents=True)
    (path.parent / "params" / "default.yaml").write_text("77_toy: {budget: 0.5}")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    pd.DataFrame({"budget": [0.2, 0.5], "score": [0.1, 0.4]}).to_csv(path.parent / "77_toy.csv")
    monkeypatch.setenv("KVLIB_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(plotting, "NOTEBOOKS", path.parent)
    return path


def test_draws_the_very_figure_of_the_lesson(toy, tmp_path, monkeypatch):
    assert redraw.draw(toy) == ["77_toy_table"]
    drawn = (tmp_path / "figures" / "77_toy_table.svg").read_bytes()
    assert [file.name for file in tmp_path.glob("figures/*.svg")] == ["77_toy_table.svg"]

    monkeypatch.chdir(toy.parent)
    monkeypatch.setattr(kvlib, "load", lambda name: lambda x: x[0])
    whole = [SETUP, TABLES, FIGURE.replace("assert False", "assert True"), LIVE, MIXED]
    exec("\n".join([PARAMETERS, "budget = 0.5", *whole]), {})
    plt.close("all")
    assert len(list(tmp_path.glob("figures/*.svg"))) == 3
    assert (tmp_path / "figures" / "77_toy_table.svg").read_bytes() == drawn


def test_says_what_is_drawn_and_what_is_not(toy, tmp_path, capfd):
    redraw.redraw([toy])
    said, noise = capfd.readouterr()
    assert said.splitlines()[0].startswith("1 of 3 figures are drawn, in ") and said.count("77_toy_table") == 1
    assert said.endswith("stay as they are: 77_toy_live, 77_toy_mixed\n")
    assert not noise and [*json.loads((tmp_path / "figures" / "manifest.json").read_text())] == ["77_toy_table.svg"]


def test_a_line_that_fails_is_an_error(toy):
    toy.write_text(toy.read_text().replace("100 * table[", "100 * tabel["))
    with pytest.raises(NameError, match="tabel"):
        redraw.draw(toy)


# The lessons


def test_every_figure_of_the_lessons_is_seen():
    found = {name: places for path in files.all_notebooks() for name, places in redraw.slices(path).items()}
    assert found.keys() == {file.removesuffix(".svg") for file in COMMITTED}
    assert {name for name, places in found.items() if places} == FROM_TABLES


def test_a_lesson_is_drawn_as_committed(tmp_path):
    """As make does it; the test below does it with all lessons."""
    environment = os.environ | {"KVLIB_FIGURES": str(tmp_path)}
    command = [sys.executable, "-m", "kvlib.lab.notebooks.redraw", "91_performance"]
    drawn, others = subprocess.check_output(command, env=environment, cwd=ROOT, text=True).splitlines()
    names = [name for name in FROM_TABLES if name.startswith("91_")]
    assert drawn.count("91_") == len(names) and not any(name in others for name in names)
    check(tmp_path, names)


@pytest.mark.deep
def test_all_lessons_are_drawn_as_committed(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_FIGURES", str(tmp_path))
    redraw.redraw(files.all_notebooks())
    check(tmp_path, FROM_TABLES)


def check(folder, names):
    files = {f"{name}.svg": hashlib.sha256((folder / f"{name}.svg").read_bytes()).hexdigest() for name in names}
    assert files == {file: COMMITTED[file]["sha256"] for file in files}
