"""Operands of steps: limits, factors, letters."""

import random
from dataclasses import dataclass

from kvlib.lab.functions.steps import Step

NAMES = {int: "limit base factor step bound offset margin target".split(), str: "glyph symbol sign part".split()}
PLACES = {"literal": 6, "constant": 2, "parameter": 2}  # with their weights


@dataclass(frozen=True)
class Operand:
    """Where a step's operand stands: in the text itself, in a constant above the function, or in a parameter."""

    choices: tuple
    value: int | str
    name: str
    place: str  # "literal", "constant", "parameter"

    @property
    def code(self) -> str:
        return repr(self.value) if self.place == "literal" else self.name

    @property
    def told(self) -> str:
        return repr(self.value) if self.place == "literal" else f"`{self.name}`"


def draw_operands(steps: tuple[Step, ...], rng: random.Random) -> list[Operand | None]:
    """An operand for each step that has one; most stand in the docstring and in the body."""
    free = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    result = []
    for step in steps:
        if not step.operand:
            result.append(None)
            continue
        value = rng.choice(step.operand)
        place = rng.choices([*PLACES], PLACES.values())[0]
        name = free[type(value)].pop()
        result.append(Operand(step.operand, value, name.upper() if place == "constant" else name, place))
    return result
