"""What UNComp's groups of heads have to beat, and where else they can be used.

Uniform budgets are `uncomp` with groups=1, which are SnapKV's; budgets without entropy are `adakv`.
"""

import torch

from kvlib.core.method import register, require, whole
from kvlib.core.support import attention_modules, kv_heads
from kvlib.methods.baselines import H2O, PyramidKV
from kvlib.methods.head_groups import by_rank
from kvlib.methods.uncomp import Grouped, UNComp


@register("uncomp_random")
class Random(UNComp):
    """`UNComp` with groups drawn by lot, once for a model: the control for which heads get more.

    Args:
        seed: of the lot. types has to be None.

    Raises:
        ValueError: for a seed < 0, and what `UNComp` refuses.
    """

    seed: int = 0
    online = False

    def __post_init__(self):
        super().__post_init__()
        require("seed", self.seed, whole(self.seed, 0), "a whole number >= 0")
        require("types", self.types, self.types is None, "heads are typed by lot")

    def typing(self, model):
        layers, heads = len(attention_modules(model)), kv_heads(model)
        drawn = torch.rand(layers, heads, generator=torch.Generator().manual_seed(self.seed))
        if self.across:
            return by_rank(drawn.flatten(), self.symmetric(drawn.numel())).view_as(drawn)
        return by_rank(drawn, self.symmetric(heads))


@register("uncomp_reversed")
class Reversed(UNComp):
    """`UNComp` with the largest budget for the lowest entropy."""

    def grouping(self, view):
        group, groups = super().grouping(view)
        return groups - 1 - group, groups


@register("uncomp_continuous")
class Continuous(UNComp):
    """`UNComp` without groups: a head's budget is in proportion to its effective rank, exp(entropy); ours.

    Of the layer's heads x mean tokens every head gets its share, up to the length of the prompt, and two tokens at
    least; what is beyond goes to the others in the same proportions, so that the mean stays. Statistics are those that
    the prompt gives; groups, spread and types have no meaning here and have to be left alone.
    """

    spread: float = 0.0
    typed = True

    def __post_init__(self):
        super().__post_init__()
        for name, alone in (("groups", None), ("spread", 0.0), ("types", None)):
            require(name, getattr(self, name), getattr(self, name) == alone, "budgets follow from entropies alone")

    def budgets(self, view):
        weights = view.layer.rows["statistic"].double().cpu()
        weights = weights if self.statistic == "participation" else weights.exp()
        mean = self.mean(view)
        rows = zip(weights.tolist(), mean.tolist(), torch.maximum(mean, view.prompt_tokens).tolist())
        return torch.tensor([proportional(weight, len(weight) * mean, most) for weight, mean, most in rows])

    def room_for_window(self, view):
        least = view.per_prompt("budgets", self.budgets).amin(1)
        return view.clamp("window", self.window, 1, least - 1)


def proportional(weights: list[float], total: int, most: int) -> list[int]:
    """Whole numbers in proportion to positive weights, each from min(2, mean) to `most`, whose sum is `total`.

    The shares of those beyond a bound are the bound; the rest is shared by the others. What rounding down leaves goes
    to the largest remainders, the first of equal ones.

    Raises:
        ValueError: for a total that so many numbers up to `most` cannot have.
    """
    require("total", total, total <= len(weights) * most, f"{len(weights)} numbers up to {most}")
    least, low, high = min(2, total // len(weights)), 0.0, total / min(weights)
    for _ in range(100):  # the factor of proportionality, by halves: the sum rises with it
        middle = (low + high) / 2
        if sum(min(most, max(least, middle * weight)) for weight in weights) < total:
            low = middle
        else:
            high = middle
    shares = [min(most, max(least, high * weight)) for weight in weights]
    found = [int(share) for share in shares]
    by_remainder = sorted(range(len(found)), key=lambda i: found[i] - shares[i])
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


@register("uncomp_h2o")
class OnH2O(Grouped, H2O):
    """UNComp's groups of heads on H2O: heads of a larger group keep more heavy and more recent tokens, half of each."""

    def least(self, view):
        return torch.full_like(view.prompt_tokens, 2)


@register("uncomp_pyramidkv")
class OnPyramidKV(Grouped, PyramidKV):
    """UNComp's groups of heads on PyramidKV, whose budget of a layer is their mean; ours, near the release's hybrids.

    The spread gives way where the smallest group had no token beside the window.
    """

    def least(self, view):
        return self.recent(view) + 1
