"""The key of a row: what it follows from, so that rows of other code, text or models are told apart."""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
from transformers import AutoConfig

from kvlib import checksums, paths, smollm2
from kvlib.anchored.arms import ARMS
from kvlib.core.method import METHODS
from kvlib.lab import definitions
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL
from kvlib.lab.evaluation.measures import MEASURES
from kvlib.lab.results.study import Study


def checkpoint(model: str) -> str:
    """What tells a model from others, for a name that `kvlib.load` takes: a sha256, or the commit of a hub id.

    Of arms, most of which are not shipped, the sha256 is recorded (`recorded`).

    Raises:
        ValueError: for an arm that nobody has trained, and for a hub id without a commit.
    """
    if model == "smollm2":
        return smollm2.SHA256[smollm2.GGUF]
    if model in (arms := recorded(paths.MODELS / "arms.csv")):
        return arms[model]
    if model in ARMS:
        raise ValueError(f"{model} is not listed in arms.csv: train it with `python -m kvlib.anchored train {model}`")
    shipped = paths.MODELS / model
    if shipped.parent == paths.MODELS and (shipped / checksums.NAME).is_file():
        return of_files(checksums.listed(shipped))
    return of_folder(Path(model)) if Path(model).is_dir() else commit(model)


@cache
def recorded(file: Path) -> dict[str, str]:
    """The sha256 of every arm of `kvlib.anchored`, by its name, whether its weights are on this machine or not."""
    return dict(pd.read_csv(file)[["arm", "sha256"]].itertuples(index=False)) if file.is_file() else {}


def of_files(listed: dict[str, str]) -> str:
    """sha256 over the lines of a list of checksums that are about deciding files."""
    lines = [f"{checksum}  {name}" for name, checksum in listed.items()]
    deciding = [line for line in lines if line.endswith((".safetensors", "  config.json", "  tokenizer.json"))]
    return hashlib.sha256("\n".join(sorted(deciding)).encode()).hexdigest()


@cache
def of_folder(folder: Path) -> str:
    """The same of a folder without such a list, all of which is read: seconds for some gigabytes."""
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".json")]
    return of_files({file.name: checksums.digest(file) for file in files})


@cache
def commit(name: str) -> str:
    """The commit of a hub id that is loaded now."""
    found = AutoConfig.from_pretrained(name)._commit_hash
    if found is None:
        raise ValueError(f"{name}: the hub does not say which commit this is")
    return found


def key(model: str, task: str, study: Study, configuration: Configuration) -> str:
    """What the rows of a cell follow from, sample numbers aside.

    Checkpoint, text, parameters, and the code of evaluator, task and method: what they reach by name, in whichever
    module it stands (`kvlib.lab.definitions`). Recomputed samples vouch for the library under everything.
    """
    found = study.find(task)
    reached = (MEASURES[study.measure].evaluate, *found.functions, METHODS[configuration.method])
    code = definitions.digest(*map(definitions.name_of, reached))
    parts = [checkpoint(model), found.source(), code, task, study.length, study.protocol, asdict(configuration)]
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
        for m, t, c in product(study.models, study.tasks, study.everything)
    ]
    return pd.DataFrame(rows)


def current(rows: pd.DataFrame, wanted: pd.DataFrame) -> pd.DataFrame:
    """The rows whose key is that of their cell in `wanted`."""
    return rows.merge(wanted, on=[*CELL, "key"], how="inner") if len(rows) else rows
