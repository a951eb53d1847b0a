"""What `make check` notices: files that are not those that were recorded, summaries of other tables."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib import checksums, paths
from kvlib.lab.results import __main__ as command
from kvlib.lab.results import checking, summaries, verification
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study
from kvlib.lab.tasks import FAMILIES

NAME = next(iter(STUDIES))


def rows() -> pd.DataFrame:
    """A small result table: all families, forty samples, three configurations of one model."""
    rng = np.random.default_rng(0)
    sides = [("full", "{}", 1.0), ("h2o", "{}", 0.2), ("snapkv", '{"kernel": 15}', 0.2)]
    return pd.concat(
        pd.DataFrame({"sample": range(40), "value": rng.integers(0, 2, 40).astype(float)}).assign(
            model="minilm", task=task, method=method, arguments=arguments, budget=budget,
            stored_bytes=int(budget * 1000) + rng.integers(0, 9, 40), full_bytes=1000,
            divergence=rng.random(40), agreement=np.nan if task == "needle" else 0.5,
        )
        for task in FAMILIES for method, arguments, budget in sides
    ).reset_index(drop=True)  # fmt: skip


TABLE = rows()
SUMMARY = summaries.summarise(TABLE).round(5)


@pytest.fixture
def data(tmp_path):
    """A data folder with a table, its summary, claims, and the checksums of all."""
    results = tmp_path / "results"
    results.mkdir()
    TABLE.to_parquet(results / f"{NAME}.parquet")
    SUMMARY.to_csv(results / f"{NAME}.csv", index=False)
    (results / "ledger.csv").write_text("id\n")
    (tmp_path / "claims.yaml").write_text("claims: []\n")
    for file in (*results.glob("*.*"), tmp_path / "claims.yaml"):
        checksums.record(file)
    assert checking.problems(tmp_path) == []
    return tmp_path


def flipped(count: int, one_sample: bool = False) -> pd.DataFrame:
    """The table with so many answers turned, spread or within one sample of one task."""
    wanted = (TABLE["sample"] == 7) & (TABLE["task"] == "needle") if one_sample else TABLE["sample"] >= 0
    chosen = TABLE.index[wanted][:: 1 if one_sample else 31][:count]
    return TABLE.assign(value=TABLE["value"].where(~TABLE.index.isin(chosen), 1 - TABLE["value"]))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("table", [flipped(60), flipped(3, one_sample=True), flipped(1)], ids=["60", "3 of 1", "1"])
def test_flipped_rows(data, table, recorded):
    """Also by somebody who writes a new checksum: the means are other ones."""
    file = data / "results" / f"{NAME}.parquet"
    table.to_parquet(file)
    wrong = [f"{file} is not what its checksum says"] * (not recorded)
    if recorded:
        checksums.record(file)
    assert checking.problems(data) == [*wrong, f"{file.with_suffix('.csv')} does not hold the means of {file.name}"]


@pytest.mark.parametrize("column", ["mean", "stored", "samples", "divergence"])
def test_a_changed_number_in_a_summary(data, column):
    file = data / "results" / f"{NAME}.csv"
    changed = SUMMARY.copy()
    changed.loc[5, column] += 1 if column == "samples" else 2e-5
    changed.to_csv(file, index=False)
    said = f"{file} does not hold the means of {NAME}.parquet"
    assert checking.problems(data) == [f"{file} is not what its checksum says", said]
    checksums.record(file)
    assert checking.problems(data) == [said]


@pytest.mark.parametrize("change", [lambda s: s.drop(index=3), lambda s: pd.concat([s, s.tail(1)]), lambda s: s[::-1]])
def test_rows_of_a_summary(change):
    """None may be missing or there twice; their order is no matter."""
    same = len(change(SUMMARY)) == len(SUMMARY)
    assert checking.summed_up(TABLE, change(SUMMARY)) == same


def test_files_that_changed_are_gone_or_new(data):
    claims, extra = data / "claims.yaml", data / "results" / "more.csv"
    claims.write_text("claims: [1]\n")
    (data / "results" / "ledger.csv").unlink()
    extra.write_text("x\n")
    assert checking.problems(data) == [
        f"{claims} is not what its checksum says",
        f"{data / 'results' / 'ledger.csv'} is missing",
        f"{extra} has no checksum",
    ]


def test_a_calibration_without_a_checksum(data):
    folder = data / "calibration" / "model"
    folder.mkdir(parents=True)
    for file in (folder / "method.json", folder / "method.safetensors"):
        file.write_text("{}\n")
        assert checking.problems(data) == [f"{file} has no checksum"]
        checksums.record(file)
        assert checking.problems(data) == []


@given(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=5)), st.sampled_from("abcdef"), st.binary())
@settings(max_examples=50)
def test_a_record_changes_one_line(tmp_path_factory, files, name, content):
    """So that writing one file vouches for no other."""
    folder = tmp_path_factory.mktemp("sums")
    for other, text in files.items():
        (folder / other).write_bytes(text)
        checksums.record(folder / other)
    before = checksums.listed(folder)
    assert before.keys() == files.keys() and checksums.problems(folder) == []
    for other in files:
        (folder / other).write_bytes(b"another")
    (folder / name).write_bytes(content)
    checksums.record(folder / name)
    assert checksums.listed(folder) == before | {name: checksums.digest(folder / name)}
    assert len(checksums.problems(folder)) == sum(o != name and text != b"another" for o, text in files.items())
    (folder / name).unlink()
    checksums.record(folder / name)
    assert name not in checksums.listed(folder)


def test_what_is_committed(capsys):
    command.main(["--check"])
    assert capsys.readouterr().out.startswith("Data as recorded")
    assert {"claims.yaml", "VERDICTS.md"} == set(checksums.listed(paths.DATA))


def test_the_command_fails(data, monkeypatch):
    monkeypatch.setattr(checking.problems, "__defaults__", (data,))
    command.main(["--check"])
    (data / "claims.yaml").unlink()
    with pytest.raises(SystemExit, match="claims.yaml is missing"):
        command.main(["--check"])


def test_every_day_other_samples(monkeypatch):
    """Unless a seed is given."""
    study = Study(("needle", "label"), 512, STUDIES[NAME].configurations[:1], {"minilm": 200})
    drawn = {}
    for day in (27, 28):

        class Day(date):
            @classmethod
            def today(cls, day=day):
                return cls(2026, 11, day)

        monkeypatch.setattr(verification, "date", Day)
        drawn[day] = verification.draw(study, 8)
        assert drawn[day] == verification.draw(study, 8, 20261100 + day)
    assert drawn[27] != drawn[28]
