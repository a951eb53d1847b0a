"""Result tables and shards as files: read, put together, written whole or not at all, by one process at a time."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.evaluation.evaluate import CELL, MEASURED
from kvlib.lab.evaluation.measures import EXTRA

BUILD = paths.ROOT / "build" / "results"
COLUMNS = [*CELL, "sample", *MEASURED, "torch", "device", "key"]
KNOWN = [*COLUMNS, *(column for columns in EXTRA.values() for column in columns)]


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
    if odd := (set(COLUMNS) - set(rows)) | (set(rows) - set(KNOWN)):
        raise ValueError(f"{path.name} is of another version (columns {', '.join(sorted(odd))}); delete it to go on")
    return rows


def write(rows: pd.DataFrame, path: Path) -> None:
    """Appear at once and whole, or not at all; what is the same keeps its date."""
    new = part(path)
    rows[[column for column in KNOWN if column in rows]].to_parquet(new, compression="zstd", index=False)
    if path.is_file() and path.read_bytes() == new.read_bytes():
        new.unlink()
    else:
        new.replace(path)


def part(path: Path) -> Path:
    """Where this process writes a file before it is renamed; both folders are there then.

    Beside the file, since only within a file system a name changes at once, but not among what is committed.
    """
    folder = BUILD if path.parent == paths.RESULTS else path.parent
    for each in (folder, path.parent):
        each.mkdir(parents=True, exist_ok=True)
    return folder / f"{path.name}.{platform.node()}.{os.getpid()}.part"


@contextmanager
def owner(name: str, folder: Path | None = None) -> Iterator[None]:
    """One process at a time makes a table, one of data/results or in a folder of its own.

    Raises RuntimeError if another does; the lock dies with its process.
    """
    folder = folder or BUILD
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is making the table {name}") from None
        yield


def clean(names: list[str]) -> None:
    """Delete tables and shards of studies. Other tables in data/results, which need other data or machines, stay."""
    for name in names:
        with owner(name):
            tables = [paths.RESULTS / f"{name}.{kind}" for kind in ("parquet", "csv")]
            for path in [*tables, *(BUILD / name).glob("*.parquet")]:
                path.unlink(missing_ok=True)
            for path in tables:
                checksums.record(path)
