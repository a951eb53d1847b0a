"""The rows of a set, from the folder of `KVLIB_DATA` or from the hub."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import cache, lru_cache

from kvlib.lab.evaluation.benchmarks.files import VARIABLE, check, hint, local
from kvlib.lab.evaluation.benchmarks.hub import download, rows_of
from kvlib.lab.evaluation.benchmarks.registry import Benchmark, find


def load(name: str, split: str | None = None, revision: str | None = None) -> list[dict]:
    """The rows of a set: from the folder of `KVLIB_DATA` if that is set, else from the hub.

    Args:
        name: one of `BENCHMARKS`. split: "test" if left out.
        revision: another commit of the hub's repository than the one recorded here; its content is not compared with
            the recorded checksum. The folder's files are always compared.

    Returns:
        rows with the columns of the module's description, in the publishers' order.

    Raises:
        ValueError: for an unknown name, split or revision; for a file that differs from its checksum, lacks a column
            or has another number of rows than it should.
        FileNotFoundError, NotADirectoryError: if the folder or its file is missing, or a set is not on the hub.
        ImportError: if the hub is needed and `datasets` is not installed.
        OSError: if the hub cannot be reached.
    """
    benchmark = find(name)
    split = split or next(iter(benchmark.files))
    if split not in benchmark.files:
        raise ValueError(f"{name}: unknown split {split!r}; there are: {', '.join(benchmark.files)}")
    file = benchmark.files[split]
    if os.environ.get(VARIABLE):
        rows = benchmark.read(local(file, from_hub(benchmark)), split)
    else:
        rows = fetch(name, benchmark, split, revision)
    if file.rows is not None and len(rows) != file.rows:
        raise ValueError(f"{name}, split {split!r}: {len(rows)} rows, expected {file.rows}")
    return [pick(name, row, benchmark.columns) for row in rows]


def data(make: Callable[[], object]) -> object:
    """What `make()` gives with today's `KVLIB_DATA`, kept until other data are asked for: blocks in a row share it."""
    return _data(make, os.environ.get(VARIABLE))


@lru_cache(maxsize=1)
def _data(make: Callable[[], object], folder: str | None) -> object:
    return make()


def digest(make: Callable[[], object]) -> str:
    """The sha256 of such data, as JSON."""
    return _digest(make, os.environ.get(VARIABLE))


@cache
def _digest(make: Callable[[], object], folder: str | None) -> str:
    return hashlib.sha256(json.dumps(_data(make, folder), sort_keys=True).encode()).hexdigest()


def pick(name: str, row: dict, columns: dict[str, str]) -> dict:
    """The documented columns of a row."""
    missing = [published for published in columns.values() if published not in row]
    if missing:
        raise ValueError(f"{name}: a row lacks {', '.join(missing)}; it has {', '.join(row)}")
    return {ours: row[published] for ours, published in columns.items()}


def from_hub(benchmark: Benchmark) -> str:
    if benchmark.hub is None:
        return "not on the hub"
    if benchmark.hub.revision is None:
        return f"{benchmark.hub.file} of {benchmark.hub.repository} on the hub"
    return f"read from {benchmark.hub.repository} on the hub when {VARIABLE} is not set"


def fetch(name: str, benchmark: Benchmark, split: str, revision: str | None) -> list[dict]:
    """Rows of a set from the hub."""
    hub, file = benchmark.hub, benchmark.files[split]
    if hub is None:
        raise FileNotFoundError(f"{name} is not on the hub: {hint(file)}")
    commit = revision or hub.revision
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise ValueError(
            f"revision={commit!r}: {hub.repository} needs the 40 hexadecimal digits of a commit, because branches "
            f"move; or {hint(file)}"
        )
    try:
        got = download(hub, commit) if hub.file else rows_of(hub, commit, split)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: install `datasets`, or {hint(file)}") from error
    except Exception as error:  # many kinds, depending on what fails and on versions
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise OSError(f"cannot load {name!r} from {hub.repository} on the hub{offline}: {hint(file)}") from error
    if hub.join:
        got = hub.join(got)
    if isinstance(got, list):
        return got
    if commit == hub.revision:
        check(got, file, f"from {hub.repository}, revision {commit},")
    return benchmark.read(got, split)
