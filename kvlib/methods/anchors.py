"""Lines of tokens and the anchors that end them (AnchorCoder, Zhang et al., 2411.06680).

A line is what stands between two marked tokens: anchors, which are planted behind every token that ends a line, and
BOS. Followed: NUAAZXY/Anchor_Coder ac7bfd1, the trainer's copy of the modified Llama. Departures: any number of heads
(there 32), rows of a batch without an anchor (there their mask is empty), and one rule for prompts and for decoding
(there an anchor that is decoded begins its line one token earlier).
"""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from kvlib.core.method import require, whole


def plant(ids: Sequence[int], anchor: int, ends: Collection[int], longest: int | None = None) -> list[int]:
    """Token ids with an anchor behind every token that ends a line.

    Args:
        ends: ids of tokens whose text ends with a newline, however many newlines that are.
        longest: tokens of a line; one that goes on gets an anchor there, too. None: lines end where they end.

    Raises:
        ValueError: if the ids contain the anchor, or an anchor is said to end a line; for longest < 1.
    """
    require("ids", anchor, anchor not in ids, "already planted: the anchor is among them")
    require("ends", anchor, anchor not in ends, "an anchor does not end a line by itself")
    require("longest", longest, longest is None or whole(longest, 1), "a number of tokens >= 1, or None")
    planted, length = [], 0
    for token in ids:
        planted.append(token)
        length += 1
        if token in ends or length == longest:
            planted.append(anchor)
            length = 0
    return planted


def anchored(text: str, tokenizer, settings: dict) -> list[int]:
    """Token ids of a text with its anchors, as the model was trained; no token is added at its beginning.

    Where lines end in anchors each line is tokenised by itself, so that no token reaches over an anchor: tokenizers
    that join newlines, or a newline and what indents the next line, give other tokens than for the text as a whole.
    `tokenizer.decode` of the ids without the anchors is the text again, if the tokenizer loses nothing.

    Args:
        settings: `config.anchorcoder` of the model.

    Raises:
        ValueError: for a text that contains the anchor.
    """
    pieces = split(text) if settings["ends"] else [text]
    ids = tokenizer(pieces, add_special_tokens=False).input_ids if text else []
    return plant([*chain(*ids)], settings["anchor"], settings["ends"], settings["longest"])


def split(text: str) -> list[str]:
    """The lines of a text with their newlines; what separates lines elsewhere, such as a form feed, does not here."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def lines(marked: torch.Tensor, positions: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the line of every token begins, `(batch, new)`, and that of the token to come, `(batch,)`.

    A line begins behind the marked token before it; an anchor belongs to the line that it ends.

    Args:
        marked: `(batch, new)` bool, anchors and BOS; of padding it does not matter.
        positions: `(batch, new)`, ascending, -1 = padding.
        begin: `(batch,)`, where the line of the first token begins: 0 for a new text.
    """
    behind = torch.maximum((positions + 1).where(marked, 0).cummax(1).values, begin[:, None])
    return torch.cat([begin[:, None], behind[:, :-1]], dim=1), behind[:, -1]


def visible(
    key_positions: torch.Tensor, marked: torch.Tensor, query_positions: torch.Tensor, begins: torch.Tensor
) -> torch.Tensor:
    """Token-wise anchor attention in closed form, `(batch, queries, keys)`: all earlier marks, and the own line so far.

    The text's first token is always visible, marked or not.

    Args:
        key_positions: `(batch, keys)`, -1 = none. marked: the same of them. query_positions, begins: `(batch,
            queries)`, and where their lines begin.
    """
    at, query = key_positions[:, None], query_positions[:, :, None]
    return (at >= 0) & (at <= query) & (marked[:, None] | (at == 0) | (at >= begins[:, :, None]))


def offsets(tokens: int, heads: int) -> np.ndarray:
    """In which place of a line of so many tokens each head sees the anchor behind it: `(heads,)`, ascending.

    Heads are shared out among the tokens in proportion to the cubes of their numbers, 1, 8, 27, ...; what rounding down
    leaves goes to the largest remainders, of equal ones to the earlier token. In whole numbers, without rounding.
    """
    cubes = np.arange(1, tokens + 1, dtype=np.int64) ** 3
    shares, remainders = np.divmod(heads * cubes, cubes.sum())
    largest = np.argsort(-remainders, kind="stable")[: heads - shares.sum()]
    shares[largest] += 1
    return np.repeat(np.arange(tokens), shares)


@lru_cache
def table(size: int, heads: int) -> torch.Tensor:
    """`offsets` of lines of 0 to `size` - 1 tokens, `(size, heads)`; a line without a token has none."""
    rows = [np.zeros(heads, dtype=np.int64), *(offsets(tokens, heads) for tokens in range(1, size))]
    return torch.from_numpy(np.stack(rows))


def moves(marked: torch.Tensor, positions: torch.Tensor, begins: torch.Tensor, heads: int) -> torch.Tensor:
    """How far the key of every token is turned from where it stands, `(batch, heads, new)`, 0 or less (MHPE).

    Each head sees an anchor at the place of one token of its line. What is not marked stays, and so does a mark whose
    line has no other token.

    Args:
        heads: KV heads; the release has as many query heads.
    """
    before = (positions - begins).clamp(min=0).where(marked, 0)  # tokens of the line, without the mark
    most = 1 << int(before.max()).bit_length()  # a power of two, so that few tables are made
    place = table(most, heads).to(positions.device)[before]
    moved = (before > 0) & marked
    return (place - before[..., None]).where(moved[..., None], 0).permute(0, 2, 1)
