"""What the full cache makes of a block of prompts: what methods are compared with where no answer is known."""

from dataclasses import dataclass, field

import torch

import kvlib
from kvlib.lab.evaluation.answers import filled, greedy
from kvlib.lab.evaluation.prompts import Prompts, compressed, predictions

COMPARED = 64  # tokens


@dataclass
class Reference:
    """For one block. rest: ids and mask `(batch, tokens)` of what is fed behind the prompts."""

    prompts: Prompts
    rest: tuple[torch.Tensor, torch.Tensor]
    _written: list | None = field(default=None, init=False)
    _choices: torch.Tensor | None = field(default=None, init=False)

    def written(self, ends: set[int]) -> list[list[int]]:
        """Ids of the answers that greedy decoding gives, `COMPARED` at most, with the token that ends them."""
        if self._written is None:
            with compressed(self.prompts, kvlib.method("full")) as read:
                logits = read.follow(*self.rest)
                most = [COMPARED] * len(logits)
                self._written = greedy(read.feed, read.keep, logits, ends, most)
        return self._written

    def log_probabilities(self, answers: list[list[int]]) -> torch.Tensor:
        """`(batch, tokens, vocabulary)` at the first `COMPARED` tokens of the answers of this block."""
        if self._choices is None:
            with compressed(self.prompts, kvlib.method("full")) as read:
                logits = read.follow(*self.rest)
                targets = filled(answers, logits.device)[:, :COMPARED]
                found = [each for each, _ in predictions(read.feed, logits, targets, stepwise=False)]
                self._choices = torch.cat(found, dim=1).float().log_softmax(-1)
        return self._choices
