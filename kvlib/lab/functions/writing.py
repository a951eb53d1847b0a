"""How a composition of steps is written down: in Python, and in English."""

import random
import textwrap

from kvlib.lab.functions.helpers import Helper
from kvlib.lab.functions.operands import NAMES, Operand
from kvlib.lab.functions.steps import Step
from kvlib.lab.functions.values import Value

WIDTH = 88
OPENINGS = ("Write a function to {}.", "Write a python function to {}.", "Write a function to {}, and return this.")
LINKS = ((", then ", ", and then "), (", ", ", and "), (" and ", ", and finally "))
SPARE = ("result", "output", "answer", "final")  # names for results whose own name is taken


def write(
    steps: list[Step], operands: list[Operand | None], start: Value, helper: Helper | None
) -> tuple[str, list[dict[str, str]]]:
    """The body, and for each step the words that its description needs."""
    value, used, bodies, words = start, {start.variable, start.item, start.key}, [], []
    for step, operand in zip(steps, operands):
        after = value.after(step.gives, "", step.of)
        used |= {after.item, after.key}
        variable = next(name for name in (*step.results, *SPARE) if name not in used)
        used.add(variable)
        places = value.words() | {"result": variable}
        if helper and step.helper:
            places |= {"helper": helper.name, "purpose": helper.purpose}
        code, told = ({"k": operand.code}, {"k": operand.told}) if operand else ({}, {})
        bodies.append(step.body.substitute(places | code))
        words.append(places | told)
        value = value.after(step.gives, variable, step.of)
    if not steps or steps[-1].results:
        bodies.append(f"return {value.variable}")
    return textwrap.indent("\n".join(bodies), "    "), words


def describe(steps: tuple[Step, ...], words: list[dict[str, str]], rng: random.Random) -> str:
    """The docstring's first paragraph."""
    phrases = [rng.choice(step.says).substitute(places) for step, places in zip(steps, words)]
    between, last = rng.choice(LINKS)
    if len(phrases) == 2:
        between = last = rng.choice((" and then ", ", and ", ", then "))
    told = between.join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]
    opening = rng.choice(OPENINGS[:2] if "return" in told else OPENINGS)
    return textwrap.fill(opening.format(told), WIDTH, initial_indent='    """', subsequent_indent="    ")


def above(operands: list[Operand | None], helpers: list[Helper], rng: random.Random) -> str:
    """Constants and helpers that stand above the function, needed or not."""
    constants = {o.name: o.value for o in operands if o and o.place == "constant"}
    if constants:
        kind = type(next(iter(constants.values())))
        others = [name.upper() for name in NAMES[kind] if name.upper() not in constants]
        pool = range(2, 20) if kind is int else "abcdefg"
        constants |= {name: rng.choice(pool) for name in rng.sample(others, rng.randrange(3))}
    lines = [f"{name} = {value!r}\n" for name, value in rng.sample([*constants.items()], len(constants))]
    return "\n\n".join([*(["".join(lines)] if lines else []), *(helper.source for helper in helpers), ""])
