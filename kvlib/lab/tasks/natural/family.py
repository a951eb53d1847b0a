"""How a function becomes a family in natural language."""

from collections.abc import Callable

from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.natural.composing import SHORTEST, in_code, in_prose


def family(
    group: str, *, metric: str = "exact", guess: float = 0.0, code: bool = False, name: str | None = None
) -> Callable:
    """Enter a function in the catalogue under its name, or another if that is taken. `make(draw)` gives a `Draft`.

    code: whether the facts stand among lines of code and are asked for without the model's chat format.
    """

    def entered(make: Callable) -> Callable:
        enter(Family(name or make.__name__, group, metric, guess, make, in_code if code else in_prose, SHORTEST))
        return make

    return entered
