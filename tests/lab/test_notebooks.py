"""Every notebook runs and keeps to its form; the tools that run, store and check notebooks notice what they should."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pandas as pd
import pytest
import yaml

from kvlib.lab import plotting
from kvlib.lab.claims import registered
from kvlib.lab.notebooks import dependencies, figures, files, outputs, parameters, running, sources, students
from kvlib.paths import NOTEBOOKS, ROOT

EVERY = [pytest.param(path, id=path.stem) for path in files.all_notebooks()]
SOLUTIONS = [pytest.param(path, id=path.stem) for path in sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))]
GOES_ON = "raises-exception"
TAGS = {"parameters", "hide-input", "hide-cell", "check", "exercise", "solution", GOES_ON}
LESSON = ["Method", "Experiment", "Checks", "Exercises", "What we saw", "References"]


def copy_project(root: Path) -> None:
    """What `make figures` needs besides the environment, without any notebook."""
    shutil.copytree(ROOT / "kvlib", root / "kvlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy2(ROOT / name, root)
    (root / "notebooks" / "params").mkdir(parents=True)
    (root / "data" / "results").mkdir(parents=True)


def write_notebook(root: Path, *cells: str, profile: str = "{}") -> Path:
    """notebooks/77_toy.ipynb with a parameters cell, then `cells`; `profile` is all of its profiles."""
    code = [nbformat.v4.new_code_cell("budget = 0.5  # kept\n", id="parameters", metadata={"tags": ["parameters"]})]
    code += [nbformat.v4.new_code_cell(cell, id=f"cell-{number}") for number, cell in enumerate(cells)]
    metadata = {"kernelspec": files.KERNEL, "kvlib": {}}
    path = root / "notebooks" / "77_toy.ipynb"
    (path.parent / "params").mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=metadata), path)
    for name in ("smoke", "default"):
        (path.parent / "params" / f"{name}.yaml").write_text(profile)
    return path


def execute(path: Path) -> None:
    """Stand in for a run of the default profile: each cell prints its own number."""
    notebook = files.read(path)
    notebook["metadata"]["papermill"] = {"duration": 1.0}
    for number, cell in enumerate(files.code_cells(notebook)):
        cell["metadata"]["execution"] = {"iopub.status.busy": "now"}
        cell["execution_count"] = 10 + number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": f"{part}\n"} for part in (number, "end")]
    injected = nbformat.v4.new_code_cell("budget = 0.2", metadata={"tags": ["injected-parameters"]})
    notebook["cells"].insert(1, injected)
    executed = path.parents[1] / "build" / "default" / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.write_text(files.to_text(notebook))


@pytest.fixture
def published(tmp_path) -> Path:
    """A toy notebook about a toy module, with fresh stored outputs."""
    (tmp_path / "kvlib").mkdir()
    (tmp_path / "kvlib" / "__init__.py").write_text("")
    (tmp_path / "kvlib" / "toy.py").write_text(
        '"""Toy."""\n\n\ndef half(x):\n    """Halve."""\n    return x / 2\n\n\ndef other(): return 1\n'
    )
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "77_toy.parquet").write_text("budget,score\n0.5,1\n")
    path = write_notebook(tmp_path, "import kvlib.toy\nprint(kvlib.toy.half(budget))\ntable = '77_toy.parquet'\n")
    execute(path)
    outputs.publish(tmp_path)
    outputs.check(tmp_path)
    return path


# The notebooks of this repository


# One about the cache, one that evicts, one that reads; `make figures`, and so CI, runs all of them in full.
FIRST = [path for path in EVERY if path.id in ("00a_cache", "01_vatp", "04_tidaldecode")]
LATER = [pytest.param(path.values[0], id=path.id, marks=pytest.mark.deep) for path in EVERY if path not in FIRST]


@pytest.mark.parametrize("path", [*FIRST, *LATER])
def test_runs_in_the_smoke_profile(path, tmp_path):
    """In a copy, so that neither build/ nor figures/ is touched. `make smoke` runs every lesson."""
    copy_project(tmp_path)
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").symlink_to(ROOT / "data")
    running.run(tmp_path / "notebooks" / path.name, "smoke")
    assert list((tmp_path / "build" / "smoke" / "figures").glob(f"{path.stem}_*.svg"))


@pytest.mark.parametrize("path", [*EVERY, *SOLUTIONS])
def test_is_in_normal_form(path):
    notebook = files.read(path)
    nbformat.validate(json.loads(path.read_text()))
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    assert files.to_text(files.normalise(notebook)) == path.read_text(), "make publish"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert not any(re.fullmatch("[0-9a-f]{8}.*", name) for name in ids), "give cells readable ids"
    assert not any(set(cell["metadata"].get("tags", [])) - TAGS for cell in notebook["cells"])


@pytest.mark.parametrize("path", EVERY)
def test_reads_like_the_others(path):
    cells = files.read(path)["cells"]
    prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert re.match(r"# \d\d[a-z]? ", cells[0]["source"]) and len(re.findall(r"(?m)^# ", prose)) == 1
    assert [heading for heading in LESSON if not re.search(rf"(?m)^## {heading}", prose)] == []
    drawn = sum(len(re.findall(r"(?m)^\s*save\(", cell["source"])) for cell in cells)
    assert re.findall(r"(?m)^\*\*Figure (\d+)\.\*\*", prose) == [str(number + 1) for number in range(drawn)], "captions"
    exercises = re.findall(r"(?m)^\*\*Exercise (\d+) ★{1,3} \((?:\d+ minutes|open)\)\.", prose)
    assert exercises and len(exercises) == len(re.findall(r"(?m)^\*\*Exercise", prose)), "graded, with minutes"
    assert not re.search(r"!\[[^\]]*\]\(https?:|<img[^>]*https?:", prose), "images are files of this repository"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", prose), "a control character: a backslash that Python has read"
    assert [cell["id"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])] == ["parameters"]
    for cell in cells:
        where, source, tags = cell["id"], cell["source"], set(cell["metadata"].get("tags", []))
        assert not outputs.MACHINE_PATH.search(source), where
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 40, where
            assert not re.search(r"(?m)^\s*[!%]\s*(?:pip|conda|git)\b|tqdm\.(?:auto|notebook)", source), where
            definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            defines = any(isinstance(node, definitions) for node in ast.walk(files.parse(cell)))
            assert not defines or tags & {"exercise", "solution"}, f"{where}: functions belong to kvlib"


@pytest.mark.parametrize("path", SOLUTIONS)
def test_solutions_stand_apart(path):
    """Each is behind a stub when the lesson runs, and no lesson shows one."""
    cells = files.code_cells(files.read(path))
    assert cells and all(cell["metadata"]["tags"] == ["solution"] for cell in cells)
    ids = [cell["id"] for cell in files.lesson(NOTEBOOKS / path.name)["cells"]]
    for cell in cells:
        assert ids[ids.index(cell["id"]) - 1] == cell["id"].replace("-solution", "-stub")
    for cell in files.code_cells(files.read(NOTEBOOKS / path.name)):
        tags = cell["metadata"].get("tags", [])
        assert "solution" not in tags
        assert cell["id"] == "checks-run" or ("check" in tags) == (GOES_ON in tags)


LEDGER = re.compile(r"ledger\.csv|lessons\.verdicts\(")  # in what shows some of it


@pytest.mark.parametrize("path", [case for case in EVERY if LEDGER.search(case.values[0].read_text())])
def test_verdicts_shown_are_those_of_the_ledger(path):
    """The ledger grows with every paper, so notebooks that show some of it are not stale whenever it changes."""
    (cell,) = [cell for cell in files.read(path)["cells"] if LEDGER.search(cell["source"])]
    shown = "".join(output.get("data", {}).get("text/html", "") for output in cell["outputs"])
    shown = html.unescape(shown)
    named = {table.stem for table in dependencies.tables(path)}
    ledger = pd.read_csv(ROOT / "data" / "results" / "ledger.csv").set_index("id").fillna({"ours": "–"})
    of_tables = [claim.id for claim in registered.read() if (claim.timed or claim).table in named]
    chosen = [name for name in of_tables if f'"{name}"' in cell["source"]]  # lessons may share the claims of a table
    rows = [ledger.loc[name] for name in chosen or of_tables]
    assert rows
    for row in rows:
        assert re.search(
            rf"{re.escape(row['claim'])}</td>\s*<td>{re.escape(row['ours'])}</td>\s*<td>{row['verdict']}<", shown
        )


def test_a_lesson_follows_from_tables_that_its_helpers_or_loops_name():
    found = {path.stem: {file.name for file in dependencies.tables(path)} for path in files.all_notebooks()}
    assert {"00_real.parquet", "00_real_later.parquet"} <= found["00b_eviction"]  # names in a tuple, without an ending
    assert {"90_real.parquet", "90_bytes.parquet", "02_uncomp.parquet"} <= found["90_comparison"]  # in a helper
    assert "90_real.parquet" not in found["91_performance"] and not found["00a_cache"]


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_profiles_set_known_parameters_only(profile):
    content = yaml.safe_load((NOTEBOOKS / "params" / f"{profile}.yaml").read_text())
    assert content.keys() <= {path.stem for path in files.all_notebooks()}
    for path in files.all_notebooks():
        parameters.parameters(path, profile)


# Running


def make(root: Path, *arguments: str, installed: bool = True) -> subprocess.CompletedProcess:
    """make in a copy of the project; `installed` lends it this environment."""
    command = ["make", *arguments, *(installed * [f"PYTHON={sys.executable}", "-o", ".venv/installed"])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_make_runs_what_changed(tmp_path):
    copy_project(tmp_path)
    (tmp_path / "kvlib" / "__init__.py").write_text("")  # the toy needs no torch
    (tmp_path / "kvlib" / "toy.py").write_text("half = 0.5\n")
    draw = (
        "import matplotlib.pyplot as plt\nfrom kvlib import toy\nfrom kvlib.lab.plotting import save\n"
        "figure, axes = plt.subplots()\naxes.plot([toy.half, budget])\nsave(figure, '77_toy_line')\n"
    )
    profile = "77_toy: {budget: 0.25}"
    write_notebook(tmp_path, draw, "assert budget == 0.25 and '77_toy.parquet'", profile=profile)
    result = make(tmp_path, "figures", "PROFILE=smoke", "-j2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("77_toy: running.*77_toy: done in .*build/smoke/77_toy.ipynb", result.stdout, re.DOTALL)
    executed = files.read(tmp_path / "build" / "smoke" / "77_toy.ipynb")
    assert any(
        "image/png" in output.get("data", {}) for cell in executed["cells"] for output in cell.get("outputs", [])
    )
    manifest = json.loads((tmp_path / "build" / "smoke" / "figures" / "manifest.json").read_text())
    assert manifest["77_toy_line.svg"]["notebook"] == "77_toy"
    assert not (tmp_path / "figures").exists()

    def up_to_date(*touched) -> bool:
        code = make(tmp_path, "build/smoke/77_toy.ipynb", "PROFILE=smoke", "-q", *touched).returncode
        assert code in (0, 1)  # 2 would be an error
        return code == 0

    assert up_to_date()
    (tmp_path / "notebooks" / "params" / "smoke.yaml").write_text(profile + "  # same values")
    assert up_to_date()
    assert up_to_date("-W", "kvlib/lab/results/tables.py")
    assert not up_to_date("-W", "kvlib/core/attention.py")  # everything runs through the core
    assert not up_to_date("-W", "kvlib/toy.py")
    (tmp_path / "data" / "results" / "77_toy_more.parquet").write_text("not named in the notebook\n")
    assert up_to_date()
    (tmp_path / "data" / "results" / "77_toy.parquet").write_text("new\n")
    assert not up_to_date()
    (tmp_path / "data" / "results" / "77_toy.parquet").unlink()
    (tmp_path / "notebooks" / "params" / "smoke.yaml").write_text("77_toy: {budget: 0.75}")
    assert not up_to_date()


def test_failed_notebook_stays_failed(tmp_path):
    copy_project(tmp_path)
    write_notebook(tmp_path, "print('before')", "1 / 0")
    for _ in range(2):
        result = make(tmp_path, "figures", "PROFILE=smoke")
        assert result.returncode != 0
        assert "ZeroDivisionError" in result.stderr
        assert "read on in build/smoke/77_toy.failed.ipynb and build/smoke/77_toy.log" in result.stderr
        assert sorted(path.name for path in (tmp_path / "build" / "smoke").glob("*.ipynb")) == ["77_toy.failed.ipynb"]


def test_unsupported_python_is_refused(tmp_path):
    copy_project(tmp_path)
    result = make(tmp_path, "figures", "BASE_PYTHON=false", installed=False)
    assert result.returncode != 0
    assert "kvlib needs Python 3.11 or 3.12, and false is neither: make BASE_PYTHON=python3.12" in result.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("77_toy: {budgte: 0.1}", "77_toy has no parameter 'budgte'; it has budget"),
        ("77_toy: {budget: 1e-3}", "77_toy.budget is '1e-3', not a value of type float like 0.5"),
        ("78_toy: {budget: 0.1}", "there is no notebook 78_toy"),
    ],
)
def test_wrong_parameters_fail_before_anything_runs(tmp_path, profile, message):
    path = write_notebook(tmp_path, profile=profile)
    with pytest.raises(ValueError, match=re.escape(message)):
        running.run(path, "smoke")
    assert not (tmp_path / "build").exists()


def test_a_notebook_follows_from_what_its_cells_name_and_the_core(tmp_path):
    """Names lead through imports; methods and tasks are named in strings, among other words too."""
    registered = "from kvlib.lab import used\n\n@register('{0}')\nclass {0}:\n    def score(self): return used.{0}\n\n"
    modules = {
        "__init__": "from kvlib import methods\n",
        "core/__init__": "",
        "core/run": "x = 1\n",
        "methods/__init__": "from kvlib.methods import papers\n",
        "methods/papers": "".join(map(registered.format, ("one", "other"))),
        "lab/__init__": "",
        "lab/used": "one = 1\nother = 2\n",
        "lab/tasks/__init__": "",
        "lab/tasks/drawn": "@family('group', True)\ndef needle(draw): return draw\n",
        "lab/plots": "def drawn(): return 1\n\ndef unused(): return 2\n",
    }
    for name, text in modules.items():
        file = tmp_path / "kvlib" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    path = write_notebook(
        tmp_path, "%matplotlib inline\nfrom kvlib.lab import plots\nplots.drawn('a needle, one (n=2)')"
    )
    assert set(dependencies.reached(path)) == {
        "kvlib.lab.plots:drawn",
        "kvlib.methods.papers:one",
        "kvlib.lab.used:one",
        "kvlib.lab.tasks.drawn:needle",
        "kvlib.core.__init__:",
        "kvlib.core.run:",
    }
    names = [str(file.relative_to(tmp_path / "kvlib").with_suffix("")) for file in dependencies.files(path)]
    assert names == sorted(set(modules) - {"lab/tasks/__init__"})


def test_make_starts_the_tool_without_torch():
    """Once per notebook, so seconds would add up."""
    command = [sys.executable, "-X", "importtime", "-P", ROOT / "kvlib" / "lab" / "notebooks" / "__main__.py", "-h"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "publish" in result.stdout and "kvlib.lab.definitions" in imported
    assert not imported & {"torch", "transformers", "pandas", "nbformat"}


# Solutions and students


@pytest.fixture
def lesson(tmp_path) -> Path:
    """A toy lesson of one exercise, whose solution stands apart."""
    copy_project(tmp_path)
    (tmp_path / "kvlib" / "__init__.py").write_text("")
    path = write_notebook(tmp_path, "mine = None", "assert mine == 1, mine\nprint('right')", "print(mine)")
    write_solution(path, "mine = 1")
    notebook = files.read(path)
    for cell, (name, tags) in zip(notebook["cells"][1:], [("x-stub", ["exercise"]), ("x-check", CHECK), ("on", [])]):
        cell |= {"id": name, "metadata": {"tags": tags}}
    path.write_text(files.to_text(files.normalise(notebook)))
    return path


CHECK = ["check", GOES_ON]


def write_solution(path: Path, source: str, name: str = "x-solution") -> None:
    cell = nbformat.v4.new_code_cell(source, id=name, metadata={"tags": ["solution"]})
    file = path.parent / "solutions" / path.name
    file.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
    file.write_text(files.to_text(files.normalise(files.read(file))))


def test_a_lesson_that_is_too_large(lesson, monkeypatch):
    root = lesson.parents[1]
    running.run(lesson, "default")
    outputs.publish(root)
    monkeypatch.setattr(outputs, "MAX_BYTES", lesson.stat().st_size)
    outputs.check(root)
    monkeypatch.setattr(outputs, "MAX_BYTES", lesson.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"notebooks/77_toy.ipynb has \d+ bytes, more than \d+"):
        outputs.check(root)


def test_a_lesson_runs_with_its_solutions_and_is_stored_apart_from_them(lesson):
    root = lesson.parents[1]
    running.run(lesson, "default")
    outputs.publish(root)
    outputs.check(root)
    shown = [cell["outputs"][0]["text"] for cell in files.code_cells(files.read(lesson)) if cell["outputs"]]
    assert shown == ["right\n", "1\n"]
    assert "mine = 1" not in lesson.read_text()
    file = lesson.parent / "solutions" / lesson.name
    text = file.read_text()
    assert json.loads(text)["cells"][0]["execution_count"] == 1  # it was run, and stored
    file.write_text(text + "\n")
    with pytest.raises(ValueError, match="notebooks/solutions/77_toy.ipynb is not in normal form"):
        outputs.check(root)
    write_solution(lesson, "mine = 1.0")
    with pytest.raises(ValueError, match="77_toy.ipynb: its outputs are stale"):
        outputs.check(root)


def test_a_wrong_solution_ends_the_run(lesson):
    write_solution(lesson, "mine = 2")
    with pytest.raises(ValueError, match="AssertionError: 2"):
        running.run(lesson, "smoke")


def test_a_solution_needs_a_stub(lesson):
    write_solution(lesson, "mine = 1", "y-solution")
    with pytest.raises(ValueError, match="77_toy.ipynb: there is no stub for y-solution"):
        files.lesson(lesson)


def test_students_get_a_copy_without_outputs_and_keep_it(lesson, capsys):
    """A failing check does not keep a student from running all cells."""
    root = lesson.parents[1]
    running.run(lesson, "default")
    outputs.publish(root)
    students.copies(root)
    copy = root / "student" / lesson.name
    cells = files.code_cells(files.read(copy))
    assert [cell["id"] for cell in cells] == ["parameters", "x-stub", "x-check", "on"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    executed = nbclient.execute(nbformat.read(copy, as_version=4), kernel_name="python3")
    shown = [cell["outputs"][0] for cell in files.code_cells(executed) if cell["outputs"]]
    assert [shown[0]["ename"], shown[1]["text"]] == ["AssertionError", "None\n"]
    copy.write_text("worked in")
    students.copies(root)
    assert copy.read_text() == "worked in"
    assert "77_toy.ipynb is there already" in capsys.readouterr().out


def test_stubs_are_refused_and_stop_nobody(tmp_path, monkeypatch):
    """The first lesson as a student runs it, on tiny inputs: each check of an exercise fails, nothing else does."""
    path = files.all_notebooks()[0]
    notebook = nbformat.read(path, as_version=4)
    values = [f"{name} = {value!r}" for name, value in parameters.parameters(path, "smoke").items()]
    notebook.cells.insert(
        1 + [cell.id for cell in notebook.cells].index("parameters"), nbformat.v4.new_code_cell("\n".join(values))
    )
    for name, value in {"KVLIB_FIGURES": tmp_path, "PYTHONPATH": ROOT}.items():
        monkeypatch.setenv(name, str(value))
    nbclient.execute(notebook, kernel_name="python3")
    failed = [cell.id for cell in files.code_cells(notebook) if any(o.output_type == "error" for o in cell.outputs)]
    assert failed == [cell.id for cell in files.code_cells(notebook) if GOES_ON in cell.metadata.get("tags", [])]


def test_another_model_runs_in_a_folder_of_its_own(lesson, monkeypatch):
    root = lesson.parents[1]
    monkeypatch.setenv("MODEL", "some/minilm")
    assert parameters.build_folder(root, "smoke") == root / "build" / "smoke"
    file = parameters.write_parameters(lesson, "default")
    assert file.parent == root / "build" / "default-minilm" and file.read_text() == "{}\n"
    notebook = files.read(lesson)
    notebook["cells"][0]["source"] += "model_name = 'smollm2'\n"
    lesson.write_text(files.to_text(notebook))
    assert parameters.write_parameters(lesson, "default").read_text() == "model_name: some/minilm\n"
    assert parameters.write_parameters(lesson, "smoke").read_text() == "{}\n"
    notebook["cells"][0]["source"] += "model_name = 'minilm-TML-4'\n"
    lesson.write_text(files.to_text(notebook))
    assert parameters.write_parameters(lesson, "default").read_text() == "{}\n"  # trained for this lesson


# Storing and checking


def test_published_notebook_is_clean_and_publishing_again_changes_nothing(published):
    text = published.read_text()
    cells = json.loads(text)["cells"]
    assert [cell["execution_count"] for cell in cells] == [1, 2]
    assert [cell["id"] for cell in cells] == ["parameters", "cell-0"]
    assert cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["1\n", "end\n"]}]
    assert "papermill" not in text and "iopub" not in text and "injected" not in text
    assert nbformat.writes(nbformat.reads(text, as_version=4)) + "\n" == text
    outputs.publish(published.parents[1])
    assert published.read_text() == text


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("notebooks/77_toy.ipynb", "half(budget)", "half(-budget)", True),
        ("notebooks/77_toy.ipynb", "# kept", "# stored", True),
        ("notebooks/params/default.yaml", "{}", "77_toy: {budget: 0.3}", True),
        ("notebooks/params/smoke.yaml", "{}", "77_toy: {budget: 0.3}", False),
        ("data/results/77_toy.parquet", "0.5,1", "0.5,2", True),
        ("kvlib/toy.py", "x / 2", "x // 2", True),
        ("kvlib/toy.py", "x / 2", "x / 2.0", True),
        ("kvlib/toy.py", "Halve.", "Divide by two.", False),
        ("kvlib/toy.py", "return 1", "return 2", False),
        ("kvlib/toy.py", "return x / 2", "return (x / 2)  # exact", False),
    ],
)
def test_outputs_are_stale_when_what_they_follow_from_changed(published, file, old, new, stale):
    root = published.parents[1]
    before = (root / file).read_text()
    assert old in before
    (root / file).write_text(before.replace(old, new))
    if stale:
        with pytest.raises(ValueError, match="77_toy.ipynb: its outputs are stale"):
            outputs.check(root)
    else:
        outputs.check(root)


def test_displayed_source_counts_with_its_comments(published):
    """A reader sees docstring and comments, so they may not differ from the file."""
    root = published.parents[1]
    notebook = files.read(published)
    markdown = {"data": {"text/markdown": "..."}, "metadata": {"kvlib": {"source": "kvlib.toy:half"}}}
    notebook["cells"][1]["outputs"] = [{"output_type": "display_data", **markdown}]
    notebook["metadata"]["kvlib"]["hash"] = outputs.basis(published, notebook)
    published.write_text(files.to_text(notebook))
    module = root / "kvlib" / "toy.py"
    module.write_text(module.read_text().replace('"""Toy."""', '"""Another."""'))
    outputs.check(root)
    module.write_text(module.read_text().replace("Halve.", "Divide."))
    with pytest.raises(ValueError, match="stale"):
        outputs.check(root)


def test_source_shows_code_with_a_note(monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, metadata: outputs.append((data.data, metadata)))
    sources.source(files.root_of)
    (text, metadata), name = outputs[0], "kvlib.lab.notebooks.files:root_of"
    assert metadata == {"kvlib": {"source": name}}
    assert sources.current_source(ROOT, name) in text
    assert sources.current_source(ROOT, "kvlib.lab.notebooks.files:gone") == ""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []},
            "cell-0 fails with KeyError: 'x'",
        ),
        ({"output_type": "stream", "name": "stderr", "text": "Warning!"}, "cell-0 writes to stderr: Warning!"),
        ({"output_type": "stream", "name": "stdout", "text": "see /" + "tmp/x"}, "another machine would not"),
        ({"output_type": "stream", "name": "stdout", "text": "<Axes at 0x7f12345678>"}, "another machine would not"),
    ],
)
def test_outputs_that_cannot_be_stored(published, output, message):
    executed = published.parents[1] / "build" / "default" / published.name
    notebook = files.read(executed)
    notebook["cells"][-1]["outputs"] = [output]
    executed.write_text(files.to_text(notebook))
    text = published.read_text()
    with pytest.raises(ValueError, match=message):
        outputs.publish(published.parents[1])
    assert published.read_text() == text


def test_missing_outputs_and_foreign_runs_are_noticed(published):
    root = published.parents[1]
    notebook = files.read(published)
    notebook["cells"][1] |= {"outputs": [], "execution_count": None}
    published.write_text(files.to_text(notebook))
    with pytest.raises(ValueError, match="cell cell-0 was never run"):
        outputs.check(root)
    notebook["cells"][1]["source"] += "print('more')\n"
    published.write_text(files.to_text(notebook))
    with pytest.raises(ValueError, match="cell-0 has changed since it was run: make figures"):
        outputs.publish(root)
    (root / "build" / "default" / published.name).unlink()
    with pytest.raises(ValueError, match="has not been run: make figures"):
        outputs.publish(root)


# Figures


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_notebook(tmp_path)
    monkeypatch.setattr(plotting, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("KVLIB_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def draw(height: float, methods=("full", "h2o", "vatp")):
    plotting.use_style()
    figure, axes = plt.subplots()
    for number, method in enumerate(methods):
        axes.plot([0, 1], [0, height + 0.001 * number], **plotting.series(method))
    return figure


def test_saved_figures_are_reproducible_and_compared(folder, tmp_path):
    first = plotting.save(draw(1), "77_toy_line").read_bytes()
    plotting.save(draw(1), "77_toy_live", live=True)
    before = tmp_path / "before.json"
    shutil.copy(folder / "manifest.json", before)
    assert plotting.save(draw(1), "77_toy_line").read_bytes() == first
    plotting.save(draw(2), "77_toy_live", live=True)
    figures.compare(before, folder / "manifest.json")
    plotting.save(draw(2), "77_toy_line")
    with pytest.raises(ValueError, match="Figures drawn from tables have changed: 77_toy_line.svg"):
        figures.compare(before, folder / "manifest.json")


def test_figures_are_named_after_their_notebook(folder):
    with pytest.raises(ValueError, match="a name is that of its notebook"):
        plotting.save(draw(1), "78_toy_line")


def test_each_method_has_its_own_look():
    assert len(set(plotting.COLORS.values())) == len(plotting.COLORS) == len(set(plotting.MARKERS.values()))
    assert plotting.series("my_method")["label"] == "my_method"
    own, variant = plotting.series("h2o"), plotting.series("h2o (x=1)")
    assert (own["label"], variant["label"]) == ("H2O", "H2O (x=1)") and own["color"] == variant["color"]
    assert variant["linestyle"] == "-" != own["linestyle"] and variant["markerfacecolor"] == "white"


def test_labels_keep_their_distance():
    axes = draw(1).axes[0]
    heights = sorted(text.xyann[1] + axes.transData.transform(text.xy)[1] * 72 / axes.figure.dpi for text in axes.texts)
    assert all(high - low > 10.9 for low, high in pairwise(heights))
