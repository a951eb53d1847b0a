"""Budgets at which other methods store what AnchorCoder would store of the same text on the same model."""

from dataclasses import asdict, replace

import torch

from kvlib.anchored.arms import LONGEST
from kvlib.core.method import Evictor


def stored_entries(text: str, tokenizer, layers: int, per: int | None, longest: int = LONGEST) -> int:
    """Keys per KV head that AnchorCoder stores of a text, in all layers together.

    Full layers store everything, ceil(layers / per) of them or none; the others the anchors, the first token and the
    line that has not ended.

    Args:
        text: with the text of the token that begins it, if there is one; tokenised line by line.
        per, longest: as in `kvlib.methods.anchorcoder`.
    """
    *lines, rest = text.split("\n")
    *sizes, current = map(len, tokenizer([*(f"{line}\n" for line in lines), rest], add_special_tokens=False).input_ids)
    anchors = sum(-(-size // longest) for size in sizes) + current // longest
    tokens = sum(sizes) + current + anchors
    kept = anchors + 1 + current % longest if anchors else tokens
    full = -(-layers // per) if per else 0
    return full * tokens + (layers - full) * kept


def with_tokens(method: Evictor, tokens: list[int]) -> Evictor:
    """The method with a budget of its own for each row of a block, in tokens per KV head."""

    class EachRow(type(method)):
        def tokens(self, view, share):
            return view.layer.rows.setdefault("budget", torch.tensor(tokens))  # which follows the rows that stay

    made = EachRow(**asdict(replace(method, budget=max(tokens))))
    if hasattr(method, "hosted"):
        vars(made)["hosted"] = with_tokens(method.hosted, tokens)
    return made
