"""UNComp: a head keeps as many tokens as the entropy of its queries says (Xiong et al., 2410.03090)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kvlib.core.method import Evictor, register, require, strongest, whole
from kvlib.core.support import attention_modules
from kvlib.methods.baselines import SnapKV
from kvlib.methods.head_groups import STATISTICS, by_rank, group_sizes, load, per_kv_head
from kvlib.methods.layer_groups import relative_lengths

DECIMALS = 5  # entropies that agree in them are equal
RELEASED = 32, (2, 15, 26, 31)  # layers of the models, and where later stages begin


class Prepared(NamedTuple):
    """What follows from the model alone.

    groups: of every head, `(layers, kv_heads)`, if a calibration says; None: prompts do. shares: first layer of a later
    stage -> the share of the prompt's tokens that go on into it.
    """

    groups: torch.Tensor | None
    shares: dict[int, float]


@dataclass(frozen=True)
class Grouped(Evictor):
    """What UNComp adds to a host, the base beside it: budgets by groups of heads, around what the host gives a layer.

    Args:
        groups: of the KV heads of each layer. Sizes differ by one where heads do not divide, but have to be symmetric,
            so that the mean stays. None: every KV head is a group of its own.
        spread: in [0, 1): how far the outer groups are from the mean, as a share of it.
        types: the name of a shipped model, or a folder, whose calibration (`kvlib.calibration.head_groups`) says the
            groups, as in the paper; None: the prompt does.
        across: groups are of all heads of the model, so that layers differ in what they store; ours. Needs `types`.
        statistic: of the spectrum of a head's queries, by which the prompt ranks heads: "truncated" (the paper's),
            "full" and "renormalised" entropy, or "participation", the ratio that needs no eigenvalues and so little
            time; all but the first are ours.

    Raises:
        ValueError: for other groups, spreads or statistics; for the calibration of another model.
    """

    groups: int | None = None
    spread: float = 2 / 3
    types: str | None = None
    across: bool = False
    statistic: str = "truncated"

    def __post_init__(self):
        super().__post_init__()
        require("groups", self.groups, self.groups is None or whole(self.groups, 1), "a number >= 1, or None")
        fits = isinstance(self.spread, int | float) and 0 <= self.spread < 1
        require("spread", self.spread, fits, "a share of the mean budget, in [0, 1)")
        calibrated = isinstance(self.across, bool) and (not self.online or not self.across)
        require("across", self.across, calibrated, "only with a calibration, `types`, are all heads known in advance")
        require("statistic", self.statistic, self.statistic in STATISTICS, " or ".join(map(repr, STATISTICS)))
        fits = self.online or self.statistic == "truncated"
        require("statistic", self.statistic, fits, "calibrations hold truncated entropies")

    @property
    def online(self) -> bool:
        """Are heads typed by the prompt?"""
        return self.types is None

    @property
    def typed(self) -> bool:
        """Does any head get more than another? If not, entropies are not worked out."""
        return self.spread > 0 and self.groups != 1

    def prepare(self, model):
        return Prepared(None if self.online else self.typing(model), {})

    def typing(self, model) -> torch.Tensor:
        """The group of every head, `(layers, kv_heads)`, known before any prompt."""
        measured = load(self.types, model)
        heads = measured.kv_heads * (len(attention_modules(model)) if self.across else 1)
        return measured.groups(self.symmetric(heads), over_layers=self.across)

    def symmetric(self, heads: int) -> int:
        """The number of groups of so many heads."""
        groups = self.groups or heads
        fits = groups <= heads and (sizes := group_sizes(heads, groups)) == sizes[::-1]
        require("groups", groups, fits, f"groups of {heads} KV heads whose sizes are symmetric, so that the mean stays")
        return groups

    def observe(self, view):
        super().observe(view)
        typing = self.evicts and self.typed and self.online and not view.step.decoding
        if typing and "statistic" not in view.layer.rows:
            self.measure(view)

    def measure(self, view) -> None:
        """The statistic of every KV head, when all queries of the first prompt are there: `rows["statistic"]` of the
        layer, `(batch, kv_heads)`. Ranks follow from it, 0 = lowest, equal ones in their order."""
        rows = view.layer.rows
        for name, new, dim in (("queries", view.query, 2), ("asked", view.query_positions, 1)):
            rows[name] = torch.cat([rows[name], new], dim=dim) if name in rows else new
        if view.step.ends_prompt:
            queries, asked = rows.pop("queries"), rows.pop("asked")
            found = per_kv_head(STATISTICS[self.statistic](queries, (asked >= 0)[:, None]), view.new_key.shape[1])
            rows["statistic"] = found.round(decimals=DECIMALS)  # of two tokens all have 0, up to rounding

    def budgets(self, view):
        if not self.typed:
            return super().budgets(view)
        mean, (group, groups) = self.mean(view), self.grouping(view)
        place = 2 * group - (groups - 1)  # from -(groups - 1) to groups - 1
        furthest = self.furthest(view, mean)[:, None]
        above = torch.div(place * furthest, max(1, groups - 1), rounding_mode="trunc")  # of a model with one KV head: 1
        return (mean[:, None] + above).expand_as(view.lengths)

    def mean(self, view) -> torch.Tensor:
        """What the host gives every head of the layer, `(batch,)`."""
        return super().budgets(view)[:, 0]

    def grouping(self, view) -> tuple[torch.Tensor, int]:
        """The group of every head of the layer, `(batch or none, kv_heads)`, and how many there are."""
        known = view.run.prepared.groups
        if known is not None:
            return known[view.layer_idx], int(known.max()) + 1
        groups = self.symmetric(view.lengths.shape[1])
        return by_rank(view.layer.rows["statistic"].cpu(), groups), groups

    def furthest(self, view, mean: torch.Tensor) -> torch.Tensor:
        """Tokens `(batch,)` that the outer groups are away from the mean: the largest budget is at most the prompt."""
        if not self.typed:
            return torch.zeros_like(mean)
        most = torch.minimum(view.prompt_tokens - mean, mean - self.least(view))
        return view.clamp("spread", (self.spread * mean).long(), 0, most)

    def least(self, view) -> torch.Tensor:
        """What the smallest budget has room for, `(batch,)`."""
        return torch.ones_like(view.prompt_tokens)


@register("uncomp")
class UNComp(Grouped, SnapKV):
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
    code repeats keys and keeps one per query head); pooling sees neighbours in the text (while decoding those of the
    code are neighbours in the order of scores); where the largest budget exceeds the prompt the spread gives way,
    not the mean (the code gives short prompts half of their cache); the window leaves one token of the smallest budget
    to the score. Arguments are SnapKV's and those of `Grouped`.

    Raises:
        ValueError: for tokens of which the smallest group has no more than the window, and what the two refuse.
    """

    window: int = 8
    evicts_in_decode = True
    weighs = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.budget, int):
            least = self.budget - (int(self.spread * self.budget) if self.typed else 0)
            allowed = f"the smallest group has {least} of them, and the window alone takes {self.window}"
            require("budget", self.budget, least > self.window, allowed)

    def observe(self, view):
        if not self.evicts:
            return
        if view.step.decoding:
            rows = view.state["rows"]
            view.state["rows"] = torch.cat([rows[..., 1:], view.importance().mean(2)[..., None]], dim=-1)
            return
        super().observe(view)
        if view.step.ends_prompt or view.step.ends_question:
            view.state["rows"] = self.rows(view)

    def rows(self, view) -> torch.Tensor:
        """Attention of each of the last `window` queries, oldest first, `(batch, kv_heads, slots, window)`."""
        sums = [view.importance(last=count).mean(2) for count in range(1, self.window + 1)]
        return torch.stack([*(more - less for less, more in zip(sums[-2::-1], sums[:0:-1])), sums[0]], dim=-1)

    def score(self, view):
        if not view.step.decoding:
            return super().score(view)
        # SnapKV's, among neighbours in the text: a new token's slot is that of the one that went
        window, positions = self.recent(view), view.positions
        newest = positions >= view.per_row(view.step.ends) - view.per_row(window)
        attention = view.importance(last=window).mean(2).masked_fill(newest | (positions < 0), 0)
        in_text = positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(attention.gather(-1, in_text), self.kernel, stride=1, padding=self.kernel // 2)
        return torch.empty_like(pooled).scatter_(-1, in_text, pooled).masked_fill(newest, torch.inf)

    def recent(self, view):
        return view.per_prompt("window", self.room_for_window)

    def room_for_window(self, view) -> torch.Tensor:
        mean = self.tokens(view, self.budget)
        return view.clamp("window", self.window, 1, mean - self.furthest(view, mean) - 1)

    def importance(self, view, last=None):
        if last is None or not view.step.decoding:
            return super().importance(view, last)
        rows, counted = view.state["rows"], view.per_prompt("counted", self.counted)
        return (rows if counted is None else rows * counted).sum(-1)[:, :, None]

    def counted(self, view) -> torch.Tensor | None:
        """Which of the last `window` queries count in each row, oldest first, `(batch, 1, 1, window)`; None: all."""
        counted = torch.arange(self.window, 0, -1) <= self.recent(view)[:, None]
        return None if bool(counted.all()) else counted.to(view.device)[:, None, None]


@register("uncomp_stage")
class UNCompStage(UNComp):
    """`UNComp`, and hidden states of the prompt that get fewer from one stage of layers to the next.

    Before the first layer of each stage but the first, the tokens stay in the residual stream that the last `window`
    queries of the layer before looked at most, in all heads together; the others are gone for it and all later layers,
    which compute and store nothing of them. Positions stay what they were. From stage to stage the share of the tokens
    that stays falls in equal steps from 1 to `shortest`. The method whose code is called group-stage.

    Departures from the released code: shares of the prompt, not of the model's window (1536 of 4096 tokens are .375);
    the text's first token and the last `window` always stay (there the last one stays only because it looks at itself,
    and logits could be those of another token); every row of a batch has its own tokens. Each chunk of a prompt is
    shortened by itself, so that how a prompt is cut changes what is dropped. Questions about a document are not
    shortened, and with a budget of 1.0 nothing is.

    Args:
        starts: first layers of the stages behind the first. None: those of the release for 32 layers, which come from
            scores of full entropy (`kvlib.methods.layer_groups`), at the same depth.
        shortest: in (0, 1], the share of the last stage.

    Raises:
        ValueError: for starts that do not ascend, of a layer that the model has not, or of layer 0, which reads all;
            for another share, and what `UNComp` refuses.
    """

    starts: tuple[int, ...] | None = None
    shortest: float = 1536 / 4096
    own_prefill = True

    def __post_init__(self):
        super().__post_init__()
        ascending = self.starts is None or (
            isinstance(self.starts, tuple)
            and all(whole(layer, 1) for layer in self.starts)
            and [*self.starts] == sorted({*self.starts})
        )
        require("starts", self.starts, ascending, "a tuple of layers >= 1, ascending, or None")
        fits = isinstance(self.shortest, int | float) and 0 < self.shortest <= 1
        require("shortest", self.shortest, fits, "a share of the prompt, in (0, 1]")

    def prepare(self, model):
        layers = len(attention_modules(model))
        if self.starts is None:
            starts = sorted({start * layers // RELEASED[0] for start in RELEASED[1]} - {0})
        else:
            starts = self.starts
        require("starts", starts, max(starts, default=0) < layers, f"of {layers} layers")
        shares = relative_lengths(len(starts) + 1, float(self.shortest))[1:]
        return super().prepare(model)._replace(shares=dict(zip(starts, shares)))

    def observe(self, view):
        super().observe(view)
        step, shared = view.step, view.step.shared
        if step.ends_prompt:
            view.layer.rows["most"] = view.lengths.to(view.device)
        if not self.evicts or step.after_prompt or view.layer_idx + 1 not in view.run.prepared.shares:
            return
        shared.setdefault("read", step.counts)
        seen = view.column_sums(last=self.window).sum(2).flatten(1)
        by_position = seen.new_zeros(len(seen), int(step.tokens.max()) + 1)
        by_position.scatter_add_(1, view.positions.flatten(1).long() + 1, seen)  # what is no token stands at 0
        shared["seen"] = by_position.gather(1, view.query_positions.long() + 1)

    def budgets(self, view):
        return torch.minimum(super().budgets(view), view.layer.rows["most"].cpu())  # what is stored never grows

    def before_layer(self, run, layer_idx):
        step, share = run.step, run.prepared.shares.get(layer_idx)
        if not self.evicts or step.after_prompt or share is None:
            return None
        positions, newest = step.positions, step.ends - self.window
        forced = (positions == 0) | (positions >= newest[:, None])
        stay = (share * step.shared["read"]).long().clamp(min=self.window + 1)
        score = step.shared["seen"].masked_fill(forced, torch.inf)
        stays = strongest(score[:, None], positions[:, None], torch.minimum(stay, step.counts)[:, None])[:, 0]
        # Rows go on with equally many columns: where fewer tokens stay, padding, which comes first, fills the row.
        # There is enough of it, for no row drops more tokens than a longer one.
        order = (2 * stays.long() + (positions < 0)).argsort(dim=1, stable=True)
        return order[:, -int(stays.sum(1).max()) :]
