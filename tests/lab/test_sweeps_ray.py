"""Sweeps on a Ray cluster of this machine with two workers, one of which is killed."""

import os
import socket
import threading
import time
from contextlib import nullcontext, suppress

import psutil
import pytest
import ray
from test_sweeps import place, sweep  # noqa: F401
from test_verdicts import checkpoint

from kvlib.__main__ import main
from kvlib.lab.results import keys
from kvlib.lab.sweeps import cluster

OPTIONS = ("--samples", "12", "--block", "1", "--ray", "local", "--processes", "2")


@pytest.fixture(scope="module")
def two_workers():
    """A cluster for all tests: each of its processes takes seconds to start."""
    with cluster.connected("local", 2):
        yield
        own = [process for process, line in below().items() if "resource_tracker" not in line]  # which is Python's
    gone, alive = psutil.wait_procs(own, timeout=20)
    assert len(gone) > 2 and not alive and not ray.is_initialized()


@pytest.fixture
def shared_cluster(two_workers, monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "connected", lambda *given: asked.append(given) or nullcontext())
    return asked


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


def test_a_killed_worker(place, shared_cluster, capsys):  # noqa: F811
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
    assert killed and 0 < killed[0] < len(shards) == 2 * (12 + 3)
    assert table.read_bytes() == whole
    assert shared_cluster == [("local", 2)] and "study, Ray: 54 rows" in capsys.readouterr().out

    dates = {file: file.stat().st_mtime_ns for file in shards}
    sweep(place, "shared", *OPTIONS)
    assert shared_cluster == [("local", 2)] and "study, Ray: 0 rows" in capsys.readouterr().out  # without a cluster
    shards[0].unlink()
    table.unlink()
    assert sweep(place, "shared", *OPTIONS).read_bytes() == whole
    assert {file for file in shards if file.stat().st_mtime_ns != dates[file]} == {shards[0]}


def test_what_a_worker_cannot_do_is_said_in_one_line(place, shared_cluster):  # noqa: F811
    model = checkpoint(place / "short", max_position_embeddings=128)
    with pytest.raises(SystemExit, match="^kvlib: length=200: the model's window is 128 tokens$"):
        main(["sweep", "study", "--model", model, "--folder", str(place / "shared"), *OPTIONS])


def test_workers_with_other_weights(place, shared_cluster, monkeypatch):  # noqa: F811
    """Rows are not written under keys that the worker itself would not give them."""
    plain = keys.key
    monkeypatch.setattr(keys, "key", lambda *cell: plain(*cell)[::-1])
    with pytest.raises(SystemExit, match="has other code, texts or weights of .*Own-8B than this machine$"):
        sweep(place, "shared", *OPTIONS)
    assert not [*(place / "shared").rglob("*.parquet")]


def test_no_cluster_is_said_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"^no Ray cluster at {address}: Connection refused$"):
            cluster.connected(address, 1).__enter__()


def test_blocks_that_are_lost_too_often(two_workers, monkeypatch):
    monkeypatch.setattr(cluster, "make_unit", lambda *unit: os._exit(1))
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with pytest.raises(RuntimeError, match=r"^[^\n]* What is finished is kept, and the same command goes on$"):
        list(cluster.results([()], None, None))
