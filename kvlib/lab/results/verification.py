"""Recomputing whole samples of a result table, drawn by seed, and comparing them with what it records.

A sample is that of one model and task, with all configurations of the study, which share its prefill.
"""

import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd

from kvlib import checksums, paths
from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL
from kvlib.lab.evaluation.measures import MEASURES
from kvlib.lab.results.keys import current, keys, recorded
from kvlib.lab.results.making import loaded
from kvlib.lab.results.study import FEWER, Study
from kvlib.lab.results.tables import owner, read, write
from kvlib.lab.statistics import paired_difference

LEAST = 4  # samples
ROUNDING = 2e-4  # of bits and norms, which another CPU or a GPU adds up in another order: that moved them by 2e-5
ALLOWED = {  # of what is no answer, by measure
    "sinks": lambda recorded: ROUNDING * recorded.abs(),
    "drift": lambda recorded: 1.5 / 64,  # one close first choice among 64 tokens
    "running": lambda recorded: 1e-3 * recorded.abs(),  # a token or two in a set that had nearly the same logits
    "recall": lambda recorded: 1e-3,  # a few tokens of nearly the same attention
}
EXACT = ("stored_bytes", "read_bytes", "full_bytes", "prefill_flops", "clamped")
COMPARED = {  # with the full cache: rounding of both sides, and one close first choice among 64 tokens
    "divergence": lambda recorded: 1e-3 * recorded.abs() + 1e-4,
    "agreement": lambda recorded: 1.5 / 64,
    "anchor_nats": lambda recorded: 1e-3 * recorded.abs() + 1e-4,
    "free_bits": lambda recorded: ROUNDING * recorded.abs(),
    "missed": lambda recorded: 1e-9,
    "spurious": lambda recorded: 1e-9,
}
FOLLOWING = ("outcome", "peak_bytes", "end_bytes")  # from what was written, in which a close first choice may tip
AGREEMENT = 0.97  # of recomputed rows: another CPU or a GPU rounds differently, which can tip a close first choice


def todays_seed() -> int:
    """20261128 on that day: who verifies on another day checks other samples."""
    return int(f"{date.today():%Y%m%d}")


def verify(
    name: str, study: Study, samples: int, seed: int | None = None, processes: int = 1, *, by_lot: bool = False
) -> float:
    """Recompute so many samples, with all configurations; the share of rows that agree.

    They are drawn by seed, today's unless given, from those of all models and tasks (`draw`).

    Args:
        by_lot: only one configuration of each method, drawn too: with a real model on a CPU a row takes seconds.

    Raises:
        ValueError: for rows of other code, text or models, and what `compare` finds.
        FileNotFoundError: as `on_this_machine`.
    """
    table = read(paths.RESULTS / f"{name}.parquet")
    if len(current(table, keys(study))) < len(table):
        raise ValueError(f"{name}: rows of other code, text or models; make them again with: make results")
    study = on_this_machine(name, study)
    asked = one_of_each_method(study, seed) if by_lot else study
    again = recompute(asked, draw(study, samples, seed), loaded, processes)
    return compare(table, again, study.measure)


def on_this_machine(name: str, study: Study) -> Study:
    """The study without the arms whose weights are not here, which are named.

    Raises:
        FileNotFoundError: if no model is left.
    """
    arms = recorded(paths.MODELS / "arms.csv")
    absent = [model for model in study.models if model in arms and not loads(model)]
    if not absent:
        return study
    sentence = f"{name}: without the weights of {', '.join(absent)}, which `python -m kvlib.anchored train` makes, "
    if len(absent) == len(study.models):
        raise FileNotFoundError(f"{sentence}nothing can be recomputed")
    print(f"{sentence}only rows of other models are recomputed")
    return replace(study, models={model: n for model, n in study.models.items() if model not in absent})


def loads(model: str) -> bool:
    try:
        loaded(model)
    except OSError:
        return False
    return True


def one_of_each_method(study: Study, seed: int | None = None) -> Study:
    """The study with one configuration of each method, drawn by today's seed unless told."""
    rng, of_method = np.random.default_rng(todays_seed() if seed is None else seed), defaultdict(list)
    for configuration in study.everything:
        of_method[configuration.method].append(configuration)
    chosen = {own[rng.integers(len(own))] for own in of_method.values()}
    kept = [tuple(c for c in part if c in chosen) for part in (study.configurations, study.fewer)]
    return replace(study, configurations=kept[0], fewer=kept[1])


def rekey(name: str, study: Study, samples: int, seed: int | None = None, processes: int = 1) -> tuple[int, int]:
    """Give rows today's keys, if every row of so many recomputed samples is what the table records.

    For changes that move keys but no values: of how keys are made, or of code that computes the same in another way.
    Configurations whose rows have today's keys are not recomputed. Only cells that a recomputed sample belongs to get
    them: all these configurations of a model and task at once. Values stay as they are, and so does the order of rows.
    Returns how many rows got other keys, how many lack today's.

    Raises:
        ValueError: if a single row differs, and what `compare` finds; the table is then untouched.
        FileNotFoundError: as `on_this_machine`.
    """
    path = paths.RESULTS / f"{name}.parquet"
    with owner(name):
        table, wanted = read(path), keys(study)
        moved = with_old_keys(on_this_machine(name, study), table, wanted)
        if moved is None:
            return 0, len(table) - len(current(table, wanted))
        again = recompute(moved, draw(moved, samples, seed), loaded, processes)
        agreement = compare(table, again, study.measure)
        if agreement < 1:
            raise ValueError(f"{name}: {agreement:.2%} of the recomputed rows agree, not all: make results")
        confirmed = again[CELL].drop_duplicates().merge(wanted, on=CELL)
        today = table[CELL].merge(confirmed, on=CELL, how="left")["key"].fillna(table["key"])
        rekeyed = table.assign(key=today)
        write(rekeyed, path)
        checksums.record(path)
    return int((today != table["key"]).sum()), len(table) - len(current(rekeyed, wanted))


def with_old_keys(study: Study, table: pd.DataFrame, wanted: pd.DataFrame) -> Study | None:
    """The models, tasks and configurations of which the table has a row whose key is not the wanted one; None for none.

    If all of these configurations are on fewer samples, so is the study.
    """
    both = table[table["model"].isin(list(study.models))].merge(wanted, on=CELL, suffixes=("", "_today"))
    old = both[both["key"] != both["key_today"]]
    if old.empty:
        return None
    moved = {Configuration(*cells) for cells in old[["method", "budget", "arguments"]].itertuples(index=False)}
    configurations, fewer = (tuple(c for c in part if c in moved) for part in (study.configurations, study.fewer))
    models = {model: samples for model, samples in study.models.items() if model in set(old["model"])}
    if not configurations:
        configurations, fewer, models = fewer, (), {model: samples // FEWER for model, samples in models.items()}
    chosen = tuple(task for task in study.tasks if task in set(old["task"]))
    return replace(study, tasks=chosen, models=models, configurations=configurations, fewer=fewer)


def draw(study: Study, count: int, seed: int | None = None) -> list[tuple[str, str, int]]:
    """`count` different (model, task, sample) in random order, or all if there are fewer; by today's seed unless told.

    They come in rounds: each has every task once, and the next one has it on the next model. A model with fewer
    samples drops out when all of them are drawn.
    """
    rng = np.random.default_rng(todays_seed() if seed is None else seed)
    models, names = rng.permutation(list(study.models)).tolist(), rng.permutation(study.tasks).tolist()
    cells = [(models[(i + turn) % len(models)], task) for turn in range(len(models)) for i, task in enumerate(names)]
    orders = [rng.permutation(study.models[model]).tolist() for model, _ in cells]
    rounds = range(max(study.models.values()))
    drawn = [(*cell, order[i]) for i in rounds for cell, order in zip(cells, orders) if i < len(order)]
    return drawn[:count]


def recompute(study: Study, drawn: list[tuple[str, str, int]], load: Callable, processes: int = 1) -> pd.DataFrame:
    """The rows of these samples; `load(model)` gives a model and its tokenizer, and is called once after another."""
    numbers = defaultdict(list)
    for model, task, sample in sorted(drawn):
        numbers[model, task].append(sample)
    cells = [(study, model, task, samples, load) for (model, task), samples in numbers.items()]
    if processes == 1:
        return pd.concat(map(recompute_cell, cells))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pd.concat(pool.imap(recompute_cell, sorted(cells, key=lambda c: tasks.find(c[2]).metric == "exact")))


def recompute_cell(cell: tuple) -> pd.DataFrame:
    """The rows of a model and task's samples."""
    study, name, task, numbers, load = cell
    first, tables = study.models[name] // FEWER if study.fewer else 0, []
    for configurations, chosen in (
        (study.everything, [n for n in numbers if n < first]),
        (study.configurations, [n for n in numbers if n >= first]),
    ):
        if chosen and configurations:
            tables.append(
                MEASURES[study.measure].evaluate(
                    *load(name), configurations, task, study.length, chosen, name=name, protocol=study.protocol
                )
            )
    return pd.concat(tables)


def compare(table: pd.DataFrame, again: pd.DataFrame, measure: str = "answers") -> float:
    """The share of recomputed rows whose value is that of the table, but for rounding if it is no answer.

    Raises:
        ValueError: if a row is missing, if fewer than 97 % agree, if the recomputed values are all in all higher or
            lower, or if another column differs.
    """
    both = again.merge(table, on=[*CELL, "sample"], suffixes=("", "_recorded"), validate="one_to_one")
    if len(both) != len(again):
        raise ValueError(f"the table lacks {len(again) - len(both)} of {len(again)} recomputed rows")
    for column in EXACT:
        found, recorded = both[column], both[f"{column}_recorded"]
        if not (found.eq(recorded) | (found.isna() & recorded.isna())).all():
            raise ValueError(f"{column} differs from what the table records")
    if measure in ALLOWED:
        allowed = ALLOWED[measure](both["value_recorded"])
    else:
        bits = both["task"].map(lambda task: tasks.find(task).metric == "bits")
        allowed = (ROUNDING * both["value_recorded"].abs()).where(bits, 1e-9)
    same = (both["value"] - both["value_recorded"]).abs() <= allowed
    for column, tolerance in COMPARED.items():
        if column not in again:
            continue
        measured, recorded = both[column], both[f"{column}_recorded"]
        if not measured.isna().equals(recorded.isna()):
            raise ValueError(f"{column} is measured where the table has none, or the other way round")
        same &= measured.isna() | ((measured - recorded).abs() <= tolerance(recorded))
    for column in FOLLOWING:
        if column in again:
            same &= both[column] == both[f"{column}_recorded"]
    both["value"] = both["value"].mask(same, both["value_recorded"])  # rounding may point one way
    agreement = float(same.mean())
    if agreement < AGREEMENT:
        raise ValueError(f"only {agreement:.1%} of {len(both)} recomputed rows agree with the table")
    check_mean(both)
    return agreement


def check_mean(both: pd.DataFrame) -> None:
    """Raise ValueError if the 95 % bootstrap interval of the mean of `value - value_recorded` excludes 0.

    What is resampled are samples, in whose shared prefill one close choice may tip for many configurations. Among
    `LEAST` or more, one or two that changed never exclude 0, by however much: a resample has neither of them with a
    probability of (1 - 2 / LEAST) ** LEAST, 6 %, or more. Three or four that all went up do, as does a configuration
    that went up a little in every sample, though 97 % of the rows agree. Fewer samples tell nothing about a mean.
    """
    means = both.groupby(["model", "task", "sample"])[["value", "value_recorded"]].mean()
    if len(means) < LEAST:
        return
    gap = paired_difference([means["value"]], [means["value_recorded"]])
    if gap.low > 0 or gap.high < 0:
        raise ValueError(f"recomputed values differ by {gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}] on average")
