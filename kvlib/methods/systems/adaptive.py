"""Budgets of heads by their scores, on any evictor: Ada-KV's allocation as a part that others can use."""

from functools import cached_property

from kvlib.core.method import METHODS, Evictor, register, require
from kvlib.methods.adakv import mixed, wanted
from kvlib.nearest import unknown


@register("adaptive")
class Adaptive(Evictor):
    """A host whose heads share one budget for each layer as in Ada-KV (Feng et al., 2407.11550).

    What the host protects stays. How many other tokens a head keeps follows from the host's scores at the end of the
    prompt (`kvlib.methods.adakv`); a host that evicts while decoding keeps these numbers, and one that scores by ranks
    within a head, as `subgen` and `lagkv` do, gives its heads equal ones. `host="vatp"` is the product
    of attention and values with budgets of heads, "snapkv" is `adakv` itself. Ours.

    Args:
        host: the name of an evictor, with the same budget and otherwise its defaults.
        floor: in [0, 1], the part of an equal share that is certain; 1 is the host.

    Raises:
        ValueError: for an unknown host, one that chooses by other means than budgets and scores or has budgets for its
            heads already, for another floor, and what the host refuses.
    """

    host: str = "h2o"
    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        fits = isinstance(self.floor, int | float) and 0 <= self.floor <= 1
        require("floor", self.floor, fits, "a part of an equal share, in [0, 1]")
        _ = self.hosted  # now, for it may refuse the budget

    @cached_property
    def hosted(self) -> Evictor:
        """The host itself."""
        hosts = {name: cls for name, cls in METHODS.items() if shares(cls)}
        if self.host not in [*hosts]:
            raise unknown("host", self.host, hosts)
        return hosts[self.host](self.budget)

    @property
    def evicts_in_decode(self):
        return self.hosted.evicts_in_decode

    @property
    def text_order(self):
        return self.hosted.text_order

    @property
    def weighs(self):
        return self.hosted.weighs

    @property
    def window(self):
        return self.hosted.window

    def prepare(self, model):
        return self.hosted.prepare(model)

    def observe(self, view):
        self.hosted.observe(view)

    def importance(self, view, last=None):
        return self.hosted.importance(view, last)

    def score(self, view):
        return self.hosted.score(view)

    def budgets(self, view):
        score = self.score(view)
        certain = (score.isposinf() & (view.positions >= 0)).sum(2).cpu()
        equal = (self.hosted.budgets(view).minimum(view.lengths) - certain).clamp(min=0)
        return certain + mixed(wanted(score, view.positions, equal.sum(1)), equal, self.floor)


def shares(cls) -> bool:
    """Can heads share what the class keeps: is it an evictor whose choice is a score and nothing else?"""
    scored = issubclass(cls, Evictor) and cls.choose is Evictor.choose and cls.compress is Evictor.compress
    plain = all(
        getattr(cls, x) is getattr(Evictor, x) for x in ("encode", "decode", "attend", "before_layer", "finish")
    )
    return scored and plain and not cls.__module__.startswith("kvlib.methods.uncomp") and cls is not Adaptive
