"""ZipVL's rule: as many tokens as it takes to carry most of a layer's attention (He et al., 2410.08584)."""

import torch

from kvlib.core.method import Method, register, require, strongest


@register("zipvl")
class ZipVL(Method):
    """Every layer keeps the number of tokens that its attention is concentrated on; there is no budget.

    The number is the smallest one whose tokens of highest attention together receive a part `tau` of all of it,
    summed over the prompt's queries and averaged over the heads of the layer. Which tokens stay is another order: sums
    divided by how many queries could see the token. All heads of a layer keep the same ones, once, at the end of the
    prompt.

    The rule for the number is second hand (a review with its formula), that others are evicted is in the abstract (v2;
    v1 stores them in few bits), the divisor and `tau` are our reading, and so is one set for all heads. Departures: the
    prompt is read in full, where ZipVL attends among the tokens that stay; sums are exact, not estimated from probe
    queries; a later turn is judged by its own queries. Knowing the number costs one wait for the device.

    Args:
        tau: in (0, 1]; 1 keeps everything.

    Raises:
        ValueError: for another tau.
    """

    tau: float = 0.975

    def __post_init__(self):
        fits = isinstance(self.tau, int | float) and 0 < self.tau <= 1
        require("tau", self.tau, fits, "a part of all attention, in (0, 1]")

    @property
    def evicts(self):
        return self.tau < 1

    def observe(self, view):
        if self.evicts and not view.step.after_prompt and not view.step.aside:
            view.accumulate("attention", view.column_sums().mean(2))
            could_see = (view.per_row(view.step.ends) - view.positions).clamp(max=view.per_row(view.step.counts))
            view.accumulate("queries", could_see)

    def compress(self, view):
        if not self.evicts:
            return
        real = view.positions[:, :1] >= 0  # all heads of a layer store the same tokens
        attention = view.state["attention"].mean(1, keepdim=True).masked_fill(~real, 0)
        share = attention.sort(dim=-1, descending=True).values.cumsum(-1) / attention.sum(-1, keepdim=True)
        lengths = torch.minimum((share < self.tau).sum(-1).cpu() + 1, view.lengths)
        stays = strongest(attention / view.state["queries"][:, :1], view.positions[:, :1], lengths[:, :1])
        for name in ("attention", "queries"):  # the next prompt begins anew, and decoded tokens need none
            view.layer.tail.state.pop(name)
        view.layer.keep(stays.expand_as(view.positions), lengths)
