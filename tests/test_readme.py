"""README says what the tables say, its code runs, and its links lead somewhere."""

import re

import pandas as pd

import kvlib
from kvlib.lab import checks
from kvlib.lab.results import summaries
from kvlib.lab.speed import summary
from kvlib.paths import RESULTS, ROOT


def test_readme_s_finding_is_what_the_table_says():
    readme = (ROOT / "README.md").read_text()
    finding = summaries.finding(
        *(pd.read_parquet(RESULTS / f"{name}.parquet") for name in ("00_real", "00_real_later"))
    )
    assert finding in " ".join(readme.split()), f"README should say: {finding}"


def test_readme_s_tables_of_speed_are_those_of_the_measurements():
    readme = (ROOT / "README.md").read_text()
    assert summary.written(readme) == readme


def test_readme_code_runs(monkeypatch, capsys):
    """The two blocks that need no download, one after the other, as written."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kvlib.core.method, "METHODS", dict(kvlib.METHODS))
    monkeypatch.setattr(kvlib, "METHODS", kvlib.core.method.METHODS)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        if "Qwen" not in block:
            exec(compile(block, "README.md", "exec"), names)
    assert names["run"].stored_bytes() < 0.25 * names["run"].full_bytes()
    checks.check_method("mine")


def test_readme_shows_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / name).exists(), name
