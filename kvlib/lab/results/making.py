"""Making tables, or what is missing of them, in blocks of samples that processes share."""

import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, CELL
from kvlib.lab.evaluation.measures import MEASURES
from kvlib.lab.results import tables
from kvlib.lab.results.keys import current, keys
from kvlib.lab.results.study import FEWER, Study
from kvlib.lab.results.summaries import summarise
from kvlib.lab.results.tables import owner, read, together, write

PORTION = 25  # configurations of a block: a prefill, and what is summed over it, costs as much as a few of them
SORTED = ["model", "task", "length", "protocol", "sample", "method", "arguments", "budget"]


@dataclass(frozen=True)
class Block:
    """Samples that are prefilled together, for a part of a study's configurations."""

    model: str
    task: str
    samples: tuple[int, ...]
    configurations: tuple[Configuration, ...]
    part: int

    @property
    def file(self) -> str:
        return f"{as_file(self.model)}-{self.task}-{self.samples[0]:05}-{len(self.samples)}-{self.part:02}.parquet"


def as_file(model: str) -> str:
    """A hub id or a path as the name of a file."""
    return re.sub(r"[^\w.]+", "-", model).strip("-")


def blocks(study: Study, size: int) -> list[Block]:
    """All of a study, in the order in which it is made."""
    parts = [
        (configurations[start : start + PORTION], share)
        for configurations, share in ((study.configurations, 1), (study.fewer, FEWER))
        for start in range(0, len(configurations), PORTION)
    ]
    return [
        Block(model, task, tuple(range(start, min(start + size, most))), portion, part)
        for (model, samples), task in itertools.product(study.models.items(), study.tasks)
        for start in range(0, samples, size)
        for part, (portion, share) in enumerate(parts)
        if start < (most := samples // share)
    ]


def make_block(block: Block, study: Study, folder: Path, table: pd.DataFrame, wanted: pd.DataFrame, load) -> int:
    """Compute what is missing of a block and write its shard; returns the number of new rows.

    Args:
        table: the rows of the block's model and task that are known and current. wanted: as `keys` gives them.
    """
    path = folder / block.file
    cells = wanted[(wanted["model"] == block.model) & (wanted["task"] == block.task)]
    keys_of, size = dict(zip(study.everything, cells["key"], strict=True)), len(block.samples)
    known = together(current(read(path), wanted), table)
    known = known[known["sample"].isin(block.samples) & known["key"].isin([keys_of[c] for c in block.configurations])]
    done = set(known["key"].value_counts()[lambda n: n == size].index)
    missing = [c for c in block.configurations if keys_of[c] not in done]
    if not missing:
        return 0
    model, tokenizer = load(block.model)
    new = MEASURES[study.measure].evaluate(
        model, tokenizer, missing, block.task, study.length, block.samples,
        name=block.model, protocol=study.protocol, block=size,
    ).merge(cells, on=CELL)  # fmt: skip
    write(together(known[known["key"].isin(done)], new), path)
    return len(missing) * size


class Loader:
    """The model of the last block, on the GPU if there is one."""

    def __init__(self):
        self.name, self.pair = None, None

    def __call__(self, name: str):
        if name != self.name:
            model, tokenizer = kvlib.load(name)
            self.name, self.pair = name, (model.cuda() if torch.cuda.is_available() else model, tokenizer)
        return self.pair


def turns(todo: list[Block], counter) -> Iterator[tuple[int, Block]]:
    """Blocks with their numbers, as long as there are any that no other process with the same counter has taken."""
    while True:
        with counter.get_lock():
            number, counter.value = counter.value, counter.value + 1
        if number >= len(todo):
            return
        yield number, todo[number]


def one_pass(block: Block) -> bool:
    """Whether one pass can answer a block for most methods; the others take longest and come first."""
    return tasks.find(block.task).metric == "exact"


def work(name: str, study: Study, size: int, part: int, parts: int, counter, parent: int | None = None) -> None:
    """Make blocks in turn with the other processes, the longest first; stops when the parent is gone."""
    if parts > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
    if torch.cuda.is_available():
        torch.cuda.set_device(part % torch.cuda.device_count())
    torch.set_float32_matmul_precision("highest")
    folder, wanted, load, made, started = tables.BUILD / name, keys(study), Loader(), 0, time.monotonic()
    table, todo = current(read(paths.RESULTS / f"{name}.parquet"), wanted), sorted(blocks(study, size), key=one_pass)
    cells = dict(list(table.groupby(["model", "task"])))  # filtering the whole table takes longer than few rows
    with tqdm(total=len(todo), desc=name, disable=part > 0 or None) as bar:
        for number, block in turns(todo, counter):
            if parent not in (None, os.getppid()):
                raise RuntimeError("the process that owns the table is gone")
            known = cells.get((block.model, block.task), table[:0])
            made += make_block(block, study, folder, known, wanted, load)
            bar.update(number + 1 - bar.n)
    seconds = time.monotonic() - started
    print(
        f"{name}, process {part + 1} of {parts}: {made} rows in {seconds:.0f} s, {made / seconds:.1f} rows/s",
        flush=True,
    )


def make(name: str, study: Study, size: int = BLOCK, processes: int = 1) -> pd.DataFrame:
    """Make the table of a study, or what is missing of it, and write it to data/results.

    Raises:
        RuntimeError: if another process makes it, or a process fails. ValueError: for a damaged or foreign shard, or
            a length above a model's window.
    """
    with owner(name):
        context = multiprocessing.get_context("spawn")
        counter = context.Value("i", 0)
        if processes == 1:
            work(name, study, size, 0, 1, counter)
        else:
            arguments = [(name, study, size, part, processes, counter, os.getpid()) for part in range(processes)]
            running = [context.Process(target=work, args=each) for each in arguments]
            for process in running:
                process.start()
            for process in running:
                process.join()
            if failed := [process.exitcode for process in running if process.exitcode]:
                raise RuntimeError(f"{len(failed)} of {processes} processes failed; what they finished is kept")
        return merge(name, study, size)


def merge(name: str, study: Study, size: int) -> pd.DataFrame:
    """Put the table together from its shards and its older self, and write it and its summary."""
    rows = gathered(study, size, tables.BUILD / name, paths.RESULTS / f"{name}.parquet")
    write(rows, paths.RESULTS / f"{name}.parquet")
    part = tables.BUILD / f"{name}.csv.part"
    summarise(rows).round(5).to_csv(part, index=False, lineterminator="\n")
    part.replace(paths.RESULTS / f"{name}.csv")
    for kind in ("parquet", "csv"):
        checksums.record(paths.RESULTS / f"{name}.{kind}")
    return rows


def gathered(study: Study, size: int, folder: Path, table: Path) -> pd.DataFrame:
    """The rows of a study, from its shards in a folder and from its table. Raises ValueError if some are missing."""
    wanted = keys(study)
    files = [*(folder / block.file for block in blocks(study, size)), table]
    rows = together(*(current(read(file), wanted) for file in files))
    sizes = [study.samples(m, c) for m, _, c in itertools.product(study.models, study.tasks, study.everything)]
    most = rows["key"].map(dict(zip(wanted["key"], sizes, strict=True)))
    rows = rows[rows["sample"] < most].sort_values(SORTED, ignore_index=True)
    if len(rows) != study.rows:
        raise ValueError(f"{table.name}: {len(rows)} of {study.rows} rows; shards of another block size?")
    return rows
