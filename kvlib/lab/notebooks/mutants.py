"""Mutants: a copy of kvlib in student/ of which one place is broken, to be found by experiment.

    make mutant            what there is, by what goes wrong, and whether the copy has been repaired
    make mutant N=3        break a new copy
    make mutant N=0        remove the copy

Notebooks in student/ import the copy, because Python looks beside them first; kvlib itself is never changed. The list
below is the answer: whoever plays does not read on.
"""

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path

from kvlib.paths import ROOT


@dataclass(frozen=True)
class Mutant:
    """One broken place.

    Attributes:
        file: below the root; `old` occurs there once and is replaced by `new`.
        symptom: what somebody who uses the copy may notice.
        killer: a test that fails on the copy.
    """

    file: str
    old: str
    new: str
    symptom: str
    killer: str


REFERENCE = "tests/test_baselines.py::test_equals_reference"
MUTANTS = [
    Mutant(
        "kvlib/core/view.py",
        "if self._moved or self.query is not self._asked:",
        "if self._moved:",
        "A method that sums over two kinds of queries gets the same sums twice.",
        "tests/test_contract.py::test_sums_are_those_of_the_queries_and_keys_that_a_view_has",
    ),
    Mutant(
        "kvlib/core/view.py",
        "(function, self.module.layer_idx, self.layer_idx, None if last is None else tuple(last.tolist()))",
        "(function, None if last is None else tuple(last.tolist()))",
        "SnapKV's answers get worse, and its layers agree on what to keep more than they did.",
        REFERENCE,
    ),
    Mutant(
        "kvlib/core/report.py",
        "return sum(int(layer.row_reads().sum()) for layer in",
        "return sum(int(layer.row_reads().max()) for layer in",
        "Reading gets cheaper, by report, with every row that a batch has more.",
        "tests/test_contract.py::test_bytes_read_are_those_of_what_is_selected_and_of_choosing",
    ),
    Mutant(
        "kvlib/lab/statistics.py",
        "rank = round((1 - confidence) / 2 * (resamples + 1))",
        "rank = round((1 - confidence) / 2 * (resamples + 1)) + 1",
        "Once in a long while an interval excludes zero while its p-value is above 0.05.",
        "tests/lab/test_statistics.py::test_intervals_and_p_values_say_the_same",
    ),
    Mutant(
        "kvlib/lab/statistics.py",
        "made_up = weight * np.isin(rows, (0, 1)).all(1).mean() if scores else 0",
        "made_up = 0",
        "Four prompts lost and none won, of 200, count as proof.",
        "tests/lab/test_statistics.py::test_no_disagreement_is_not_certainty",
    ),
    Mutant(
        "kvlib/core/cache.py",
        "self.tokens, self.prompt_tokens = self.tokens[rows], self.prompt_tokens[rows]",
        "self.tokens = self.tokens[rows]",
        "With beams, or after rows of a batch were exchanged, some rows have the budget of another one.",
        "tests/test_cache.py::test_rows_take_everything_that_is_theirs_along",
    ),
    Mutant(
        "kvlib/core/view.py",
        "return query[:, :, -last:], positions[:, -last:]",
        "return query[:, :, -last - 1 :], positions[:, -last - 1 :]",
        "SnapKV is nearly as good as it was; its kept sets differ from the paper's in a few tokens.",
        REFERENCE,
    ),
    Mutant(
        "kvlib/methods/baselines.py",
        "attention = view.importance(last=window).mean(2)",
        "attention = view.importance(last=window).amax(2)",
        "SnapKV is right on models in which every query head has a KV head of its own, and on no others.",
        REFERENCE,
    ),
    Mutant(
        "kvlib/core/view.py",
        "            self.state[name] += values\n",
        "            self.state[name] = values\n",
        "H2O forgets what it found important as soon as it writes.",
        REFERENCE,
    ),
    Mutant(
        "kvlib/methods/baselines.py",
        'view.clamp("sinks", self.sinks, 0, self.budgets(view) - 1)',
        'view.clamp("sinks", self.sinks - 1, 0, self.budgets(view) - 1)',
        "StreamingLLM keeps its budget, and its text is a little worse than before.",
        "tests/test_baselines.py::test_streaming_keeps_sinks_and_the_recent_past",
    ),
    Mutant(
        "kvlib/core/report.py",
        "positions.masked_fill(positions < 0, last).sort(dim=-1).values[..., :width]",
        "positions.masked_fill(positions < 0, last)[..., :width]",
        "While tokens are decoded, what a run says that it keeps is not what it attends to.",
        REFERENCE,
    ),
]


def plant(number: int, root: Path = ROOT) -> None:
    """Put a new copy of kvlib with mutant `number` into student/, or remove the copy for 0.

    Raises:
        ValueError: for a number that no mutant has, or if the place to break is not there exactly once.
    """
    if not 0 <= number <= len(MUTANTS):
        raise ValueError(f"N={number}: mutants have the numbers 1 to {len(MUTANTS)}, 0 removes the copy")
    copy = root / "student" / "kvlib"
    if number == 0:
        shutil.rmtree(copy, ignore_errors=True)
        print(
            "student/kvlib is gone: notebooks in student/ import kvlib itself again, once their kernels are restarted"
        )
        return
    write(MUTANTS[number - 1], copy, root)
    print(f"student/kvlib is a copy of kvlib with mutant {number}.\n  {MUTANTS[number - 1].symptom}")
    print("Restart the kernels of notebooks in student/. `make mutant` says whether the copy is repaired.")


def write(mutant: Mutant, copy: Path, root: Path = ROOT) -> None:
    """Write kvlib with one mutant to the folder `copy`, in place of what is there; data stay those of `root`.

    No mutant may change how a prompt is read: lessons keep prefills on disk, under a hash over kvlib's own core.

    Raises:
        ValueError: if the place to break is not there exactly once.
    """
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "kvlib", copy, ignore=shutil.ignore_patterns("__pycache__"))
    replace(copy / Path(mutant.file).relative_to("kvlib"), mutant.old, mutant.new)
    replace(copy / "paths.py", "Path(__file__).resolve().parents[1]", f"Path({str(root)!r})")


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file.name}: {old!r} occurs {text.count(old)} times")
    file.write_text(text.replace(old, new))


def show(root: Path = ROOT) -> None:
    """Print all symptoms, and whether the copy in student/ does again what kvlib does."""
    for number, mutant in enumerate(MUTANTS, 1):
        print(f"{number:3}  {mutant.symptom}")
    copy = root / "student" / "kvlib"
    if copy.exists():
        print("student/kvlib is repaired." if repaired(copy, root) else "student/kvlib is broken.")


def repaired(copy: Path, root: Path = ROOT) -> bool:
    """Does a copy have the code of kvlib? Comments and line breaks may differ."""
    files = sorted(file.relative_to(root / "kvlib") for file in (root / "kvlib").rglob("*.py"))
    return all(
        (copy / file).exists() and code(copy / file) == code(root / "kvlib" / file)
        for file in files
        if str(file) != "paths.py"
    )


def code(file: Path) -> str | None:
    """What Python makes of a file; None if it is none of Python's."""
    try:
        return ast.dump(ast.parse(file.read_text()))
    except SyntaxError:
        return None
