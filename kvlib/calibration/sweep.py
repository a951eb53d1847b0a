"""The accuracy of TidalDecode with one choice of selection layers after the other, as its authors choose them.

One prefill of each block of prompts serves all choices, and its rows are kept: what was interrupted goes on there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from kvlib import calibration
from kvlib.lab import definitions, tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import evaluate
from kvlib.lab.results.origins import heldout
from kvlib.methods.tidaldecode import TidalDecode


def configuration(budget: float | int, heads: str, layers: Sequence[int]) -> Configuration:
    return Configuration("tidaldecode", budget, json.dumps({"heads": heads, "selection_layers": layers}))


def accuracies(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    families: Sequence[str],
    length: int,
    seeds: Sequence[int],
    *,
    kept: Path,
    block: int,
    progress: Callable = iter,
) -> dict[Configuration, float]:
    """The mean score of each configuration, all of one budget, over the prompts of these families and seeds.

    Args:
        kept: the folder of rows. block: prompts per prefill. progress: wraps the list of blocks.
    """
    blocks = [(task, seeds[begin : begin + block]) for task in families for begin in range(0, len(seeds), block)]
    rows = pd.concat(measured(model, tokenizer, configurations, *where, length, kept) for where in progress(blocks))
    means = rows.groupby("arguments")["value"].mean()
    return {configuration: float(means[configuration.arguments]) for configuration in configurations}


def measured(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    seeds: Sequence[int],
    length: int,
    kept: Path,
) -> pd.DataFrame:
    """Rows of `evaluate` for one block of prompts; those in its file are not made again.

    The file's name holds a hash of all that rows follow from: the model, texts, and the code of evaluator, task and
    method, as in result tables.
    """
    family, budget = tasks.find(task), configurations[0].budget
    reached = (evaluate, tasks.sample, family.draw, family.make, TidalDecode)
    code = definitions.digest(*map(definitions.name_of, reached))
    follows_from = [calibration.fingerprint(model), heldout(), code, task, length, list(seeds), budget]
    key = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()[:16]
    file = kept / f"{task}-{key}.parquet"
    parts = [pd.read_parquet(file)] if file.is_file() else []
    known = {arguments for part in parts for arguments in part["arguments"]}
    missing = [each for each in configurations if each.arguments not in known]
    if missing:
        parts.append(evaluate(model, tokenizer, missing, task, length, seeds, name="", block=len(seeds)))
        kept.mkdir(parents=True, exist_ok=True)
        pd.concat(parts).to_parquet(part := file.with_suffix(".part"))
        part.rename(file)
    return pd.concat(parts)
