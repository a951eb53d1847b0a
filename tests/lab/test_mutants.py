"""Mutants apply to today's kvlib, each is noticed by the test that it names, and kvlib itself stays as it is."""

import os
import subprocess
import sys

import pytest

from kvlib.lab.notebooks import mutants
from kvlib.paths import ROOT

QUICK = (3, 6)  # they take seconds each; all others are run by `make test-deep`
NUMBERS = range(1, len(mutants.MUTANTS) + 1)


@pytest.fixture(scope="module")
def text() -> dict:
    return {mutant.file: (ROOT / mutant.file).read_text() for mutant in mutants.MUTANTS}


@pytest.mark.parametrize("number", NUMBERS)
def test_each_breaks_one_place_of_today_s_kvlib(number, text):
    mutant = mutants.MUTANTS[number - 1]
    assert text[mutant.file].count(mutant.old) == 1
    broken = text[mutant.file].replace(mutant.old, mutant.new)
    compile(broken, mutant.file, "exec")
    assert mutants.ast.dump(mutants.ast.parse(broken)) != mutants.code(ROOT / mutant.file)
    file, _, name = mutant.killer.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_their_names_are_their_own():
    assert len({(mutant.file, mutant.old) for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 6
    assert len({mutant.symptom for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[] if number in QUICK else pytest.mark.deep) for number in NUMBERS]
)
def test_each_is_killed(number, tmp_path):
    """In a process of its own, which imports the broken copy in place of kvlib."""
    mutant = mutants.MUTANTS[number - 1]
    mutants.write(mutant, tmp_path / "kvlib")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        [*command, mutant.killer],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stdout + found.stderr  # 1: tests were run, and one failed


@pytest.fixture
def project(tmp_path):
    """A toy kvlib with one mutant's place."""
    (tmp_path / "kvlib").mkdir()
    (tmp_path / "kvlib" / "paths.py").write_text("ROOT = Path(__file__).resolve().parents[1]\n")
    (tmp_path / "kvlib" / "toy.py").write_text("half = x / 2  # exact\n")
    return tmp_path


def test_a_copy_is_broken_repaired_and_removed(project, monkeypatch, capsys):
    toy = mutants.Mutant("kvlib/toy.py", "x / 2", "x / 3", "Halves are too small.", "")
    monkeypatch.setattr(mutants, "MUTANTS", [toy])
    mutants.plant(1, project)
    copy = project / "student" / "kvlib"
    assert (copy / "toy.py").read_text() == "half = x / 3  # exact\n"
    assert (copy / "paths.py").read_text() == f"ROOT = Path({str(project)!r})\n"
    assert (project / "kvlib" / "toy.py").read_text() == "half = x / 2  # exact\n"
    assert "Halves are too small." in capsys.readouterr().out

    def said() -> str:
        mutants.show(project)
        return capsys.readouterr().out.splitlines()[-1]

    assert said() == "student/kvlib is broken."
    (copy / "toy.py").write_text("half = x / ")
    assert said() == "student/kvlib is broken."
    (copy / "toy.py").write_text("# found!\nhalf = (x / 2)\n")
    assert said() == "student/kvlib is repaired."
    mutants.plant(0, project)
    assert not copy.exists() and said() == "  1  Halves are too small."


@pytest.mark.parametrize("number", [-1, 2])
def test_unknown_numbers_and_lost_places_are_named(project, monkeypatch, number):
    monkeypatch.setattr(mutants, "MUTANTS", [mutants.Mutant("kvlib/toy.py", "x / 4", "x", "", "")])
    with pytest.raises(ValueError, match=f"N={number}: mutants have the numbers 1 to 1, 0 removes the copy"):
        mutants.plant(number, project)
    with pytest.raises(ValueError, match="'x / 4' occurs 0 times"):
        mutants.plant(1, project)
