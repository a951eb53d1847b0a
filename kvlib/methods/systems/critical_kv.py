"""CriticalKV: half of what stays by attention, half by what it adds to the output (Feng et al., 2502.03805)."""

import torch

from kvlib.core.method import register, strongest
from kvlib.methods.vatp import EPSILON, ForcedSinks, output_norms

BITS = 20  # of norms


@register("critical_kv")
class CriticalKV(ForcedSinks):
    """The host's best tokens for half of the budget; for the other half those of the highest (A + 1e-4) ||W_O v||_1.

    A is the host's score, as a mean over its queries. W_O v is the value after the output projection; its norm is
    averaged over the query heads of a group, and computed when the token arrives. What the host protects counts in the
    first half, and stays in any case.

    Follows kvpress 0.5.5 (code) on SnapKV. On other hosts A is our reading: sums over queries and over a group are
    divided by how many they are, of Scissorhands, which begins with a mean, by one more than the queries since the
    prompt. Departures: those of the hosts; no sinks are forced by default; norms to 20 binary digits.

    Raises:
        ValueError: on models whose attention has no `o_proj`; for what `ForcedSinks` refuses.
    """

    host: str = "snapkv"
    sinks: int = 0

    def observe(self, view):
        view.remember("norm", mean_norms(view, self.name))
        super().observe(view)

    def terms(self, view) -> torch.Tensor:
        """How many weights the host's score adds up, to be compared with slots."""
        if not self.evicts_in_decode:
            return view.per_row(self.hosted.recent(view))
        before = view.per_row(view.prompt_tokens - 1) if self.window else 0
        return (view.per_row(view.step.ends) - before) * view.groups

    def score(self, view):
        score = self.hosted.score(view)
        half = view.per_prompt("half", lambda view: (self.budgets(view) // 2).clamp(min=1))
        certain = strongest(score, view.positions, view.on_device(half)) | score.isposinf()
        product = (score + EPSILON * self.terms(view).to(score.dtype)) * view.state["norm"]
        return view.protect(product.masked_fill(certain, torch.inf), first=view.per_prompt("sinks", self.first))


def mean_norms(view, name: str) -> torch.Tensor:
    """||W_O v||_1 of the tokens of this pass, a mean over the query heads of a group, `(batch, kv_heads, new)`.

    In the first layer a word has the same value wherever it stands, and pooled or raised scores are equal, too. So that
    rounding does not decide between its repetitions, `BITS` binary digits are left.

    Raises:
        ValueError: on models whose attention has no `o_proj`, which method `name` needs.
    """
    project = getattr(view.module, "o_proj", None)
    if project is None:
        raise ValueError(f"{type(view.module).__name__} has no o_proj, which {name} needs")
    norms = output_norms(project, view.new_value.repeat_interleave(view.groups, dim=1).transpose(1, 2))
    part, power = norms.unflatten(-1, (-1, view.groups)).mean(-1).transpose(1, 2).frexp()
    return ((part * 2**BITS).round() / 2**BITS).ldexp(power)
