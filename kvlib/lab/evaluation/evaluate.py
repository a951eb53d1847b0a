"""Evaluation of cache methods on the tasks: one prefill per block of prompts, forked for every method and budget.

The prompt is prefilled and compressed; then the model's first choices at every token of the answer are compared with
it. That is what greedy decoding would give, up to its first mistake, at a fixed cost per sample. Tasks that are judged
by similarity are decoded instead, until their score is certain; of those in bits the answer's losses are added up.
Methods with a prefill of their own get one.

Protocols:
    prompt: the question is part of what is prefilled, so a method that looks at the end of the prompt sees it.
    decoded: the context is prefilled and compressed; then the question is fed token by token.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation.answers import NEW_TOKENS, bits, end_tokens, first_choices, write
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.prompts import Prompts, compressed, device_name, one_by_one, read_per_row, window_of
from kvlib.lab.tasks import Prompt

BLOCK = 4  # prompts per prefill
CELL = ["model", "method", "budget", "arguments", "task", "length", "protocol"]
MEASURED = ("value", "stored_bytes", "read_bytes", "full_bytes", "prefill_flops", "clamped")


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = "prompt",
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration.

    Args:
        samples: sample numbers, which are the tasks' seeds. task, length: what `kvlib.lab.tasks.sample` draws.
        name: the model's name for the table; block: prompts per prefill (left-padded; 1 in the protocol "decoded").
        progress: wraps the list of blocks, for example `tqdm`.

    Returns:
        columns model, method, budget, arguments, task, length, protocol, sample, value (1 = right; of long answers the
        share of lines before the first mistake, of lines of code their similarity, of text bits per character),
        stored_bytes (K and V after the prompt), read_bytes (K and V in the first decode step: what is stored, unless
        the method reads sparsely), full_bytes, prefill_flops (NaN for methods with a prefill of their own, whose work
        nothing tells), clamped, torch, device.

        Exact match is value == 1 for lines of code too: below 100 characters nothing else rounds to 1.

    Raises:
        ValueError: for an unknown task or protocol, or if `length` exceeds the model's window.
    """
    check_window(window_of(model), length)
    samples, rows = list(samples), []
    size = 1 if protocol == "decoded" else block  # questions differ in length
    for numbers in progress([samples[i : i + size] for i in range(0, len(samples), size)]):
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        prompts, question = prepare(model, tokenizer, drawn, protocol)
        for configuration in configurations:
            columns = score(configuration.make(), prompts, question, drawn, tokenizer)
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


def prepare(model, tokenizer, drawn: list[Prompt], protocol: str) -> tuple[Prompts, torch.Tensor]:
    """The prompts, or their contexts, and the ids `(batch, tokens)` of the questions that are still to be fed."""
    parts = [prompt.ids(tokenizer) for prompt in drawn]
    rows = [[*c, *q, *lead] if protocol == "prompt" else c for c, q, lead in parts]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    prompts = Prompts(model, inputs.input_ids, inputs.attention_mask)
    if protocol == "prompt":
        return prompts, inputs.input_ids[:, :0]
    return prompts, torch.tensor([[*q, *lead] for _, q, lead in parts], device=model.device)


@torch.no_grad()
def score(method, prompts: Prompts, question: torch.Tensor, drawn: list[Prompt], tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    model, reads = prompts.model, []
    with compressed(prompts, method) as read:

        def feed(ids: torch.Tensor) -> torch.Tensor:
            """Logits `(batch, tokens, vocabulary)` after a pass over the ids of tokens."""
            logits = read.feed(ids)
            if method.hooks("attend") and not reads:
                reads.extend(read_per_row(read.run.cache))
            return logits

        logits = read.logits
        for token in question.unbind(1):
            logits = feed(token[:, None])[:, -1]
        window = window_of(model)
        left = [math.inf if window is None else window - n - question.shape[1] for n in prompts.counts]
        metric = tasks.find(drawn[0].task).metric
        answers = [prompt.answer_ids(tokenizer) for prompt in drawn]
        # Shorter answers are filled up, which one pass would count as part of a prompt that is too long.
        stepwise = one_by_one(method) or max(map(len, answers)) > min(left)
        if metric == "similarity":
            written = write(
                feed, read.keep, logits, tokenizer, end_tokens(model), [min(NEW_TOKENS, n + 1) for n in left]
            )
            values = [tasks.score(prompt, text) for prompt, text in zip(drawn, written)]
        elif metric == "bits":
            values = bits(feed, logits, answers, [len(s.answer) for s in drawn], stepwise)
        else:
            chosen = first_choices(feed, read.keep, logits, answers, stepwise)
            values = [tasks.judge(prompt, row, tokenizer) for prompt, row in zip(drawn, chosen)]
        if method.hooks("attend") and not reads:
            feed(logits.argmax(-1)[:, None])  # nothing was fed, because the first choice decided
    dense = [math.nan] * len(drawn) if method.own_prefill else prompts.flops
    return {
        "value": values,
        "stored_bytes": read.stored,
        "read_bytes": reads or read.stored,
        "full_bytes": read.full,
        "prefill_flops": dense,
        "clamped": read.clamped,
    }
