"""Making tables, or what is missing of them, in blocks of samples that processes share."""

import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
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
        for model, task in itertools.product(study.models, study.tasks)
        for start in range(0, study.size(model, task), size)
        for part, (portion, share) in enumerate(parts)
        if start < (most := study.size(model, task) // share)
    ]


def make_block(block: Block, study: Study, folder: Path, table: pd.DataFrame, wanted: pd.DataFrame, load) -> int:
    """Compute what is missing of a block and write its shard; returns the number of new rows.

    Args:
        table: the rows of the block's model and task that are known and current. wanted: as `keys` gives them.
    """
    cells = cells_of(block, wanted)
    missing, known = left(block, study, folder, table, cells)
    return fill(block, study, folder, missing, known, cells, load) if missing else 0


def cells_of(block: Block, wanted: pd.DataFrame) -> pd.DataFrame:
    """Of `wanted` the cells of a block's model and task, in the order of the study's configurations."""
    return wanted[(wanted["model"] == block.model) & (wanted["task"] == block.task)]


def left(
    block: Block, study: Study, folder: Path, table: pd.DataFrame, cells: pd.DataFrame
) -> tuple[list[Configuration], pd.DataFrame]:
    """The configurations of a block that are missing in its shard and in `table`, and the rows of the others."""
    keys_of = dict(zip(study.everything, cells["key"], strict=True))
    known = together(current(read(folder / block.file), cells), table)
    known = known[known["sample"].isin(block.samples) & known["key"].isin([keys_of[c] for c in block.configurations])]
    done = set(known["key"].value_counts()[lambda n: n == len(block.samples)].index)
    return [c for c in block.configurations if keys_of[c] not in done], known[known["key"].isin(done)]


def fill(
    block: Block,
    study: Study,
    folder: Path,
    missing: list[Configuration],
    known: pd.DataFrame,
    cells: pd.DataFrame,
    load,
) -> int:
    """Compute what is `missing` of a block and write its shard, with the rows that are `known`; returns how many."""
    model, tokenizer = load(block.model)
    new = MEASURES[study.measure].evaluate(
        model, tokenizer, missing, block.task, study.length, block.samples,
        name=block.model, protocol=study.protocol, block=len(block.samples),
    ).merge(cells, on=CELL)  # fmt: skip
    write(together(known, new), folder / block.file)
    return len(new)


@lru_cache(maxsize=1)
def loaded(name: str, **arguments):
    """Model and tokenizer, the last ones kept in every process; on its GPU unless `device_map` says where they are."""
    model, tokenizer = kvlib.load(name, **arguments)
    placed = "device_map" in arguments or not torch.cuda.is_available()
    return model if placed else model.cuda(), tokenizer


def places(name: str, folder: Path | None) -> tuple[Path, Path]:
    """Where shards and table of a study are: those of data/results, or in a folder of their own."""
    if folder is None:
        return tables.BUILD / name, paths.RESULTS / f"{name}.parquet"
    return folder / "shards" / name, folder / f"{name}.parquet"


def turns(todo: list[Block], counter) -> Iterator[tuple[int, Block]]:
    """Blocks with their numbers, as long as there are any that no other process with the same counter has taken."""
    while True:
        with counter.get_lock():
            number, counter.value = counter.value, counter.value + 1
        if number >= len(todo):
            return
        yield number, todo[number]


def in_turn(study: Study, size: int) -> list[Block]:
    """All blocks, the longest first: one pass answers "exact" tasks for most methods."""
    return sorted(blocks(study, size), key=lambda block: study.find(block.task).metric == "exact")


def by_cell(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of each model and task: filtering the whole table for every block takes longer than few rows."""
    return dict(list(table.groupby(["model", "task"])))


def work(
    name: str, study: Study, size: int, part: int, parts: int, counter, parent: int | None = None,
    folder: Path | None = None, load: Callable = loaded,
) -> None:  # fmt: skip
    """Make blocks in turn with the other processes, the longest first; stops when the parent is gone."""
    if parts > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
    if torch.cuda.is_available():
        torch.cuda.set_device(part % torch.cuda.device_count())
    torch.set_float32_matmul_precision("highest")
    (shards, file), wanted, made = places(name, folder), keys(study), 0
    table, todo, started = current(read(file), wanted), in_turn(study, size), time.monotonic()
    rows = by_cell(table)
    with tqdm(total=len(todo), desc=name, disable=part > 0 or None) as bar:
        for number, block in turns(todo, counter):
            if parent not in (None, os.getppid()):
                raise RuntimeError("the process that owns the table is gone")
            known = rows.get((block.model, block.task), table[:0])
            made += make_block(block, study, shards, known, wanted, load)
            bar.update(number + 1 - bar.n)
    seconds = time.monotonic() - started
    print(
        f"{name}, process {part + 1} of {parts}: {made} rows in {seconds:.0f} s, {made / seconds:.1f} rows/s",
        flush=True,
    )


def make(
    name: str,
    study: Study,
    size: int = BLOCK,
    processes: int = 1,
    folder: Path | None = None,
    load: Callable = loaded,
) -> pd.DataFrame:
    """Make the table of a study, or what is missing of it, and write it to data/results or to another folder.

    Args:
        load: takes a name and returns model and tokenizer, in any process.

    Raises:
        RuntimeError: if another process makes it, or a process fails. ValueError: for a damaged or foreign shard, or
            a length above a model's window.
    """
    with owner(name, folder):
        context = multiprocessing.get_context("spawn")
        counter = context.Value("i", 0)
        if processes == 1:
            work(name, study, size, 0, 1, counter, None, folder, load)
        else:
            shared = (processes, counter, os.getpid(), folder, load)
            running = [
                context.Process(target=work, args=(name, study, size, part, *shared)) for part in range(processes)
            ]
            for process in running:
                process.start()
            for process in running:
                process.join()
            if failed := [process.exitcode for process in running if process.exitcode]:
                raise RuntimeError(f"{len(failed)} of {processes} processes failed; what they finished is kept")
        return merge(name, study, size, folder)


def merge(name: str, study: Study, size: int, folder: Path | None = None) -> pd.DataFrame:
    """Put the table together from its shards and its older self, and write it and its summary."""
    shards, table = places(name, folder)
    summary = table.with_suffix(".csv")
    rows = gathered(study, size, shards, table)
    write(rows, table)
    part = tables.part(summary)
    summarise(rows).round(5).to_csv(part, index=False, lineterminator="\n")
    part.replace(summary)
    for file in (table, summary):
        checksums.record(file)
    return rows


def gathered(study: Study, size: int, folder: Path, table: Path) -> pd.DataFrame:
    """The rows of a study, from its shards in a folder and from its table. Raises ValueError if some are missing."""
    wanted = keys(study)
    files = [*(folder / block.file for block in blocks(study, size)), table]
    rows = together(*(current(read(file), wanted) for file in files))
    sizes = [study.samples(*cell) for cell in itertools.product(study.models, study.tasks, study.everything)]
    most = rows["key"].map(dict(zip(wanted["key"], sizes, strict=True)))
    rows = rows[rows["sample"] < most].sort_values(SORTED, ignore_index=True)
    if len(rows) != study.rows:
        raise ValueError(f"{table.name}: {len(rows)} of {study.rows} rows; shards of another block size?")
    return rows
