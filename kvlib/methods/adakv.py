"""Ada-KV: heads whose attention is spread out keep more tokens (Feng et al., 2407.11550)."""

import torch

from kvlib.core.method import register, require, strongest
from kvlib.methods.baselines import SnapKV


@register("adakv")
class AdaKV(SnapKV):
    """SnapKV whose heads share one budget for each layer.

    The tokens of highest score of all heads together, `kv_heads x (budget - window)` beside the window, say how many a
    head should have; a part `floor` of an equal share is certain. A head then keeps its own best tokens, and the
    window. No entropy and no calibration: the baseline that allocations over heads have to beat.

    Follows FFY0/AdaKV efe4e2e, `snapkv_utils.py`, with SnapKV's window, kernel and mean over the group, which are its
    defaults; floor 0.2 as in the paper's runs (second hand). Departures: what rounding leaves goes to the heads with
    the largest remainders, so that the layer stores exactly its budget (the code rounds every head by itself); all
    layers do so (the code can leave the first ones uniform); no weighting of heads by the mass of their best tokens,
    an option there.

    Args:
        floor: in [0, 1]; 1 is SnapKV.

    Raises:
        ValueError: for another floor, and what SnapKV refuses.
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        fits = isinstance(self.floor, int | float) and 0 <= self.floor <= 1
        require("floor", self.floor, fits, "a part of an equal share, in [0, 1]")

    def choose(self, view):
        score, window = self.score(view), torch.minimum(self.recent(view)[:, None], view.lengths)
        equal = torch.minimum(self.budgets(view), view.lengths) - window
        counts = window + mixed(wanted(score, view.positions, equal.sum(1)), equal, self.floor)
        return strongest(score, view.positions, counts), counts


def wanted(score: torch.Tensor, positions: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """How many of the `total` `(batch,)` highest scores of all heads are each head's, `(batch, kv_heads)` on the CPU.

    Ties go to the earlier token, of one token to the first head.

    Args:
        score, positions: `(batch, kv_heads, slots)`; protected tokens have a score of infinity and do not take part.
    """
    batch, heads, slots = score.shape
    place = positions * heads + torch.arange(heads, device=positions.device)[:, None]
    place = place.masked_fill((positions < 0) | score.isposinf(), -1)
    best = strongest(score.view(batch, 1, -1), place.view(batch, 1, -1), total[:, None])
    return best.view(batch, heads, slots).sum(2).cpu()


def mixed(wanted: torch.Tensor, equal: torch.Tensor, floor: float) -> torch.Tensor:
    """(1 - floor) x wanted + floor x equal in whole numbers with the sum of `equal`, `(batch, kv_heads)`."""
    exact = ((1 - floor) * wanted.double() + floor * equal.double()).round(decimals=6)
    whole = exact.floor().long()
    left = equal.sum(1, keepdim=True) - whole.sum(1, keepdim=True)
    order = (exact - whole).argsort(dim=1, descending=True, stable=True)
    return whole + (order.argsort(dim=1) < left)
