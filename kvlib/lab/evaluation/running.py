"""Perplexity along a text of which every token is decoded, as TidalDecode was tested on books.

Nothing is prefilled but the first token, so all keys and values behind it follow from what the method has read: where
that matters, a method falls behind the further the text goes on (2410.05076, its runs on PG-19). Methods need a budget
in tokens, since a share would be one of the first token; up to as many tokens they read everything.

The text is the beginning of a task's prompt; tasks whose prompts are one text are meant
(`kvlib.lab.tasks.LABEL_FREE`).

Protocols: "tokens 257-512" and so on name the tokens, counted from 1, whose losses a row is the mean of.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch

from kvlib.lab.evaluation.blockwise import check_protocol, table
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, check_window
from kvlib.lab.evaluation.prompts import (
    Prompts,
    compressed,
    full_per_row,
    losses,
    read_per_row,
    stored_per_row,
    window_of,
)
from kvlib.lab.tasks import Prompt

PROTOCOLS = {f"tokens {first}-{last}": (first, last) for first, last in ((65, 256), (257, 512), (513, 1024))}


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = next(iter(PROTOCOLS)),
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    value: bits per token, the mean over the tokens of the protocol; perplexity is two to this power. stored_bytes,
        read_bytes, full_bytes: at the last step, which foretells the last of these tokens.

    Raises:
        ValueError: as there; for budgets that are shares, and for prompts of fewer tokens than the protocol names.
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    first, last = PROTOCOLS[protocol]
    for configuration in configurations:
        if configuration.method != "full" and configuration.budget < 1:
            raise ValueError(f"{configuration.method}, budget={configuration.budget}: here in tokens, not a share")

    def begin(drawn: list[Prompt]) -> Callable:
        ids = beginnings(drawn, last, tokenizer).to(model.device)
        prompts = Prompts(model, ids[:, :1])
        return lambda method: score(method, prompts, ids[:, 1:], first)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


def beginnings(drawn: list[Prompt], tokens: int, tokenizer) -> torch.Tensor:
    """Ids `(batch, tokens)`: so many of each prompt.

    Raises:
        ValueError: for a prompt that has fewer.
    """
    texts = [[token for part in prompt.ids(tokenizer) for token in part] for prompt in drawn]
    if (shortest := min(map(len, texts))) < tokens:
        raise ValueError(f"a prompt of {shortest} tokens: {tokens} are read one by one")
    return torch.tensor([text[:tokens] for text in texts])


@torch.no_grad()
def score(method, prompts: Prompts, targets: torch.Tensor, first: int) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method.

    Args:
        targets: ids `(batch, tokens)` behind the prompts' only token; losses count from the text's `first` token on.
    """
    with compressed(prompts, method) as read:
        nats = losses(read.feed, read.logits, targets, stepwise=True)[:, first - 2 :]
        cache, none = read.run.cache, [math.nan] * len(targets)
        return {
            "value": (nats.double().mean(1) / math.log(2)).tolist(),
            "divergence": none,
            "agreement": none,
            "stored_bytes": stored_per_row(cache),
            "read_bytes": read_per_row(cache),
            "full_bytes": full_per_row(cache),
            "prefill_flops": none if method.own_prefill else prompts.flops,
            "clamped": read.run.clamped_rows.tolist(),
        }
