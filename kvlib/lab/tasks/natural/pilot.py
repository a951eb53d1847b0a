"""`python -m kvlib.lab.tasks.natural.pilot FOLDER`: which families a model can answer, with what is lost by eviction.

Every family is drawn at each length. The full cache answers, and so do methods at a fifth of it: all but the last token
of a prompt is read and compressed, then the last token is fed, so that no answer token is chosen before. Answers are
greedy. Rows are kept family by family (a second run goes on where one stopped); `pilot.csv` is their summary with the
verdict of `passes`.
"""

import argparse
import os
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib.lab import tasks
from kvlib.lab.evaluation import stepwise
from kvlib.lab.evaluation.blockwise import divided
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.tasks import Prompt, natural

FULL = Configuration("full", 1.0)
EVICTING = (Configuration("snapkv", 0.2), Configuration("streaming_llm", 0.2))
LENGTHS, SAMPLES, BLOCK = (2048, 4096), 100, 25
LOW, HIGH, ERRORS = 0.15, 0.98, 2.0


def passes(full: np.ndarray, evicted: list[np.ndarray], guess: float) -> bool:
    """Whether a family tells methods apart at a length.

    The full cache scores 15-98 %, or more and a method at a fifth of it loses. It has to be better than guessing, and
    the loss above 0, by two standard errors, which for losses are those of paired differences.

    Args:
        full: score of each sample with the full cache. evicted: of the same samples under each method.
    """
    if full.mean() < LOW or not exceeds(full - guess):
        return False
    return bool(full.mean() <= HIGH) or any(exceeds(full - scores) for scores in evicted)


def exceeds(values: np.ndarray) -> bool:
    """Whether their mean is above 0 by two standard errors."""
    return bool(values.mean() > ERRORS * values.std(ddof=1) / len(values) ** 0.5)


def measure(model, tokenizer, drawn: list[Prompt], block: int) -> pd.DataFrame:
    """One row per prompt and configuration: task, length, sample, method, budget, value."""
    found = []
    for begin in range(0, len(drawn), block):
        part = drawn[begin : begin + block]
        prompts, last = divided(model, tokenizer, part, 1)
        for configuration in (FULL, *EVICTING):
            values = stepwise.score(configuration.make(), prompts, last, part, tokenizer)["value"]
            found += [
                (prompt.task, prompt.seed, configuration.method, configuration.budget, value)
                for prompt, value in zip(part, values)
            ]
    return pd.DataFrame(found, columns=["task", "sample", "method", "budget", "value"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """For each family and length the means, and whether it passes there; `stays` if it does at one of them."""
    rows = []
    for (task, length), cell in table.groupby(["task", "length"], sort=False):
        scores = cell.pivot(index="sample", columns="method", values="value")
        family = tasks.find(task)
        evicted = [scores[configuration.method].to_numpy() for configuration in EVICTING]
        verdict = passes(scores["full"].to_numpy(), evicted, family.guess)
        means = {name: round(scores[name].mean(), 4) for name in ("full", *(c.method for c in EVICTING))}
        rows.append(
            {"task": task, "group": family.group, "metric": family.metric, "guess": round(family.guess, 4)}
            | {"length": length, "samples": len(scores), **means, "passes": verdict}
        )
    found = pd.DataFrame(rows)
    return found.assign(stays=found.groupby("task")["passes"].transform("any"))


def main() -> None:
    parser = argparse.ArgumentParser("python -m kvlib.lab.tasks.natural.pilot", description=__doc__)
    parser.add_argument("folder", type=Path, help="where rows and summary go")
    parser.add_argument("--model", default="smollm2", help="what `kvlib.load` takes")
    parser.add_argument("--tasks", nargs="+", default=list(natural.FAMILIES), help="families (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="prompts of each family and length")
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts of 2048 tokens that are read together")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that draw prompts share the cores
    model, tokenizer = kvlib.load(arguments.model, dtype=torch.float32)
    cells = {
        file: (task, length)
        for length in arguments.lengths
        for task in arguments.tasks
        if not (file := arguments.folder / f"{task}-{length}.parquet").exists()
    }
    asked = [(task, length, number) for task, length in cells.values() for number in range(arguments.samples)]
    with get_context("fork").Pool() as pool:  # before the model is on a device, which does not survive a fork
        drawn = iter(pool.starmap(partial(tasks.sample, tokenizer=tokenizer), asked, chunksize=arguments.samples))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for file, (_, length) in tqdm(cells.items(), disable=None):
        prompts = [next(drawn) for _ in range(arguments.samples)]
        table = measure(model, tokenizer, prompts, max(1, arguments.block * 2048 // length)).assign(length=length)
        table.to_parquet(part := file.with_suffix(".part"))
        part.rename(file)
    found = summary(pd.concat(map(pd.read_parquet, sorted(arguments.folder.glob("*-*.parquet")))))
    found.to_csv(arguments.folder / "pilot.csv", index=False)
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
