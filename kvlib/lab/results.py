"""Making, resuming and verifying the result tables of `kvlib.lab.studies.STUDIES`.

    python -m kvlib.lab.results [STUDY ...]             make tables, or what is missing of them
    python -m kvlib.lab.results --verify FRACTION       recompute a share of the samples, at least four, and compare
    python -m kvlib.lab.results --clean                 delete tables and shards, to make everything anew

Work is cut into blocks of samples, in the same way whatever was done before. A block is a shard, which grows by fifty
configurations at a time; it is written under another name and renamed, so that a run killed at any moment leaves
nothing half-written and the next run goes on after it. A row is reused, from a shard or from the table, when its key is
that of today's checkpoint, parameters, and code of method and task.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import paths
from kvlib.core.method import METHODS
from kvlib.lab import evaluate, tasks, verification
from kvlib.lab.evaluate import CELL
from kvlib.lab.fingerprint import fingerprint
from kvlib.lab.studies import STUDIES, Configuration, Study
from kvlib.lab.summaries import summarise
from kvlib.lab.tasks.composing import HELDOUT

BUILD = paths.ROOT / "build" / "results"
PORTION = 50  # configurations of a block between two writes
COLUMNS = [*CELL, "sample", *evaluate.MEASURED, "torch", "device", "key"]
SORTED = ["model", "task", "length", "protocol", "sample", "method", "arguments", "budget"]


@dataclass(frozen=True)
class Block:
    """Samples that are prefilled together, for every configuration of a study."""

    model: str
    task: str
    samples: tuple[int, ...]

    @property
    def file(self) -> str:
        return f"{self.model}-{self.task}-{self.samples[0]:05}-{len(self.samples)}.parquet"


def blocks(study: Study, size: int) -> list[Block]:
    """All of a study, in the order in which it is made."""
    return [
        Block(model, task, tuple(range(start, min(start + size, samples))))
        for (model, samples), task in product(study.models.items(), study.tasks)
        for start in range(0, samples, size)
    ]


def samples_of(study: Study) -> int:
    """All of them: of every task, for every model."""
    return len(study.tasks) * sum(study.models.values())


def checkpoint(model: str) -> str:
    """sha256 over the files of a shipped model that decide what it computes."""
    lines = (paths.MODELS / model / "SHA256SUMS").read_text().splitlines()
    deciding = [line for line in lines if line.endswith((".safetensors", "  config.json", "  tokenizer.json"))]
    return hashlib.sha256("\n".join(sorted(deciding)).encode()).hexdigest()


@cache
def heldout() -> str:
    """sha256 of the text that prompts are made of."""
    return hashlib.sha256(HELDOUT.read_bytes()).hexdigest()


def key(model: str, task: str, study: Study, configuration: Configuration) -> str:
    """What the rows of a cell follow from, sample numbers aside.

    Checkpoint, held-out text, parameters, and the code of evaluator, task and method.
    """
    code = fingerprint(evaluate.evaluate, tasks.sample, tasks.find(task).make, METHODS[configuration.method])
    parts = [checkpoint(model), heldout(), code, task, study.length, study.protocol, asdict(configuration)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def keys(study: Study) -> pd.DataFrame:
    """The key of every cell of a study: columns `CELL` and key."""
    rows = [
        {
            "model": m,
            **asdict(c),
            "task": t,
            "length": study.length,
            "protocol": study.protocol,
            "key": key(m, t, study, c),
        }
        for m, t, c in product(study.models, study.tasks, study.configurations)
    ]
    return pd.DataFrame(rows)


def current(rows: pd.DataFrame, wanted: pd.DataFrame) -> pd.DataFrame:
    """The rows whose key is that of their cell in `wanted`."""
    return rows.merge(wanted, on=[*CELL, "key"], how="inner") if len(rows) else rows


def together(*frames: pd.DataFrame) -> pd.DataFrame:
    """Frames below each other, a row of two frames once. Empty ones are left out: they have no types."""
    return pd.concat([f for f in frames if len(f)] or frames[:1]).drop_duplicates([*CELL, "sample"])


def read(path: Path) -> pd.DataFrame:
    """A table or shard; empty if there is none. Raises ValueError for one that is damaged or has other columns."""
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    try:
        rows = pd.read_parquet(path)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read ({error}); delete it, and it will be made again") from error
    if odd := set(rows) ^ set(COLUMNS):
        raise ValueError(f"{path.name} is of another version (columns {', '.join(sorted(odd))}); delete it to go on")
    return rows


def write(rows: pd.DataFrame, path: Path) -> None:
    """Appear at once and whole, or not at all; what is the same keeps its date."""
    part = BUILD / f"{path.name}.{os.getpid()}.part"
    for folder in (path.parent, part.parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows[COLUMNS].to_parquet(part, compression="zstd", index=False)
    if path.is_file() and path.read_bytes() == part.read_bytes():
        part.unlink()
    else:
        part.replace(path)


@contextmanager
def owner(name: str) -> Iterator[None]:
    """One process at a time makes a table. Raises RuntimeError if another does; the lock dies with its process."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is making the table {name}") from None
        yield


def make_block(block: Block, study: Study, folder: Path, table: pd.DataFrame, wanted: pd.DataFrame, load) -> int:
    """Compute what is missing of a block and write its shard; returns the number of new rows.

    Args:
        table: the rows of the block's model and task that are known and current. wanted: as `keys` gives them.
    """
    path = folder / block.file
    known = together(current(read(path), wanted), table)
    known = known[known["sample"].isin(block.samples)]
    done = set(known["key"].value_counts()[lambda n: n == len(block.samples)].index)
    cells = wanted[(wanted["model"] == block.model) & (wanted["task"] == block.task)]
    missing = [c for c, k in zip(study.configurations, cells["key"]) if k not in done]
    if not missing:
        return 0
    model, tokenizer = load(block.model)
    size, rows = len(block.samples), known[known["key"].isin(done)]
    for start in range(0, len(missing), PORTION):
        new = evaluate.evaluate(
            model, tokenizer, missing[start : start + PORTION], block.task, study.length, block.samples,
            name=block.model, protocol=study.protocol, block=size,
        ).merge(cells, on=CELL)  # fmt: skip
        rows = together(rows, new)
        write(rows, path)
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
    folder, wanted, load, made, started = BUILD / name, keys(study), Loader(), 0, time.monotonic()
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


def make(name: str, study: Study, size: int = evaluate.BLOCK, processes: int = 1) -> pd.DataFrame:
    """Make the table of a study, or what is missing of it, and write it to data/results.

    Raises:
        RuntimeError: if another process makes it, or a process fails. ValueError: for a damaged or foreign shard, or
            a length above a model's window.
    """
    for model in study.models:
        window = json.loads((paths.MODELS / model / "config.json").read_text())["max_position_embeddings"]
        evaluate.check_window(window, study.length)
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
    wanted = keys(study)
    files = [*(BUILD / name / block.file for block in blocks(study, size)), paths.RESULTS / f"{name}.parquet"]
    rows = together(*(current(read(file), wanted) for file in files))
    rows = rows[rows["sample"] < rows["model"].map(study.models)].sort_values(SORTED, ignore_index=True)
    if len(rows) != (count := samples_of(study) * len(study.configurations)):
        raise ValueError(f"{name}: {len(rows)} of {count} rows; shards of another block size?")
    write(rows, paths.RESULTS / f"{name}.parquet")
    part = BUILD / f"{name}.csv.part"
    summarise(rows).round(5).to_csv(part, index=False, lineterminator="\n")
    part.replace(paths.RESULTS / f"{name}.csv")
    return rows


def verify(name: str, study: Study, samples: int, seed: int = 0) -> float:
    """Recompute so many samples, with all configurations; the share of rows that agree.

    They are drawn by seed from those of all models and tasks (`kvlib.lab.verification.draw`).

    Raises:
        ValueError: for rows of other code, text or models, and what `kvlib.lab.verification.compare` finds.
    """
    table = read(paths.RESULTS / f"{name}.parquet")
    if len(current(table, keys(study))) < len(table):
        raise ValueError(f"{name}: rows of other code, text or models; make them again with: make results")
    drawn = verification.draw(study, samples, seed)
    return verification.compare(table, verification.recompute(study, drawn, Loader()))


def clean(names: list[str]) -> None:
    """Delete tables and shards of studies. Other tables in data/results, which need other data or machines, stay."""
    for name in names:
        with owner(name):
            tables = [paths.RESULTS / f"{name}.{kind}" for kind in ("parquet", "csv")]
            for path in [*tables, *(BUILD / name).glob("*.parquet")]:
                path.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.results", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all; known: {', '.join(STUDIES)}")
    parser.add_argument("--block", type=int, default=evaluate.BLOCK, help="prompts per prefill")
    parser.add_argument("--processes", type=int, default=1, help="side by side, spread over the GPUs")
    parser.add_argument("--verify", type=float, metavar="FRACTION", help="recompute this share of the samples instead")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples to recompute")
    parser.add_argument("--clean", action="store_true", help="delete instead")
    arguments = parser.parse_args(argv)
    names = arguments.studies or list(STUDIES)
    if unknown := set(names) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    if arguments.verify is not None and not 0 < arguments.verify <= 1:
        parser.error(f"--verify {arguments.verify}: a share of the samples, in (0, 1]")
    if arguments.clean:
        return clean(names)
    for name in names:
        if arguments.verify is not None:
            total = samples_of(STUDIES[name])
            count = min(total, max(verification.LEAST, round(arguments.verify * total)))
            agreement = verify(name, STUDIES[name], count, arguments.seed)
            print(f"{name}: {agreement:.1%} of the rows of {count} recomputed samples agree")
        else:
            print(f"{len(make(name, STUDIES[name], arguments.block, arguments.processes))} rows in {name}.parquet")


if __name__ == "__main__":
    main()
