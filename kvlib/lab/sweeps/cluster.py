"""A study on a Ray cluster: a task for every block of which rows are missing, which writes the block's shard.

Every machine has this folder with the same code, models under the same names, and sees the folder of the sweep, and
that of KVLIB_DATA if a benchmark is asked.
"""

import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from kvlib.lab.evaluation.benchmarks.files import VARIABLE
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.keys import current, keys
from kvlib.lab.results.making import Block, by_cell, cells_of, fill, in_turn, left, merge, places
from kvlib.lab.results.study import Study
from kvlib.lab.results.tables import owner, read

RETRIES = 3  # of a block whose worker or machine was lost; what is lost a fourth time is at fault itself


def make(
    name: str, study: Study, size: int, processes: int, folder: Path, load: Callable, address: str
) -> pd.DataFrame:
    """Make the table of a study, or what is missing of it, in a folder that all machines see.

    Args:
        address: "local" starts a cluster of so many `processes` here, "auto" or HOST:PORT finds one that runs.
        load: takes a name and returns model and tokenizer, in any process.

    Raises:
        ValueError: for a worker with other code, texts or weights. OSError: if no cluster is found there.
        RuntimeError: if another process makes the table, or a block is lost too often.
    """
    with owner(name, folder):
        todo, finished, started = units(name, study, size, folder), 0, time.monotonic()
        total = len(in_turn(study, size))
        with tqdm(total=total, initial=total - len(todo), desc=name, disable=None) as bar:
            if todo:
                with connected(address, processes):
                    for rows in results(todo, study, load):
                        finished += rows
                        bar.update()
        print(f"{name}, Ray: {finished} rows in {time.monotonic() - started:.0f} s", flush=True)
        return merge(name, study, size, folder)


def units(name: str, study: Study, size: int, folder: Path) -> list[tuple]:
    """What `make_unit` needs of every block of which rows are missing, the longest first."""
    (shards, file), wanted, found = places(name, folder), keys(study), []
    table = current(read(file), wanted)
    rows = by_cell(table)
    for block in in_turn(study, size):
        cells = cells_of(block, wanted).reset_index(drop=True)
        missing, known = left(block, study, shards, rows.get((block.model, block.task), table[:0]), cells)
        if missing:
            found.append((block, shards, missing, known, cells))
    return found


@contextmanager
def connected(address: str, processes: int) -> Iterator[None]:
    """Ray, quietly; a cluster that was started here ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:  # which Ray would take minutes to say
            raise ConnectionError(f"no Ray cluster at {address}: {error.strerror or error}") from None
    own = {"num_cpus": processes, "include_dashboard": False} if address == "local" else {}
    data = os.environ.get(VARIABLE)  # of benchmarks; workers have the environment of their cluster otherwise
    environment = {"env_vars": {VARIABLE: data}} if data else None
    ray.init(address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=environment, **own)
    try:
        yield
    finally:
        ray.shutdown()


def results(todo: list[tuple], study: Study, load: Callable) -> Iterator[int]:
    """The number of new rows of each unit as it is finished, in any order."""
    # By default Ray ends a worker after one task on a GPU, and with it the model that it has loaded.
    options = {"max_retries": RETRIES, "max_calls": 0, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}
    task, study = ray.remote(**options)(make_unit), ray.put(study)
    pending = [task.remote(study, *unit, load) for unit in todo]
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=1)
            yield from ray.get(ready)
    except RayTaskError as error:
        if not isinstance(error.cause, ValueError | OSError):
            raise
        raise error.cause from None  # without the worker's traceback: it is a user's to mend
    except RayError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{reason} What is finished is kept, and the same command goes on") from None


def make_unit(
    study: Study,
    block: Block,
    shards: Path,
    missing: list[Configuration],
    known: pd.DataFrame,
    cells: pd.DataFrame,
    load: Callable,
) -> int:
    """On a worker: what `fill` does. Raises ValueError where rows would have other keys than were asked for."""
    here = replace(study, models={block.model: study.models[block.model]}, tasks=(block.task,))
    if not keys(here).equals(cells):
        raise ValueError(f"{platform.node()} has other code, texts or weights of {block.model} than this machine")
    torch.set_float32_matmul_precision("highest")
    return fill(block, study, shards, missing, known, cells, load)
