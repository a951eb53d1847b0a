"""Which layers of a model that was trained with anchors have to keep everything: other full layers than its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvlib.lab.tasks import Prompt
from kvlib.methods.anchorcoder import SETTINGS, AnchorCoder
from kvlib.methods.anchors import anchored


@dataclass(frozen=True)
class FullIn(AnchorCoder):
    """As the checkpoint says, but these layers keep everything, and no others. To be used with `training`."""

    everything: tuple[int, ...] = ()

    def full(self, layer_idx: int) -> bool:
        return layer_idx in self.everything


@torch.no_grad()
def answered(model, tokenizer, prompts: Iterable[Prompt]) -> list[bool]:
    """Of each prompt: is every token of its answer the first choice where those before it are right?

    Anchors are planted, and cannot be chosen. Inside `training(model, method)`.
    """
    settings, begin, right = getattr(model.config, SETTINGS), tokenizer("").input_ids, []
    for prompt in prompts:
        read = anchored(prompt.text.removeprefix(tokenizer.decode(begin)), tokenizer, settings)
        answer = prompt.answer_ids(tokenizer)
        ids = torch.tensor([begin + read + answer], device=model.device)
        logits = model(ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
        logits[:, settings["anchor"]] = -math.inf
        right.append(logits.argmax(-1).tolist() == answer)
    return right
