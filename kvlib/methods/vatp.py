"""VATP: attention is not enough, the value it carries counts too (Guo et al., 2406.12335), and scores of its kind.

All are one construction: a host (H2O, Scissorhands, SnapKV or PyramidKV) that everywhere reads the importance of the
method it serves (`view.importance`), and the first tokens of the text protected. What the host does with attention -
add up queries, sum or average the heads of a group, pool neighbours, set budgets, protect recent tokens - it does with
that importance.
"""

from functools import cached_property

import torch

from kvlib.core.method import Evictor, register, require, whole
from kvlib.core.recorded import steady
from kvlib.methods.baselines import H2O, PyramidKV, Scissorhands, SnapKV
from kvlib.nearest import unknown

EPSILON = 1e-4  # of `OutputNorm`


@register("forced_sinks")
class ForcedSinks(Evictor):
    """A host whose first tokens always stay: the control that VATP lacks, for it protects sinks only when it is on.

    The sinks are the first real tokens of each row. They take places of the host's heavy tokens and leave at least one
    of these to the score: `budget - recent - 1` is the most. (In the authors' code, where sinks outnumber heavy tokens,
    an arbitrary choice of them survives.)

    Args:
        host: "h2o", "scissorhands", "snapkv" or "pyramidkv", with the same budget and otherwise its defaults.
        sinks: how many tokens to protect.

    Raises:
        ValueError: for another host, for sinks < 0, and what the host refuses.
    """

    host: str = "h2o"
    sinks: int = 20

    def __post_init__(self):
        super().__post_init__()
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")
        _ = self.hosted  # now, for it may refuse the budget

    @cached_property
    def hosted(self) -> Evictor:
        """The host itself."""
        hosts = {cls.name: cls for cls in (H2O, Scissorhands, SnapKV, PyramidKV)}
        if self.host not in [*hosts]:
            raise unknown("host", self.host, hosts)
        return hosts[self.host](self.budget)

    @property
    def evicts_in_decode(self):
        return self.hosted.evicts_in_decode

    @property
    def weighs(self):
        return self.hosted.weighs

    @property
    def window(self):
        return self.hosted.window

    def observe(self, view):
        self.hosted.observe(view)

    def budgets(self, view):
        return self.hosted.budgets(view)

    def first(self, view):
        recent, budgets = self.hosted.recent(view), self.budgets(view)
        room = budgets - (recent if recent.ndim == 2 else recent[:, None]) - 1
        return view.clamp("sinks", self.sinks, 0, room)

    def score(self, view):
        return view.protect(self.hosted.score(view), first=view.per_prompt("sinks", self.first))


@register("vatp")
class VATP(ForcedSinks):
    """Value-aware token pruning (Guo et al., 2406.12335): attention x norm of the value, with forced sinks.

    The norm is that of the value before the output projection, one number per KV head and token, computed when the
    token arrives. Sinks have to be forced because their values are next to 0, so that the product ranks them last;
    without them all other weights would grow.

    Hosts "h2o" and "scissorhands" are the authors'. Departures: those of the hosts and of `ForcedSinks`; grouped
    queries, which their code does not have: each query head's attention is multiplied by the norm of its KV head's
    value before the host reduces the group.

    Args:
        norm: "l1" (the paper's choice), "l2" or "linf".

    Raises:
        ValueError: for another norm, and what `ForcedSinks` refuses.
    """

    norm: str = "l1"

    def __post_init__(self):
        super().__post_init__()
        require("norm", self.norm, self.norm in ("l1", "l2", "linf"), "'l1', 'l2' or 'linf'")

    def observe(self, view):
        order = {"l1": 1, "l2": 2, "linf": torch.inf}[self.norm]
        value = view.new_value
        dtype = torch.promote_types(value.dtype, torch.float32)
        view.remember("norm", torch.linalg.vector_norm(value, order, dim=-1, dtype=dtype))
        super().observe(view)

    def importance(self, view, last=None):
        return view.column_sums(last) * view.state["norm"][:, :, None]


@register("exact_error")
class EvictionError(ForcedSinks):
    """What evicting one token does to the attention output, exactly: a / (1 - a) x ||o - v||_2 (CAOTE, 2504.14051).

    Attention x norm of the value leaves out that the other weights grow to fill the gap. This score does not, and so
    sees what a sink is good for: none are forced by default. Each query's error is added up as the host adds up
    attention, per query head (a choice of ours); queries that see one key only have none.
    """

    sinks: int = 0

    def importance(self, view, last=None):
        return view.eviction_errors(last)


@register("output_norm")
class OutputNorm(ForcedSinks):
    """(A + 1e-4) x ||W_O v||_1: what a token adds to the layer's output (the product of CriticalKV, 2502.03805).

    W_O v is the value after the output projection, one norm per query head and token, computed when the token arrives.
    A is the host's sum over the number of its queries. Only the order of scores counts, so that 1e-4 is multiplied by
    that number instead; queries from before a token was there count for it too, with attention 0. A window of w
    queries counts as w, and the mean with which Scissorhands begins as 1.

    Departures: CriticalKV gives half of the budget to attention alone, and averages norms over a group.

    Raises:
        ValueError: on models whose attention has no `o_proj`; for what `ForcedSinks` refuses.
    """

    sinks: int = 0

    def observe(self, view):
        project = getattr(view.module, "o_proj", None)
        if project is None:
            raise ValueError(f"{type(view.module).__name__} has no o_proj, which output_norm needs")
        norms = output_norms(project, view.new_value.repeat_interleave(view.groups, dim=1).transpose(1, 2))
        view.remember("norm", norms.unflatten(-1, (-1, view.groups)).transpose(1, 2))
        super().observe(view)

    def importance(self, view, last=None):
        sums = view.column_sums(last)
        queries = view.step.counts if last is None else torch.as_tensor(last)
        queries = view.per_row(queries.expand(len(view.tokens)))
        if last is None:  # for the tokens of this pass the earlier queries are still to be counted
            ends = view.per_row(view.step.ends)
            so_far = ends - view.per_row(view.prompt_tokens) + 1 if self.window else ends
            queries = queries.where(~view.arrived, so_far)
        return (sums + EPSILON * queries[:, :, None].to(sums.dtype)) * view.state["norm"].movedim(-1, 2)


def output_norms(project, value: torch.Tensor) -> torch.Tensor:
    """||W_O v||_1 of values `(batch, new, query_heads, dim)`: `(batch, new, query_heads)` in float32 or better.

    W_O is what calling `project` does, its bias apart: weights may be on disk, quantised, or have an adapter beside
    them. Few tokens are projected themselves; for many, what becomes of each channel tells what becomes of them.
    """
    few, dtype = value.flatten(0, 1), torch.promote_types(value.dtype, torch.float32)
    if len(few) <= (dim := value.shape[-1]):
        return torch.linalg.vector_norm(projected(project, few), 1, dim=-1, dtype=dtype).view(value.shape[:-1])
    channels = torch.eye(dim, dtype=value.dtype, device=value.device)[:, None].expand(-1, value.shape[2], -1)
    weights = projected(project, channels).to(dtype).transpose(0, 1)
    norms = [  # head by head, because each output is as wide as the model
        torch.linalg.vector_norm(value[:, :, head].to(dtype) @ part, 1, dim=-1) for head, part in enumerate(weights)
    ]
    return torch.stack(norms, dim=-1)


def projected(project, x: torch.Tensor) -> torch.Tensor:
    """What the output projection makes of each head of `x` `(tokens, heads, dim)` alone, `(tokens, heads, width)`."""
    alone = torch.diag_embed(x.mT).permute(0, 2, 3, 1).flatten(2)
    return project(alone) - project(alone.new_zeros(1, 1, alone.shape[-1]))


steady(ForcedSinks, VATP, EvictionError, OutputNorm)
