"""KeyDiff: keys that differ from the others matter (Park et al., 2504.15364)."""

import torch
import torch.nn.functional as F

from kvlib.core.method import Evictor, register


@register("keydiff")
class KeyDiff(Evictor):
    """The tokens whose keys point away from the mean direction of all keys of their head.

    Score: minus the cosine of a key and the mean of all keys, each at length 1. No query is looked at and no token is
    protected.

    Follows kvpress 0.5.5 (code), which evicts once, at the end of the prompt; the paper also evicts block by block
    while it reads. Departures: scores in float32 at least, and to six
    decimals.
    """

    def score(self, view):
        key = F.normalize(view.key.to(torch.promote_types(view.key.dtype, torch.float32)), dim=-1)
        total = (key * (view.positions >= 0)[..., None]).sum(2, keepdim=True)  # has the direction of the mean
        # two keys are equally far from their mean, which rounding must not decide
        return -F.cosine_similarity(key, total, dim=-1).round(decimals=6)
