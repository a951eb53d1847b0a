"""Functions that models write, judged by running them: models trained with anchors, and others at as many bytes.

Decoding is greedy; a completion ends where `kvlib.lab.functions.cut` ends it. What models read, and the protocols, are
those of `kvlib.lab.evaluation.arms`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation import arms
from kvlib.lab.evaluation.anchored import written
from kvlib.lab.evaluation.arms import PLANTED, Asked, costs
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.evaluation.prompts import Compressed, compressed, stored_per_row
from kvlib.lab.functions import cut, run_all
from kvlib.lab.functions.problems import Problem
from kvlib.lab.tasks import Prompt

EXTRA = ("outcome", "peak_bytes", "end_bytes")
NEW_TOKENS = 256  # of a function, as the authors allow


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = PLANTED,
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    length: the most tokens of a prompt with its reference. value: 1 = passed. outcome: how the function fared, one of
    `kvlib.lab.functions.KINDS`. stored_bytes: at the end of the prompt; peak_bytes: the most after any token from there
    on; end_bytes: when the last one is chosen. full_bytes, read_bytes: as in `kvlib.lab.evaluation.anchored`.

    Raises:
        ValueError: as `kvlib.lab.evaluation.arms.table`, and for families that are not judged by "run".
    """
    if (metric := tasks.find(task).metric) != "run":
        raise ValueError(f"{task} is judged by {metric!r}, not by 'run'")
    return arms.table(
        score, EXTRA, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def score(method, asked: Asked, tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    none, problems = [math.nan] * len(asked.drawn), [problem_of(prompt) for prompt in asked.drawn]
    return {"divergence": none, "agreement": none, **run_written(method, asked, problems, tokenizer)}


def run_written(method, asked: Asked, problems: Sequence[Problem], tokenizer) -> dict[str, list]:
    """Value, what it costs, and `EXTRA`, of what a model writes for problems with these prompts."""
    with compressed(asked.prompts, method) as read:
        logits = asked.logits(read)
        found, metered = costs(method, asked, read), Metered(read)
        texts = written(metered, logits, asked, NEW_TOKENS, tokenizer, is_complete)
        metered.note()
    outcomes = run_all(problems, [completion(text) for text in texts])
    return {
        "value": [float(outcome.passed) for outcome in outcomes],
        **found,
        "outcome": [outcome.kind for outcome in outcomes],
        "peak_bytes": metered.peak,
        "end_bytes": metered.end,
    }


def problem_of(prompt: Prompt) -> Problem:
    """The problem of a prompt."""
    return without_newline(tasks.find(prompt.task).make(prompt.seed))


def without_newline(problem: Problem) -> Problem:
    """A problem whose prompt leaves out the newline behind the docstring: `kvlib.lab.tasks.written` says why."""
    return replace(problem, prompt=problem.prompt.removesuffix("\n"))


def completion(text: str) -> str:
    """The part of a text that belongs to the function; before it stands the newline that a prompt leaves out."""
    body = text.removeprefix("\n")
    return text[: len(text) - len(body)] + cut(body)


def is_complete(text: str) -> bool:
    """Whether more text would belong to the function no more. Of a line that has not ended nothing is known."""
    lines = text.removeprefix("\n").rpartition("\n")
    ended = lines[0] + lines[1]
    return cut(ended) != ended


class Metered:
    """An open block whose bytes of each row are noted after every token: the most, and the latest.

    A row's last token is not read, since nothing follows it; in a block it may be, and is not noted.
    """

    def __init__(self, read: Compressed):
        self.read, self.sizes = read, stored_per_row(read.run.cache)
        self.rows, self.end, self.peak = list(range(len(self.sizes))), list(self.sizes), list(self.sizes)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        self.note()
        logits = self.read.feed(ids)
        self.sizes = stored_per_row(self.read.run.cache)
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        self.rows, self.sizes = ([each[place] for place in rows.tolist()] for each in (self.rows, self.sizes))
        self.read.keep(rows)

    def note(self) -> None:
        """Note what the latest token has left, of the rows that go on behind it."""
        for row, size in zip(self.rows, self.sizes, strict=True):
            self.end[row], self.peak[row] = size, max(self.peak[row], size)

    @property
    def run(self):
        return self.read.run
