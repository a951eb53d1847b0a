"""Evaluation of cache methods on the tasks: one prefill per block of prompts, forked for every method and budget.

What a prompt says is read in two parts. The first is prefilled and compressed; the second is fed behind it in one pass,
in which nothing is evicted, and the model's answer follows. So no token of an answer is chosen before the eviction.

Protocols:
    asked: the first part is context and question, the second how the answer begins. A method that looks at the end of
        the prompt sees the question.
    later: the first part is the context alone, the second the question too. Nothing more is evicted unless a method
        evicts while decoding.

Answers are judged by the metric of their family (`kvlib.lab.tasks.Family`): "exact" and "bits" by feeding the right
answer, which gives what greedy decoding would give up to its first mistake, at a fixed cost; "share" and "similarity"
by what greedy decoding writes; "reference" by what the full cache has written.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation.answers import NEW_TOKENS, compare, first_choices, write
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.metrics import is_decided
from kvlib.lab.evaluation.prompts import Prompts, compressed, device_name, one_by_one, padded, read_per_row, window_of
from kvlib.lab.evaluation.reference import Reference
from kvlib.lab.tasks import Prompt
from kvlib.verified import end_tokens

PROTOCOLS = ("asked", "later")
BLOCK = 4  # prompts per prefill
CELL = ["model", "method", "budget", "arguments", "task", "length", "protocol"]
MEASURED = (
    "value", "divergence", "agreement", "stored_bytes", "read_bytes", "full_bytes", "prefill_flops", "clamped",
)  # fmt: skip


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = "asked",
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration.

    Args:
        samples: sample numbers, which are the tasks' seeds. task, length: what `kvlib.lab.tasks.sample` draws.
        name: the model's name for the table; block: prompts per prefill (left-padded).
        progress: wraps the list of blocks, for example `tqdm`.

    Returns:
        columns model, method, budget, arguments, task, length, protocol, sample,
        value: 1 = right; of several answers or lines the share; of lines of code their similarity, of text bits per
            character; 1 = the answer of the full cache to the last token where that is what is asked for.
        divergence, agreement: over the tokens of a text, or of the full cache's answer, the mean Kullback-Leibler
            divergence in nats of the method's distribution from the full cache's, and the share of equal first choices;
            NaN where an answer is known.
        stored_bytes (K and V when the prompt has been compressed), read_bytes (K and V in the first decode step: what
        is stored then, unless the method reads sparsely), full_bytes, prefill_flops (NaN for methods with a prefill of
        their own, whose work nothing tells), clamped, torch, device.

        Exact match is value == 1 for lines of code too: below 100 characters nothing else rounds to 1.

    Raises:
        ValueError: for an unknown task or protocol, or if `length` exceeds the model's window.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: {' or '.join(PROTOCOLS)}")
    check_window(window_of(model), length)
    samples, rows = list(samples), []
    for numbers in progress([samples[i : i + block] for i in range(0, len(samples), block)]):
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        prompts, rest = prepare(model, tokenizer, drawn, protocol)
        reference = Reference(prompts, rest)
        for configuration in configurations:
            columns = score(configuration.make(), prompts, rest, drawn, tokenizer, reference)
            rows += [
                {**asdict(configuration), "sample": number, **dict(zip(columns, cells))}
                for number, *cells in zip(numbers, *columns.values())
            ]
    table = pd.DataFrame(rows).assign(
        model=name, task=task, length=length, protocol=protocol, torch=torch.__version__, device=device_name(model)
    )
    return table[[*CELL, "sample", *MEASURED, "torch", "device"]]


def check_window(window: int | None, length: int) -> None:
    if window is not None and length > window:
        raise ValueError(f"length={length}: the model's window is {window} tokens")


def prepare(model, tokenizer, drawn: list[Prompt], protocol: str) -> tuple[Prompts, tuple[torch.Tensor, torch.Tensor]]:
    """What is compressed, and ids and mask `(batch, tokens)` of what is fed behind it, both padded on the left."""
    cut = [prompt.ids(tokenizer) for prompt in drawn]
    if protocol == "asked":
        cut = [(context + question, lead) for context, question, lead in cut]
    else:
        cut = [(context, question + lead) for context, question, lead in cut]
    first, rest = (padded(part, model.device) for part in zip(*cut))
    return Prompts(model, *first), rest


@torch.no_grad()
def score(
    method, prompts: Prompts, rest: tuple, drawn: list[Prompt], tokenizer, reference: Reference
) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    model, family, reads, none = prompts.model, tasks.find(drawn[0].task), [], [math.nan] * len(drawn)
    ends, divergence, agreement = end_tokens(model), none, none
    with compressed(prompts, method) as read:

        def feed(ids: torch.Tensor) -> torch.Tensor:
            """Logits `(batch, tokens, vocabulary)` after a pass over the ids of tokens."""
            logits = read.feed(ids)
            if method.hooks("attend") and not reads:
                reads.extend(read_per_row(read.run.cache))
            return logits

        logits = read.follow(*rest)
        window, behind = window_of(model), rest[1].sum(1).tolist()
        left = [math.inf if window is None else window - sum(counts) for counts in zip(prompts.counts, behind)]
        if family.metric in ("share", "similarity"):
            lines = family.metric == "similarity"
            most = [NEW_TOKENS if lines else tasks.new_tokens(prompt, tokenizer) for prompt in drawn]
            most = [min(n, room + 1) for n, room in zip(most, left)]
            texts = write(feed, read.keep, logits, tokenizer, ends, most, is_decided if lines else None)
            values = [tasks.score(*pair) for pair in zip(drawn, texts)]
        else:
            answers = (
                reference.written(ends) if family.metric == "reference" else [p.answer_ids(tokenizer) for p in drawn]
            )
            # Shorter answers are filled up, which one pass would count as part of a prompt that is too long.
            stepwise = one_by_one(method) or max(map(len, answers)) > min(left)
            if family.metric == "exact":
                chosen = first_choices(feed, read.keep, logits, answers, stepwise)
                values = [tasks.judge(prompt, row, tokenizer) for prompt, row in zip(drawn, chosen)]
            else:
                nats, divergence, agreement = compare(
                    feed, logits, answers, reference.log_probabilities(answers), stepwise
                )
                if family.metric == "bits":
                    values = [n / len(p.answer) / math.log(2) for n, p in zip(nats, drawn)]
                else:
                    values = [float(share == 1) for share in agreement]
        if method.hooks("attend") and not reads:
            feed(logits.argmax(-1)[:, None])  # nothing was fed, because the first choice decided
    return {
        "value": values,
        "divergence": divergence,
        "agreement": agreement,
        "stored_bytes": read.stored,
        "read_bytes": reads or read.stored,
        "full_bytes": read.full,
        "prefill_flops": none if method.own_prefill else prompts.flops,
        "clamped": read.clamped,
    }
