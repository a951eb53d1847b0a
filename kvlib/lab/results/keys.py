"""The key of a row: what it follows from, so that rows of other code, text or models are told apart."""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from itertools import product

import pandas as pd

from kvlib import paths, smollm2
from kvlib.core.method import METHODS
from kvlib.lab import definitions, tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL, evaluate
from kvlib.lab.results.studies import Study
from kvlib.lab.tasks.composing import HELDOUT
from kvlib.lab.tasks.natural.texts import NOVEL


def checkpoint(model: str) -> str:
    """sha256 over the files of a model that decide what it computes."""
    if model == "smollm2":
        return smollm2.SHA256[smollm2.GGUF]
    lines = (paths.MODELS / model / "SHA256SUMS").read_text().splitlines()
    deciding = [line for line in lines if line.endswith((".safetensors", "  config.json", "  tokenizer.json"))]
    return hashlib.sha256("\n".join(sorted(deciding)).encode()).hexdigest()


@cache
def heldout() -> str:
    """sha256 of the texts that prompts are made of."""
    return hashlib.sha256(HELDOUT.read_bytes() + NOVEL.read_bytes()).hexdigest()


def key(model: str, task: str, study: Study, configuration: Configuration) -> str:
    """What the rows of a cell follow from, sample numbers aside.

    Checkpoint, held-out text, parameters, and the code of evaluator, task and method: what they reach by name, in
    whichever module it stands (`kvlib.lab.definitions`). Recomputed samples vouch for the library under everything.
    """
    reached = (evaluate, tasks.sample, tasks.find(task).draw, tasks.find(task).make, METHODS[configuration.method])
    code = definitions.digest(*map(definitions.name_of, reached))
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
        for m, t, c in product(study.models, study.tasks, study.everything)
    ]
    return pd.DataFrame(rows)


def current(rows: pd.DataFrame, wanted: pd.DataFrame) -> pd.DataFrame:
    """The rows whose key is that of their cell in `wanted`."""
    return rows.merge(wanted, on=[*CELL, "key"], how="inner") if len(rows) else rows
