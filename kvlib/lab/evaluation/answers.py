"""What a model makes of answers inside an open block: its first choices, its distributions, what it writes itself."""

from collections.abc import Callable

import torch

from kvlib.lab.evaluation.prompts import nats, predictions

NEW_TOKENS = 64  # of a line of code, as LongBench allows; the longest answer has 60 of minilm's


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


def compare(
    feed: Callable, logits: torch.Tensor, answers: list[list[int]], expected: torch.Tensor, stepwise: bool
) -> tuple[list[float], list[float], list[float]]:
    """Nats that each answer costs, divergence from the full cache's distributions, share of equal first choices.

    Args:
        expected: log-probabilities `(batch, tokens, vocabulary)` of the full cache at the first tokens of the answers,
            over which the last two are means. The others as for `first_choices`.
    """
    costs, divergences, same, seen = [], [], [], 0
    for found, targets in predictions(feed, logits, filled(answers, logits.device), stepwise):
        costs.append(nats(found, targets).double())
        theirs = expected[:, seen : seen + targets.shape[1]]
        found = found[:, : theirs.shape[1]].to(theirs.dtype).log_softmax(-1)
        divergences.append((theirs.exp() * (theirs - found)).sum(-1).double())
        same.append((theirs.argmax(-1) == found.argmax(-1)).double())
        seen += targets.shape[1]
    counts = [len(answer) for answer in answers]

    def rows(parts: list[torch.Tensor]) -> list[list[float]]:
        return [row[:count] for row, count in zip(torch.cat(parts, dim=1).tolist(), counts)]

    means = ([sum(row) / len(row) for row in rows(parts)] for parts in (divergences, same))
    return [sum(row) for row in rows(costs)], *means


def write(
    feed: Callable,
    keep: Callable,
    logits: torch.Tensor,
    tokenizer,
    ends: set[int],
    most: list[int],
    decided: Callable[[str], bool] | None = None,
) -> list[str]:
    """What greedy decoding writes: a text for every row; arguments as for `greedy`.

    Args:
        decided: whether more text than this would change nothing.
    """

    def done(ids: list[int]) -> bool:
        return decided is not None and decided(tokenizer.decode(ids, skip_special_tokens=True))

    written = greedy(feed, keep, logits, ends, most, done)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def greedy(
    feed: Callable,
    keep: Callable,
    logits: torch.Tensor,
    ends: set[int],
    most: list[int],
    done: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
    """What greedy decoding writes: ids for every row, with the token that ends them.

    Args:
        keep: drops all but these rows. logits: `(batch, vocabulary)` before the first token.
        ends: ids that end a text. most: tokens of each row. done: whether these ids are all that is asked for.
    """
    written: list[list[int]] = [[] for _ in most]
    rows = list(range(len(most)))
    while True:
        chosen, stay = logits.argmax(-1), []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist())):
            ids = written[row]
            ids.append(token)
            if not (len(ids) == most[row] or token in ends or done(ids)):
                stay.append(place)
        if not stay:
            return written
        logits = feed(chosen[:, None])[:, -1]  # all, since what the first decode step reads is noted for every row
        if len(stay) < len(rows):
            keep(torch.tensor(stay))
            logits, rows = logits[stay], [rows[place] for place in stay]
