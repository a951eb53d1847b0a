"""Sweeps by processes: a study on somebody's own model, in a folder of its own, whatever becomes of the processes."""

import functools
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from test_verdicts import checkpoint

import kvlib
from kvlib import paths
from kvlib.__main__ import main
from kvlib.lab import sweeps
from kvlib.lab.evaluation import evaluate
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results import making, studies, tables
from kvlib.lab.results.study import Study
from kvlib.lab.results.summaries import summarise

STUDY = Study(
    tasks=("needle", "count"),
    length=200,
    configurations=(Configuration("full", 1.0), Configuration("snapkv", 0.2)),
    models={"smollm2": 9},
    fewer=(Configuration("h2o", 0.4),),
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where things are: a study, no results, a model."""
    monkeypatch.setitem(studies.STUDIES, "study", STUDY)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "data" / "results")
    monkeypatch.setattr(tables, "BUILD", tmp_path / "build" / "results")
    checkpoint(tmp_path / "models" / "Own-8B")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as side by side
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def computed(monkeypatch):
    """The (task, samples, configurations) that the evaluator was asked for."""
    asked, plain = [], evaluate.evaluate

    @functools.wraps(plain)  # keys follow from its name
    def counting(model, tokenizer, configurations, task, length, samples, **options):
        asked.append((task, tuple(samples), len(configurations)))
        return plain(model, tokenizer, configurations, task, length, samples, **options)

    monkeypatch.setattr(evaluate, "evaluate", counting)
    return asked


def sweep(place: Path, folder: str, *options: str, study: str = "study") -> Path:
    """Run the command for the model and return the table."""
    model = str(place / "models" / "Own-8B")
    main(["sweep", study, "--model", model, "--folder", str(place / folder), *options])
    return place / folder / f"{study}-{making.as_file(model)}" / f"{study}.parquet"


def test_a_study_on_another_model_is_made_once(place, computed, capsys):
    model = str(place / "models" / "Own-8B")
    main(["sweep", "study", "--model", model])
    file = place / "build" / "sweeps" / f"study-{making.as_file(model)}" / "study.parquet"
    assert f"{file}, and its means in study.csv" in capsys.readouterr().out
    table = pd.read_parquet(file)
    settings = table.groupby(["model", "task", "method"])["sample"].apply(list).to_dict()
    numbers = {"full": [*range(9)], "snapkv": [*range(9)], "h2o": [0, 1]}  # a quarter of the samples
    assert settings == {(model, task, method): s for task in STUDY.tasks for method, s in numbers.items()}
    pd.testing.assert_frame_equal(pd.read_csv(file.with_suffix(".csv")), summarise(table).round(5))
    whole = [((0, 1, 2, 3), 2), ((4, 5, 6, 7), 2), ((8,), 2), ((0, 1), 1)]
    assert sorted(computed) == sorted((task, *each) for task in STUDY.tasks for each in whole)

    computed.clear()
    before = file.read_bytes()
    main(["sweep", "study", "--model", model])
    shards = file.parent / "shards"
    shards.rename(place / "aside")
    main(["sweep", "study", "--model", model])  # from the table alone
    file.unlink()
    (place / "aside").rename(shards)
    main(["sweep", "study", "--model", model])  # from the shards
    assert computed == [] and file.read_bytes() == before
    next((shards / "study").glob("*needle-00004-*")).unlink()
    file.unlink()
    main(["sweep", "study", "--model", model])
    assert computed == [("needle", (4, 5, 6, 7), 2)] and file.read_bytes() == before
    assert not paths.RESULTS.exists() and not [*place.rglob("*.part")]


def test_how_many_samples_of_what_dtype(place, monkeypatch):
    loaded, plain = [], kvlib.load
    monkeypatch.setattr(kvlib, "load", lambda name, **given: loaded.append(given) or plain(name, **given))
    table = pd.read_parquet(sweep(place, "shared", "--samples", "5", "--block", "3"))
    assert table.groupby("method")["sample"].max().to_dict() == {"full": 4, "snapkv": 4, "h2o": 0}
    sweep(place, "shared", "--samples", "1", "--dtype", "bfloat16", "--device-map", "cpu")
    assert loaded == [{}, {"dtype": "bfloat16", "device_map": "cpu"}]
    halves = next((place / "shared").glob("*-bfloat16")) / "study.parquet"  # where no row of another dtype is reused
    assert len(pd.read_parquet(halves)) == 4


def test_shards_keep_their_rows_when_a_study_grows(place, computed, monkeypatch):
    sweep(place, "shared", "--samples", "2").unlink()
    computed.clear()
    more = replace(STUDY, configurations=(*STUDY.configurations, Configuration("random", 0.3)))
    monkeypatch.setitem(studies.STUDIES, "study", more)
    assert len(pd.read_parquet(sweep(place, "shared", "--samples", "2"))) == 2 * 2 * 3
    assert sorted(computed) == [("count", (0, 1), 1), ("needle", (0, 1), 1)]


def test_a_killed_process(place, computed):
    """What was finished is kept, and the same command makes the rest."""
    options = ("--samples", "16", "--block", "1")
    whole = sweep(place, "undisturbed", *options).read_bytes()
    blocks = sorted(file.name for file in (place / "undisturbed").rglob("shards/study/*.parquet"))
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 100
        while not [*(place / "shared").rglob("shards/study/*.parquet")] and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
        killed.append(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SystemExit, match="^kvlib: 1 of 2 processes failed; what they finished is kept$"):
        sweep(place, "shared", *options, "--processes", "2")
    killer.join()
    done = {file.name for file in (place / "shared").rglob("shards/study/*.parquet")}
    assert killed and len(set(blocks) - done) <= 1  # the other process has made the rest
    assert not [*(place / "shared").rglob("study.parquet")]
    computed.clear()
    assert sweep(place, "shared", *options).read_bytes() == whole
    assert len(computed) == len(set(blocks) - done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--model", "nowhere"], "cannot find 'nowhere': "),
        (["studi"], "unknown study 'studi'; did you mean 'study'?"),
        (["study", "--samples", "0"], "models={'smollm2': 0}: a whole number of samples >= 1 for at least one model"),
        (["study", "--processes", "0"], "4 prompts per prefill, 0 processes: at least 1 of each"),
        (["study", "--block", "0"], "0 prompts per prefill, 1 processes: at least 1 of each"),
        (["study", "--ray", "auto"], "--ray needs Ray: pip install -e '.[ray]'"),
    ],
)
def test_errors_are_one_line(arguments, message, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "kvlib.lab.sweeps.cluster", raising=False)
    monkeypatch.delattr(sweeps, "cluster", raising=False)
    with pytest.raises(SystemExit, match=f"^{re.escape('kvlib: ' + message)}[^\n]*$"):
        main(["sweep", *arguments])
    assert not (place / "build").exists()


def test_one_sweep_at_a_time(place, monkeypatch):
    table = sweep(place, "shared", "--samples", "1")
    with tables.owner("study", table.parent):
        with pytest.raises(SystemExit, match="^kvlib: another process is making the table study$"):
            sweep(place, "shared", "--samples", "1")
        sweep(place, "elsewhere", "--samples", "1")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "make", interrupted)
    with pytest.raises(SystemExit, match="^kvlib: interrupted; the same command goes on$"):
        sweep(place, "shared", "--samples", "1")


def test_files_get_their_names_where_they_are(place):
    """Between file systems nothing can be renamed; what is committed has no neighbours."""
    assert tables.part(place / "shared" / "study.csv").parent == place / "shared"
    assert tables.part(paths.RESULTS / "study.csv").parent == tables.BUILD
    shutil.rmtree(place / "shared")
