"""What a model makes of answers inside an open block: its first choices, its losses, what it writes itself."""

import math
from collections.abc import Callable

import torch

from kvlib.lab.evaluation.metrics import is_decided
from kvlib.lab.evaluation.prompts import losses

NEW_TOKENS = 64  # as LongBench allows for its code tasks; the longest answer has 60 of minilm's


def first_choices(
    feed: Callable, keep: Callable, logits: torch.Tensor, answers: list[list[int]], stepwise: bool
) -> list[list[int]]:
    """The model's first choice at every token of each answer, after those before it, and behind it; -1 if not asked.

    Args:
        keep: drops all but these rows. logits: `(batch, vocabulary)` before the answers.
        stepwise: feed a token a pass, until every row has made its first mistake, instead of all in one.
    """
    fed = filled(answers, logits.device)
    chosen = torch.full((len(fed), fed.shape[1] + 1), -1, device=fed.device)
    chosen[:, 0] = logits.argmax(-1)
    if not stepwise:
        chosen[:, 1:] = feed(fed).argmax(-1)
        return chosen.tolist()
    rows = torch.arange(len(fed), device=fed.device)
    for place, tokens in enumerate(fed.unbind(1)):
        right = (chosen[rows, place] == tokens[rows]).nonzero().squeeze(1)
        if not len(right):
            break
        chosen[rows, place + 1] = feed(tokens[rows, None])[:, -1].argmax(-1)
        if len(right) < len(rows):
            keep(right)
            rows = rows[right]
    return chosen.tolist()


def filled(answers: list[list[int]], device) -> torch.Tensor:
    """Ids `(batch, tokens)`, shorter answers with 0 behind them."""
    longest = max(map(len, answers))
    return torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=device)


def bits(
    feed: Callable, logits: torch.Tensor, answers: list[list[int]], characters: list[int], stepwise: bool
) -> list[float]:
    """Bits per character of each answer; arguments as for `first_choices`."""
    nats = losses(feed, logits, filled(answers, logits.device), stepwise).double().cpu()
    sums = [row[: len(answer)].sum().item() for row, answer in zip(nats, answers)]
    return [total / count / math.log(2) for total, count in zip(sums, characters)]


def write(
    feed: Callable, keep: Callable, logits: torch.Tensor, tokenizer, ends: set[int], most: list[int]
) -> list[str]:
    """What greedy decoding writes, until `code_similarity` is decided: a text for every row.

    Args:
        keep: drops all but these rows. logits: `(batch, vocabulary)` before the first token.
        ends: ids that end a text. most: tokens of each row.
    """
    ids: list[list[int]] = [[] for _ in most]
    texts, rows = [""] * len(most), list(range(len(most)))
    while True:
        chosen, stay = logits.argmax(-1), []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist())):
            ids[row].append(token)
            texts[row] = tokenizer.decode(ids[row], skip_special_tokens=True)
            if not (len(ids[row]) == most[row] or token in ends or is_decided(texts[row])):
                stay.append(place)
        if not stay:
            return texts
        logits = feed(chosen[:, None])[:, -1]  # all, since what the first decode step reads is noted for every row
        if len(stay) < len(rows):
            keep(torch.tensor(stay))
            logits, rows = logits[stay], [rows[place] for place in stay]


def end_tokens(model) -> set[int]:
    """Ids at which `generate` would stop."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}
