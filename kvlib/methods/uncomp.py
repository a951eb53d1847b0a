"""UNComp: heads whose queries vary in more directions keep more tokens (Xiong et al., 2410.03090)."""

import torch

from kvlib.core.method import register, require, whole
from kvlib.methods import entropy
from kvlib.methods.baselines import SnapKV

DECIMALS = 5  # entropies that agree in them are equal


@register("uncomp")
class UNComp(SnapKV):
    """Groups of heads by the entropy of their queries, a budget for each group; tokens are chosen as by SnapKV.

    *Heads.* Matrix entropy of a head's rotated queries over the prompt, of the head_dim / 4 largest eigenvalues
    (`kvlib.methods.entropy`), its mean over the query heads of a KV head, ranks the KV heads of each layer. They are
    cut into `groups` of as many heads. From the lowest to the highest entropy a group's budget rises in equal steps
    from 1 - spread to 1 + spread times the mean, which is `budget` in every layer. The paper's settings are 2 groups of
    256 and 512 tokens (spread 1/3), and 8 from 129 to 640 (spread 2/3).

    *Tokens.* Attention of the last `window` queries, max-pooled over `kernel` tokens; the window itself stays. While
    decoding, the window moves on: after each token, attention of the last `window` queries is pooled anew, and one
    token goes.

    Follows the released code (32 of 128 eigenvalues, window 8, kernel 7). Departures: entropy is that of the prompt
    itself and not of a calibration text, and later turns keep the groups of the first; a KV head keeps one set (the
    code repeats keys and keeps one per query head); tokens stay in text order, so that pooling sees neighbours (while
    decoding the code pools in the order of scores); where the largest budget exceeds the prompt the spread gives way,
    not the mean (the code gives short prompts half of their cache); the window leaves one token of the smallest budget
    to the score.

    Args:
        groups: of each layer, a divisor of its KV heads; None: every KV head is a group of its own.
        spread: in [0, 1).

    Raises:
        ValueError: for other groups or spreads; for tokens of which the smallest group has no more than the window;
            and what SnapKV refuses.
    """

    window: int = 8
    groups: int | None = None
    spread: float = 2 / 3
    evicts_in_decode = True
    text_order = True
    weighs = True

    def __post_init__(self):
        super().__post_init__()
        require("groups", self.groups, self.groups is None or whole(self.groups, 1), "a number >= 1, or None")
        fits = isinstance(self.spread, int | float) and 0 <= self.spread < 1
        require("spread", self.spread, fits, "a share of the mean budget, in [0, 1)")
        if isinstance(self.budget, int):
            least = self.budget - int(self.spread * self.budget)
            allowed = f"the smallest group has {least} of them, and the window alone takes {self.window}"
            require("budget", self.budget, least > self.window, allowed)

    def observe(self, view):
        if not self.evicts:
            return
        if view.step.decoding:
            rows = view.state["rows"]
            view.state["rows"] = torch.cat([rows[..., 1:], view.importance().mean(2)[..., None]], dim=-1)
            return
        if "rank" not in view.layer.rows:
            self.rank(view)
        if view.step.ends_prompt or view.step.ends_question:
            view.state["rows"] = self.rows(view)

    def rows(self, view) -> torch.Tensor:
        """Attention of each of the last `window` queries, oldest first, `(batch, kv_heads, slots, window)`."""
        sums = [view.importance(last=count).mean(2) for count in range(1, self.window + 1)]
        return torch.stack([*(more - less for less, more in zip(sums[-2::-1], sums[:0:-1])), sums[0]], dim=-1)

    # How many tokens

    def budgets(self, view):
        mean, heads = self.tokens(view, self.budget), view.lengths.shape[1]
        groups = self.groups or heads
        require("groups", groups, heads % groups == 0, f"a divisor of {heads} KV heads")
        if groups == 1:
            return mean[:, None].expand_as(view.lengths)
        place = 2 * (view.layer.rows["rank"].cpu() * groups // heads) - (groups - 1)  # from -(groups - 1) to groups - 1
        return mean[:, None] + torch.div(place * self.furthest(view)[:, None], groups - 1, rounding_mode="trunc")

    def furthest(self, view) -> torch.Tensor:
        """Tokens `(batch,)` that the outer groups are away from the mean."""
        mean = self.tokens(view, self.budget)
        return view.clamp("spread", (self.spread * mean).long(), 0, view.prompt_tokens - mean)

    def rank(self, view) -> None:
        """Rank the KV heads by entropy, 0 = lowest, equal ones in their order, when all of the first prompt's queries
        are there: `rows["rank"]` of the layer, `(batch, kv_heads)`."""
        rows = view.layer.rows
        for name, new, dim in (("queries", view.query, 2), ("asked", view.query_positions, 1)):
            rows[name] = torch.cat([rows[name], new], dim=dim) if name in rows else new
        if view.step.ends_prompt:
            queries, asked = rows.pop("queries"), rows.pop("asked")
            spectrum = entropy.spectrum(queries, (asked >= 0)[:, None])
            found = entropy.entropy(spectrum, entropy.truncation(queries.shape[-1]))
            found = found.unflatten(1, (-1, view.groups)).mean(2)
            found = found.round(decimals=DECIMALS)  # of two tokens every head has entropy 0, up to rounding
            rows["rank"] = found.argsort(dim=1, stable=True).argsort(dim=1)

    # Which tokens

    def recent(self, view):
        return view.clamp("window", self.window, 1, self.tokens(view, self.budget) - self.furthest(view) - 1)

    def importance(self, view, last=None):
        if last is None or not view.step.decoding:
            return super().importance(view, last)
        age = torch.arange(self.window, 0, -1)
        counted = view.on_device((age <= last[:, None]).long())[:, None, None]
        return (view.state["rows"] * counted).sum(-1)[:, :, None]
