"""Texts that are decoded token by token: a story that goes on, or a passage of it that returns."""

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


def bits(model, ids: torch.Tensor, first: int, method: str, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits of every token behind the first ones, `(batch, tokens - first)` in float64, decoded with one method.

    A method that computes the same for tokens that come together, as the full cache does, reads them in one pass.

    Args:
        ids: `(batch, tokens)`.
        first: how many are read in one pass. As long as they fit the method's budget that is decoding them, but faster.
        arguments: of `kvlib.method`.

    Returns:
        (bits; logits of the token behind the first ones, `(batch, vocabulary)`), both on the CPU.
    """
    made = kvlib.method(method, **arguments)
    with compressed(Prompts(model, ids[:, :first]), made) as read:
        nats = losses(read.feed, read.logits, ids[:, first:], one_by_one(made))
        return nats.double().cpu() / math.log(2), read.logits.double().cpu()
