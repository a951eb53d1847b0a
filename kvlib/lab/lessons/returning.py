"""Texts of which every token is decoded: a story that goes on, or a passage of it that returns."""

import math

import torch

import kvlib
from kvlib.lab.evaluation.prompts import Prompts, compressed, losses, one_by_one


def passages(text: list[int], tokens: int) -> tuple[list[int], list[int], int]:
    """The beginning of a text, and the same with the passage before the last three eighths in their place.

    Args:
        text: ids, at least `tokens`. tokens: length of both results, a multiple of 8.

    Returns:
        (goes on, returns, how many tokens they share in front); a token that returns stands 3/8 of `tokens` behind
        where it stood first.
    """
    shared, again = 5 * tokens // 8, 3 * tokens // 8
    return text[:tokens], text[:shared] + text[shared - again : shared], shared


def bits(model, ids: torch.Tensor, method: str, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits of every token but the first, `(batch, tokens - 1)` in float64, all of them decoded with one method.

    A method that computes the same for tokens that come together, as the full cache does, reads them in one pass.

    Args:
        ids: `(batch, tokens)`. arguments: of `kvlib.method`.

    Returns:
        (bits; logits of the second token, `(batch, vocabulary)`), both on the CPU.
    """
    made = kvlib.method(method, **arguments)
    with compressed(Prompts(model, ids[:, :1]), made) as read:
        nats = losses(read.feed, read.logits, ids[:, 1:], one_by_one(made))
        return nats.double().cpu() / math.log(2), read.logits.double().cpu()
