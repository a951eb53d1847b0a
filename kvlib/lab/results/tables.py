"""Result tables and shards as files: read, put together, written whole or not at all, by one process at a time."""

import fcntl
import os
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
    part = BUILD / f"{path.name}.{os.getpid()}.part"
    for folder in (path.parent, part.parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows[[column for column in KNOWN if column in rows]].to_parquet(part, compression="zstd", index=False)
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


def clean(names: list[str]) -> None:
    """Delete tables and shards of studies. Other tables in data/results, which need other data or machines, stay."""
    for name in names:
        with owner(name):
            tables = [paths.RESULTS / f"{name}.{kind}" for kind in ("parquet", "csv")]
            for path in [*tables, *(BUILD / name).glob("*.parquet")]:
                path.unlink(missing_ok=True)
            for path in tables:
                checksums.record(path)
