"""UNComp's groups of layers, and how many tokens each group goes on with (Xiong et al., 2410.03090).

Followed: menik1126/UNComp b3e9f7b, `uncomp/stage_division.py` and the lengths of its model files. It does not say what
the scores in its two lists are of; 67 to 77 for 32 heads is more than the truncated entropy can reach: the full one.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from kvlib.core.method import require, whole

HEADS = 32  # of the models that the release's threshold was chosen on: scores are sums over heads


def layer_scores(entropy: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Σ over heads of exp(H / ln d), `(..., layers)`, from entropies `(..., layers, heads)` in nats."""
    return (entropy / math.log(head_dim)).exp().sum(-1)


def threshold(query_heads: int) -> float:
    """By how much a score has to fall for a new group: 1 for 32 heads, and in proportion for others.

    A departure: the release has 1 for 40 heads, too.
    """
    return query_heads / HEADS


def group_starts(scores: Sequence[float], threshold: float) -> list[int]:
    """First layers of groups: layer 0, and each whose score is lower than the one before it by more than `threshold`.

    Raises:
        ValueError: for no scores, and a threshold < 0.
    """
    require("scores", scores, len(scores) > 0, "one for every layer, at least one")
    require("threshold", threshold, threshold >= 0, "a fall of the score >= 0")
    return [0, *(i for i in range(1, len(scores)) if scores[i] - scores[i - 1] < -threshold)]


def group_of(starts: Sequence[int], layers: int) -> list[int]:
    """The group that each layer is in, counted from 0.

    Raises:
        ValueError: unless the starts ascend from 0 and every group has a layer.
    """
    ascending = [0, *starts[1:]] == sorted(set(starts)) and starts[-1] < layers
    require("starts", starts, ascending, f"first layers of groups, ascending from 0, of {layers} layers")
    return [sum(start <= layer for start in starts) - 1 for layer in range(layers)]


def absolute_lengths(groups: int, longest: int, shortest: int) -> list[int]:
    """Tokens that each group of layers goes on with, falling by equal whole steps to `shortest` (release).

    The release has 1536 for the shortest and the model's window for the longest, whatever the prompt is: a prompt of
    fewer tokens than `shortest` is never shortened. Steps are rounded down, so that the first group can have less than
    `longest`. One group has `longest`.

    Raises:
        ValueError: for no group, fewer than 1 token, and lengths that would grow with depth.
    """
    require("groups", groups, whole(groups, 1), "a number of layer groups >= 1")
    check_lengths([longest, shortest], 2)
    step = (longest - shortest) // max(1, groups - 1)
    return [shortest + (groups - 1 - group) * step for group in range(groups)] if groups > 1 else [longest]


def relative_lengths(groups: int, smallest: float) -> list[float]:
    """Shares of the prompt that each group of layers goes on with: 1, falling linearly to `smallest`; ours.

    Raises:
        ValueError: for no group, and a share outside of (0, 1].
    """
    require("groups", groups, whole(groups, 1), "a number of layer groups >= 1")
    check_lengths([1.0, smallest], 2)
    return np.linspace(1.0, smallest, groups).tolist()  # whose ends are exact


def check_lengths(lengths: Sequence[int] | Sequence[float], groups: int) -> None:
    """Lengths of layer groups, in tokens (whole numbers) or shares of the prompt (floats), are usable.

    Raises:
        ValueError: unless there is one for each group, of at least one token or a share in (0, 1], all of one kind, and
            none is longer than the one before: what earlier layers have dropped is not there any more.
    """
    require("lengths", lengths, len(lengths) == groups, f"one for each of {groups} layer groups")
    tokens = all(whole(length, 1) for length in lengths)
    shares = all(isinstance(length, float) and 0 < length <= 1 for length in lengths)
    require("lengths", lengths, tokens or shares, "numbers of tokens >= 1, or shares of the prompt in (0, 1]")
    falling = all(later <= earlier for earlier, later in pairwise(lengths))
    require("lengths", lengths, falling, "no layer group can have more tokens than the one before it")
