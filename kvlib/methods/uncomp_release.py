"""UNComp as its code was released, where that differs from `uncomp` and `uncomp_stage` (Xiong et al., 2410.03090)."""

import torch

from kvlib.core.method import register, require, strongest
from kvlib.methods.head_groups import load
from kvlib.methods.layer_groups import absolute_lengths
from kvlib.methods.uncomp import UNCompStage


@register("uncomp_release")
class Released(UNCompStage):
    """`UNCompStage` by the release's rules: group-stage with heads typed offline and stages in tokens of the window.

    *Heads.* Two groups, with 2/3 and 4/3 of the mean: 256 and 512 tokens, or 384 and 768. A calibration, `types`, says
    which head is in which, by the release's greedy rule (`kvlib.methods.head_groups.release`).

    *Stages.* From stage to stage fewer tokens go on, in equal whole steps from the model's window to `shortest` of it:
    4096, 3456, 2816, 2176 and 1536 tokens. A prompt of fewer tokens is not shortened at all. Neither the first token
    nor the newest ones have to stay. `starts=()` has no stages: the released group.

    Follows menik1126/UNComp b3e9f7b. Departures: those of `UNComp` in how heads store and decode; the last token of a
    prompt stays whatever its score (there it looks at itself, and if that were not enough logits would be those of
    another token); every row of a batch has its own tokens.

    Args:
        shortest: in (0, 1], the last stage's share of the window; for one of 8192 tokens the release has 1536 / 8192.

    Raises:
        ValueError: without `types`, where one group has more than the other; for `across`; and what `UNCompStage`
            refuses.
    """

    groups: int | None = 2
    spread: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        fits = not (self.evicts and self.typed and self.online)
        require("types", self.types, fits, "the release types heads by a calibration")
        require("across", self.across, not self.across, "the release has groups within each layer")

    def typing(self, model):
        measured = load(self.types, model)
        return measured.groups(self.symmetric(measured.kv_heads), "release")

    def prepare(self, model):
        prepared, window = super().prepare(model), model.config.get_text_config().max_position_embeddings
        lengths = absolute_lengths(len(prepared.shares) + 1, window, max(1, int(self.shortest * window)))
        return prepared._replace(shares=dict(zip(prepared.shares, lengths[1:])))

    def before_layer(self, run, layer_idx):
        step, length = run.step, run.prepared.shares.get(layer_idx)
        if not self.evicts or step.after_prompt or length is None:
            return None
        last = step.positions == step.ends[:, None] - 1
        score, stay = step.shared["seen"].masked_fill(last, torch.inf), step.counts.clamp(max=length)
        stays = strongest(score[:, None], step.positions[:, None], stay[:, None])[:, 0]
        # A row that drops tokens keeps as many as any row; the others fill up with the padding that comes first.
        return stays.long().argsort(dim=1, stable=True)[:, -int(stays.sum(1).max()) :]
