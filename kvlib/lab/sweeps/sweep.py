"""One sweep: which study, for which models, where its rows go, and who makes them."""

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

import kvlib
from kvlib import paths
from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.results import making
from kvlib.lab.results.keys import checkpoint
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study
from kvlib.nearest import unknown


def sweep(
    study: str,
    model: str | None = None,
    samples: int | None = None,
    folder: str | Path | None = None,
    block: int = BLOCK,
    processes: int = 1,
    ray: str | None = None,
    **arguments,
) -> Path:
    """Make what is missing of a study's table, in a folder of its own in `folder`, never in data/results.

    Args:
        study: its name. model: a name for `kvlib.load` instead of the study's own; samples: of every task, instead of
            as many as the study has of its largest model. folder: one that all machines see; default: build/sweeps.
        block: prompts per prefill. processes: side by side on this machine.
        ray: None, or the cluster that makes the rows: what `ray.init` takes as its address.
        arguments: passed to `kvlib.load`; `dtype` by its name.

    Returns:
        the table's file; its means are beside it.

    Raises:
        ValueError: for an unknown study, numbers below 1, a length above the model's window, without Ray.
        OSError: for a model that cannot be loaded, or a cluster that cannot be reached.
        RuntimeError: if another process makes the table, or some fail. What is finished is kept in any case.
    """
    if min(block, processes) < 1:
        raise ValueError(f"{block} prompts per prefill, {processes} processes: at least 1 of each")
    chosen = choose(study, model, samples)
    load = partial(loaded, **arguments)
    own = [study, *(making.as_file(str(each)) for each in (model, arguments.get("dtype")) if each)]
    folder = Path(folder or paths.ROOT / "build" / "sweeps").resolve() / "-".join(own)
    if ray is None:
        making.make(study, chosen, block, processes, folder, load)
    else:
        cluster().make(study, chosen, block, processes, folder, load, ray)
    return making.places(study, folder)[1]


def choose(name: str, model: str | None, samples: int | None) -> Study:
    """The study of this name, for another model if one is given, with as many samples per task if a number is.

    Raises ValueError for an unknown study and for less than one sample, OSError for a model that is not found.
    """
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    study = STUDIES[name]
    if model is not None:
        study = replace(study, models={model: max(study.models.values())})
    if samples is not None:
        study = replace(study, models=dict.fromkeys(study.models, samples))
    for each in study.models:
        try:
            checkpoint(each)
        except OSError as error:
            raise OSError(f"cannot find {each!r}: {str(error).splitlines()[0]}") from error
    return study


@lru_cache(maxsize=1)
def loaded(name: str, **arguments):
    """Model and tokenizer, the last ones kept in every process; on its GPU unless `device_map` says where they are."""
    model, tokenizer = kvlib.load(name, **arguments)
    placed = "device_map" in arguments or not torch.cuda.is_available()
    return model if placed else model.cuda(), tokenizer


def cluster():
    """The module that needs Ray."""
    try:
        from kvlib.lab.sweeps import cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("--ray needs Ray: pip install -e '.[ray]'") from None
    return cluster
