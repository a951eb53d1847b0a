"""One sweep: which study, for which models, where its rows go, and who makes them."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvlib import paths
from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.results import making, paper_studies, studies
from kvlib.lab.results.keys import checkpoint
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
        study: its name, of a table of data/results or of a published benchmark.
        model: a name for `kvlib.load` instead of the study's own; samples: of every task, instead of as many as the
            study has of its largest model. folder: one that all machines see; default: build/sweeps.
        block: prompts per prefill. processes: side by side on this machine.
        ray: None, or the cluster that makes the rows: what `ray.init` takes as its address.
        arguments: passed to `kvlib.load`; `dtype` by its name.

    Returns:
        the table's file; its means are beside it.

    Raises:
        ValueError: for an unknown study, numbers below 1, a length above the model's window, without Ray.
        OSError: for a model that cannot be loaded, a cluster that cannot be reached, a benchmark without its data.
        RuntimeError: if another process makes the table, or some fail. What is finished is kept in any case.
    """
    if min(block, processes) < 1:
        raise ValueError(f"{block} prompts per prefill, {processes} processes: at least 1 of each")
    chosen = measurable(choose(study, model, samples))
    load = partial(making.loaded, **arguments)
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
    known = studies.STUDIES | paper_studies.STUDIES
    if name not in known:
        raise unknown("study", name, known)
    study = known[name]
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


def measurable(study: Study) -> Study:
    """The study without tasks whose data are not here, which are named. Raises OSError if none is left."""
    found = []
    for task in study.tasks:
        try:
            study.find(task).source()
            found.append(task)
        except (OSError, ImportError, ValueError) as error:
            if len(study.tasks) == 1:
                raise OSError(f"{task}: {error}") from error
            print(f"{task}: not measured, {error}", file=sys.stderr)
    if not found:
        raise OSError("no task of the study has its data")
    return replace(study, tasks=tuple(found))


def cluster():
    """The module that needs Ray."""
    try:
        from kvlib.lab.sweeps import cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("--ray needs Ray: pip install -e '.[ray]'") from None
    return cluster
