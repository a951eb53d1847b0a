"""The measure "benchmarks": published questions, answered by a model with a compressed cache."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial

import pandas as pd
import torch
from transformers import StoppingCriteriaList

from kvlib.lab.evaluation.benchmarks.loading import data
from kvlib.lab.evaluation.benchmarks.questions import Question, find
from kvlib.lab.evaluation.blockwise import check_protocol
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import CELL, MEASURED
from kvlib.lab.evaluation.prompts import device_name, prefill_flops, window_of

PROTOCOLS = ("asked",)
EXTRA = ("prediction",)


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
    block: int = 1,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    task: one of `kvlib.lab.evaluation.benchmarks.questions.TASKS`. length: the most tokens of a prompt, of RULER of
    prompt and answer. block: without meaning, prompts are read one by one. value: the publishers' score, from 0 to 1.
    prediction: what the model has written.

    Raises:
        ValueError: for an unknown task or protocol, and if prompt and answer exceed the model's window.
        Others: as of `kvlib.lab.evaluation.benchmarks.load`.
    """
    check_protocol(protocol, PROTOCOLS)
    samples, found, rows = list(samples), find(task), []
    questions = found.ask(data(found.read), samples, tokenizer, length, window_of(model))
    for sample, question in progress(list(zip(samples, questions, strict=True))):
        for configuration in configurations:
            answered = answer(model, tokenizer, configuration, question)
            rows.append({**asdict(configuration), "sample": sample, **answered})
    made = pd.DataFrame(rows).assign(
        model=name, task=task, length=length, protocol=protocol, torch=torch.__version__, device=device_name(model)
    )
    return made[[*CELL, "sample", *MEASURED, *EXTRA, "torch", "device"]]


def answer(model, tokenizer, configuration: Configuration, question: Question) -> dict:
    """What is measured of one row.

    All but the prompt's last token is read and compressed. The last one is fed behind that, so that the token which
    begins the answer is chosen after the eviction, where authors' scripts take it from the full cache. Greedy decoding
    follows, up to the question's most tokens or one of its ends, which prediction still has.
    read_bytes: K and V read in the last pass. With the method "full" the answer is that of stock `generate`.

    Raises:
        ValueError: if prompt and answer exceed the model's window.
    """
    method, window = configuration.make(), window_of(model)
    ids = torch.tensor([ids_of(question, tokenizer)], device=model.device)
    if window is not None and ids.shape[1] + question.max_new_tokens > window:
        raise ValueError(
            f"{ids.shape[1]} tokens and {question.max_new_tokens} of an answer: the model's window is {window} tokens"
        )
    with method(model) as run:
        run.read(input_ids=ids[:, :-1])
        stored, full, clamped = run.stored_bytes(), run.full_bytes(), bool(run.clamped_rows.any())
        written = run.ask(
            ids[:, -1:],
            max_new_tokens=question.max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([partial(has_ended, tokenizer, question.ends)]),
        )[0, 1:]
        read = run.read_bytes()
    prediction = tokenizer.decode(written, skip_special_tokens=True)
    return {
        "value": question.judge(prediction),
        "divergence": math.nan,
        "agreement": math.nan,
        "stored_bytes": stored,
        "read_bytes": read,
        "full_bytes": full,
        "prefill_flops": math.nan if method.own_prefill else prefill_flops(model, ids.shape[1] - 1),
        "clamped": clamped,
        "prediction": prediction,
    }


def ids_of(question: Question, tokenizer) -> list[int]:
    """Ids of a question, in the model's own chat template where the benchmark wants one and the model has one."""
    if question.chat and tokenizer.chat_template:
        said = [{"role": "user", "content": question.prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return tokenizer(text + question.lead, add_special_tokens=False).input_ids
    return tokenizer(question.prompt + question.lead).input_ids


def has_ended(tokenizer, ends: Sequence[str], ids: torch.Tensor, scores: object) -> torch.Tensor:
    """Whether an answer, behind the prompt's last token, has one of the ends: a criterion for `generate`."""
    text = tokenizer.decode(ids[0, 1:], skip_special_tokens=True).lstrip("\n")
    return torch.tensor([any(end in text for end in ends)], device=ids.device)
