"""How a model copies an answer from its prompt: which heads look at the token to be copied, and whose sets hold it."""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from kvlib.lab.lessons import excerpts, selections
from kvlib.lab.lessons.prefills import prefill


def writing(model, tokenizer, prompt, budget: float | int) -> tuple[list[tuple[torch.Tensor, dict]], list[int]]:
    """The steps of full attention that write an answer, one for each of its tokens that stands in the prompt.

    Args:
        prompt: of `kvlib.lab.tasks.sample`. budget: as of TidalDecode.

    Returns:
        (steps as of `selections.trace`; positions of the tokens that these steps copy)
    """
    ids = [token for part in prompt.ids(tokenizer) for token in part]
    answer, places = prompt.answer_ids(tokenizer), excerpts.answer_places(prompt, tokenizer)
    steps = selections.trace(model, prefill(model, ids[:-1]), [ids[-1], *answer[:-1]], budget)
    return steps[-len(places) :], places


def copied(pages: Iterable[tuple[Sequence, Sequence[int]]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is known, in each step, of the one token that it copies.

    Args:
        pages: (steps, places) of one or several prompts, as `writing` returns them.

    Returns:
        (attention on the token, `(steps, layers, query_heads)`; by kind of `heads` of TidalDecode whether the layer's
        choice for this head holds it, bool of the same shape)
    """
    both = [pair for steps, places in pages for pair in zip(steps, places, strict=True)]
    looked = torch.stack([attention[..., place] for (attention, _), place in both])
    kinds = both[0][0][1]
    return looked, {kind: torch.stack([chosen[kind][..., place] for (_, chosen), place in both]) for kind in kinds}


def copying_heads(looked: torch.Tensor, held: dict[str, torch.Tensor], layer: int, least: float = 0.5) -> pd.DataFrame:
    """Heads that put at least a share `least` of their attention on the token to be copied, by layer and head.

    Args:
        looked, held: as `copied` returns them. layer: the one that chooses.

    Returns:
        columns attention, the mean over steps; and by kind of `heads` the share of steps in which the set that `layer`
        has chosen for the head of this number holds the token.
    """
    mean = looked.mean(0)
    found = (mean >= least).nonzero().tolist()
    rows = [
        {"attention": mean[at, head].item()}
        | {kind: each[:, layer, head].double().mean().item() for kind, each in held.items()}
        for at, head in found
    ]
    index = [f"layer {at}, head {head}" for at, head in found]
    return pd.DataFrame(rows, index, ["attention", *held])
