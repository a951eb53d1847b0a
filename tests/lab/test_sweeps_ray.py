"""Sweeps on a Ray cluster of this machine with two workers, one of which is killed."""

import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from test_sweeps import STUDY, place, sweep  # noqa: F401
from test_verdicts import checkpoint

from kvlib.__main__ import main
from kvlib.lab.results import keys, paper_studies
from kvlib.lab.results.making import loaded
from kvlib.lab.results.study import Study
from kvlib.lab.results.tables import read
from kvlib.lab.sweeps import cluster
from kvlib.lab.tasks.natural import novel

OPTIONS = ("--samples", "6", "--block", "1", "--ray", "local", "--processes", "2")
PUBLISHED = {  # the second needs no data
    "books": Study(("pg19",), 400, STUDY.configurations, {"smollm2": 2}),
    "questions": Study(("ruler/vt",), 1500, STUDY.configurations, {"smollm2": 2}, measure="benchmarks"),
}


def below() -> dict[psutil.Process, str]:
    """The processes under this one, with their command lines."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process] = " ".join(process.cmdline())
    return found


def at_work() -> list[psutil.Process]:
    """Those that are making a unit now, by the names that Ray gives them."""
    return [process for process, line in below().items() if line.startswith("ray::make_unit")]


@contextmanager
def two_workers(monkeypatch) -> Iterator[list]:
    """A cluster for all sweeps in this block, since its processes take seconds to start; gives what they asked for."""
    asked = []
    with cluster.connected("local", 2):
        monkeypatch.setattr(cluster, "connected", lambda *given: asked.append(given) or nullcontext())
        yield asked
        own = [process for process, line in below().items() if "resource_tracker" not in line]  # which is Python's
    gone, alive = psutil.wait_procs(own, timeout=20)
    assert len(gone) > 2 and not alive and not ray.is_initialized()


@pytest.fixture
def bars(monkeypatch):
    """The progress bars, shown in no terminal."""
    shown, plain = [], cluster.tqdm

    def hidden(**given):
        shown.append(plain(**given | {"disable": given["disable"] is not None, "file": io.StringIO()}))
        return shown[-1]

    monkeypatch.setattr(cluster, "tqdm", hidden)
    return shown


def test_on_two_workers(place, bars, capsys, monkeypatch):  # noqa: F811
    """In one test, so that tests side by side do not start a cluster each."""
    (place / "data" / "pg19" / "test").mkdir(parents=True)
    book = "".join(novel().pieces)
    for number in range(100):
        text = book[10_000 * number : 10_000 * (number + 1)]
        (place / "data" / "pg19" / "test" / f"{number}.txt").write_text(text)
    monkeypatch.setenv("KVLIB_DATA", str(place / "data"))
    for name, study in PUBLISHED.items():
        monkeypatch.setitem(paper_studies.STUDIES, name, study)
    with two_workers(monkeypatch) as asked:
        a_killed_worker(place, asked, bars, capsys)
        published_data_are_asked(place)
        what_a_worker_cannot_do_is_said_in_one_line(place)
        blocks_are_lost_too_often(monkeypatch)


def a_killed_worker(place: Path, asked: list, bars: list, capsys) -> None:  # noqa: F811
    """The table is that of an undisturbed run by one process here; a second run makes nothing."""
    whole = sweep(place, "undisturbed", *OPTIONS[:4]).read_bytes()
    killed, folder = [], place / "shared"

    def kill() -> None:
        deadline = time.monotonic() + 100
        while not killed and time.monotonic() < deadline:
            done = len([*folder.rglob("shards/study/*.parquet")])
            for process in at_work()[:1] if done else ():
                with suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that it is still at work when it is killed
                    killed.extend([done] if process in at_work() else [])
                    process.kill()
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    table = sweep(place, "shared", *OPTIONS)
    killer.join()
    shards = [*folder.rglob("shards/study/*.parquet")]
    assert killed and 0 < killed[0] < len(shards) == 2 * (6 + 1)
    assert table.read_bytes() == whole
    assert asked == [("local", 2)] and "study, Ray: 26 rows" in capsys.readouterr().out

    dates = {file: file.stat().st_mtime_ns for file in shards}
    sweep(place, "shared", *OPTIONS)
    assert asked == [("local", 2)] and "study, Ray: 0 rows" in capsys.readouterr().out  # without a cluster
    shards[0].unlink()
    table.unlink()
    assert sweep(place, "shared", *OPTIONS).read_bytes() == whole
    assert {file for file in shards if file.stat().st_mtime_ns != dates[file]} == {shards[0]}
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 14, 14), (14, 14, 14), (13, 14, 14)]


def published_data_are_asked(place: Path) -> None:  # noqa: F811
    for study in PUBLISHED:
        table = sweep(place, "shared", *OPTIONS[2:], study=study)
        assert len(read(table)) == 4 and read(table)["value"].notna().all()
        assert table.read_bytes() == sweep(place, "undisturbed", *OPTIONS[2:4], study=study).read_bytes()


def what_a_worker_cannot_do_is_said_in_one_line(place: Path) -> None:  # noqa: F811
    model = checkpoint(place / "short", max_position_embeddings=128)
    with pytest.raises(SystemExit, match="^kvlib: length=200: the model's window is 128 tokens$"):
        main(["sweep", "study", "--model", model, "--folder", str(place / "shared"), *OPTIONS])


def blocks_are_lost_too_often(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "make_unit", lambda *unit: os._exit(1))
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with pytest.raises(RuntimeError, match=r"^[^\n]* What is finished is kept, and the same command goes on$"):
        list(cluster.results([()], None, None))


def test_workers_with_other_weights(place, monkeypatch):  # noqa: F811
    """Rows are not written under keys that the worker itself would not give them."""
    study = replace(STUDY, models={str(place / "models" / "Own-8B"): 1}, fewer=())
    plain = keys.key
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(keys, "key", lambda *cell: plain(*cell)[::-1])
        other = cluster.units("study", study, 1, place / "shared")
    with pytest.raises(ValueError, match="has other code, texts or weights of .*Own-8B than this machine$"):
        cluster.make_unit(study, *other[0], loaded)
    assert not [*(place / "shared").rglob("*.parquet")]
    assert cluster.make_unit(study, *cluster.units("study", study, 1, place / "shared")[0], loaded) == 2


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_task_has_a_gpu_where_there_are_some(gpus, monkeypatch):
    """And its worker stays, with the model."""
    asked = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": 1.0 * gpus} if gpus else {}))
    monkeypatch.setattr(ray, "remote", lambda **options: asked.append(options) or (lambda task: task))
    monkeypatch.setattr(ray, "put", lambda study: study)
    assert list(cluster.results([], None, None)) == []
    assert asked == [{"max_retries": 3, "max_calls": 0, "num_gpus": min(gpus, 1)}]


def test_no_cluster_is_said_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"^no Ray cluster at {address}: Connection refused$"):
            cluster.connected(address, 1).__enter__()
