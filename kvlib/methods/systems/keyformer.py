"""Keyformer: attention with noise, for the tokens that will be missing (Adnan et al., 2403.09054)."""

import torch

from kvlib.core.attention import blocks
from kvlib.core.method import Evictor, register, require, whole
from kvlib.methods.systems.chance import mixed, uniform


@register("keyformer")
class Keyformer(Evictor):
    """What got most of a noisy attention so far, and a recent window; evicts at every decode step.

    Score: softmax((logits + noise) / temperature), summed over every query so far and over the query heads of a group;
    the noise is Gumbel's. int(recent x budget) of the tokens are the newest ones, the others the highest scores. The
    temperature is `temperature` for prompts and questions, and rises by `growth` with each decoded token.

    Follows d-matrix-ai/keyformer-llm f327831, `modeling_gptj.py` (code), and its defaults; 60 % of the prompt is
    theirs. Departures: the noise is a hash of (seed, layer, query head, positions of query and key), so
    that neither padding nor chunks nor other rows change it, where theirs is drawn anew at every call; sums are those
    of a row, theirs run over the batch; what is evicted is freed, where theirs is hidden; the window is the last stored
    tokens (theirs counts the token to come, and loses the one before the window). Its heads are not grouped: the sum
    over a group is our reading.

    Args:
        recent: share of the budget, in [0, 1]. temperature, growth: as above. seed: of the noise.

    Raises:
        ValueError: for a recent outside [0, 1], a temperature <= 0, a growth < 0, a seed outside [0, 2**19).
    """

    recent: float = 0.3
    temperature: float = 1.0
    growth: float = 0.01
    seed: int = 0
    evicts_in_decode = True

    def __post_init__(self):
        super().__post_init__()
        numbers = {name: isinstance(getattr(self, name), int | float) for name in ("recent", "temperature", "growth")}
        require("recent", self.recent, numbers["recent"] and 0 <= self.recent <= 1, "a share of the budget, in [0, 1]")
        require("temperature", self.temperature, numbers["temperature"] and self.temperature > 0, "a number > 0")
        require("growth", self.growth, numbers["growth"] and self.growth >= 0, "a number >= 0")
        require("seed", self.seed, whole(self.seed, 0) and self.seed < 2**19, "a whole number in [0, 2**19)")

    def observe(self, view):
        if not self.evicts:
            return
        dtype = torch.promote_types(view.key.dtype, torch.float32)
        total = torch.zeros(view.positions.shape, dtype=dtype, device=view.device)
        temperature, end = self.hotter(view).to(dtype)[:, None, None, None, None], 0
        for logits in blocks(view.query, view.key, view.query_positions, view.positions, view.scaling, None):
            start, end, slots = end, end + logits.shape[3], logits.shape[4]
            noise = self.noise(view, view.query_positions[:, start:end], view.positions[..., :slots])
            weights = ((logits + noise.to(logits.dtype)) / temperature).softmax(-1)
            total[..., :slots] += weights.nan_to_num(0.0).sum((2, 3))  # queries of padding see nothing
        view.accumulate("attention", total)

    def hotter(self, view) -> torch.Tensor:
        """The temperature of this pass, `(batch,)`; decoded tokens are counted on the device, for captured steps."""
        steps = view.layer.rows.get("steps")
        if view.step.decoding and steps is not None:
            steps.add_(1)
        else:
            start = float(view.step.decoding)
            steps = view.layer.rows["steps"] = torch.full((len(view.tokens),), start, device=view.device).double()
        return self.temperature + self.growth * steps

    def noise(self, view, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Gumbel's noise `(batch, kv_heads, group, queries, keys)` in float64; arguments: positions."""
        heads = torch.arange(view.query.shape[1], device=view.device).view(keys.shape[1], -1, 1, 1)
        x = mixed(queries.long()[:, None, None, :, None] + (heads << 26) + (view.layer_idx << 35) + (self.seed << 44))
        return uniform(x + keys.long()[:, :, None, None]).log_().neg_().log_().neg_()

    def score(self, view):
        newest = view.per_prompt("newest", lambda view: (self.recent * self.budgets(view)).long())
        return view.protect(view.state["attention"], last=newest)
