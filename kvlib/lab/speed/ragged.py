"""Methods whose heads keep different numbers of tokens, to measure what that costs; they claim nothing else."""

from dataclasses import dataclass

import torch

from kvlib.methods.baselines import SnapKV


@dataclass(frozen=True)
class PerHead(SnapKV):
    """SnapKV with twice the budget in every other head and next to nothing in the rest."""

    name = "snapkv, unequal heads"

    def budgets(self, view):
        mean, recent = super().budgets(view), self.recent(view)[:, None]
        few = torch.minimum(2 * recent, mean)
        return torch.where(torch.arange(mean.shape[1]) % 2 == 0, 2 * mean - few, few)


@dataclass(frozen=True)
class Threshold(SnapKV):
    """SnapKV with one threshold for all heads of a layer, so that lengths follow from scores."""

    name = "snapkv, threshold"

    def choose(self, view):
        score = self.score(view)
        finite = score.masked_fill(view.positions < 0, -torch.inf).flatten(1)
        count = view.lengths.sum(1).to(score.device)
        rank = (self.budget * count).long().clamp(min=1)
        limit = finite.sort(dim=1, descending=True).values.gather(1, rank[:, None] - 1)[..., None]
        mask = (score >= limit) & (view.positions >= 0)
        return mask, mask.sum(-1).cpu()
