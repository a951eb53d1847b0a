"""Answers to questions that arrive one token at a time, like everything that is decoded.

Under the protocol *later* of `kvlib.lab.evaluation.evaluate` a question is read in one pass. Methods that read sparsely
read it densely, so that its tokens have seen everything before an answer is decoded, which flatters them.

Protocol:
    later-stepwise: the prompt but for its last `STEPS` tokens is read and compressed; these come one by one, then the
        answer. Methods that read sparsely do so from the first of them on. Those that evict while decoding go on
        evicting; all others store these tokens beside what they have kept.

How many tokens come one by one is the same for all prompts, so that no row depends on its company in a block. Questions
and how their answers begin have 8 to 55 tokens, so the end of the context is among the tokens that are fed; but in
`repeated_line` they have up to 93, and a question's beginning may be read before anything is evicted.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation.answers import first_choices, write
from kvlib.lab.evaluation.blockwise import check_protocol, costs, divided, table
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, check_window
from kvlib.lab.evaluation.prompts import Prompts, compressed, one_by_one, window_of
from kvlib.lab.tasks import Prompt
from kvlib.verified import end_tokens

PROTOCOLS = ("later-stepwise",)
STEPS = 64  # tokens
JUDGED = ("exact", "share")  # metrics


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = PROTOCOLS[0],
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    value: 1 = right; of several answers or lines the share. read_bytes: in the first decode step, of the question.

    Raises:
        ValueError: as there; for a family that is not judged by "exact" or "share"; for prompts of `STEPS` tokens.
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    if (metric := tasks.find(task).metric) not in JUDGED:
        raise ValueError(f"{task} is judged by {metric!r}, not by {' or '.join(map(repr, JUDGED))}")

    def begin(drawn: list[Prompt]) -> Callable:
        prompts, last = divided(model, tokenizer, drawn, STEPS)
        return lambda method: score(method, prompts, last, drawn, tokenizer)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def score(method, prompts: Prompts, last: torch.Tensor, drawn: list[Prompt], tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method.

    Args:
        last: ids `(batch, steps)` of the prompts' last tokens, which are fed one by one.
    """
    with compressed(prompts, method) as read:
        for step, tokens in enumerate(last.split(1, dim=1)):
            logits = read.feed(tokens)[:, -1]
            if step == 0:
                found = costs(method, prompts, read)
        window, steps = window_of(prompts.model), last.shape[1]
        left = [math.inf if window is None else window - count - steps for count in prompts.counts]
        if tasks.find(drawn[0].task).metric == "share":
            most = [min(tasks.new_tokens(prompt, tokenizer), room + 1) for prompt, room in zip(drawn, left)]
            texts = write(read.feed, read.keep, logits, tokenizer, end_tokens(prompts.model), most)
            values = [tasks.score(*pair) for pair in zip(drawn, texts)]
        else:
            answers = [prompt.answer_ids(tokenizer) for prompt in drawn]
            # Shorter answers are filled up, which one pass would count as part of a prompt that is too long.
            stepwise = one_by_one(method) or max(map(len, answers)) > min(left)
            chosen = first_choices(read.feed, read.keep, logits, answers, stepwise)
            values = [tasks.judge(prompt, row, tokenizer) for prompt, row in zip(drawn, chosen)]
    none = [math.nan] * len(drawn)
    return {"value": values, "divergence": none, "agreement": none, **found}
