"""Generated problems: a function is described by a docstring with examples, and judged by hidden assertions."""

import random
import re
import textwrap
from dataclasses import dataclass

from kvlib.lab.functions.composing import compose
from kvlib.lab.functions.helpers import Helper, draw_helpers
from kvlib.lab.functions.steps import Step
from kvlib.lab.functions.values import DRAW, Value, parameter
from kvlib.lab.tasks.words import Draw

ASSERTS = 6
CANDIDATES = 18  # arguments, of which the examples and the assertions take those with the most different results
LONGEST = 48  # characters of a result
LARGE = re.compile(r"\d{7}")
EMPTY = ("[]", "{}", "''")  # results that tell little about a function
WIDTH = 88
OPENINGS = ("Write a function to {}.", "Write a python function to {}.", "Write a function to {}, and return this.")
LINKS = ((", then ", ", and then "), (", ", ", and "), (" and ", ", and finally "))
OPERANDS = {int: "limit base factor step bound offset margin target".split(), str: "mark symbol sign part".split()}
SPARE = ("result", "output", "answer", "final")  # names for results whose own name is taken


@dataclass(frozen=True)
class Problem:
    """A function to be written.

    Attributes:
        prompt: whatever stands above the function, its signature and its docstring; ends with a newline.
        solution: the body of the reference, without the last newline.
        asserts: lines of Python, on other arguments than the docstring's.
        composition: names of the steps that the function was composed of.
    """

    name: str
    prompt: str
    solution: str
    asserts: tuple[str, ...]
    composition: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Prompt and solution, as a training text."""
        return f"{self.prompt}{self.solution}\n"


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
    free = {kind: rng.sample(names, len(names)) for kind, names in OPERANDS.items()}
    result = []
    for step in steps:
        if not step.operand:
            result.append(None)
            continue
        value = rng.choice(step.operand)
        place = rng.choices(("literal", "constant", "parameter"), (6, 2, 2))[0]
        name = free[type(value)].pop()
        result.append(Operand(step.operand, value, name.upper() if place == "constant" else name, place))
    return result


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
        others = [name.upper() for name in OPERANDS[kind] if name.upper() not in constants]
        pool = range(2, 20) if kind is int else "abcdefg"
        constants |= {name: rng.choice(pool) for name in rng.sample(others, rng.randrange(3))}
    lines = [f"{name} = {value!r}\n" for name, value in rng.sample([*constants.items()], len(constants))]
    return "\n\n".join([*(["".join(lines)] if lines else []), *(helper.source for helper in helpers), ""])


def outcomes(source: str, name: str, arguments: list[tuple]) -> list[str | None]:
    """What the function returns, as text; None where it fails."""
    scope, result = {}, []
    exec(compile(source, name, "exec"), scope)  # the project's own templates
    for values in arguments:
        try:
            result.append(repr(scope[name](*values)))
        except (IndexError, ValueError, ZeroDivisionError):  # of an empty list
            result.append(None)
    return result


def choose(arguments: list[tuple], results: list[str | None], least: int) -> list[tuple[tuple, str]] | None:
    """Calls and results, as many different results as possible first; None if there are not enough."""
    groups = {}
    for values, result in zip(arguments, results):
        if result is not None and len(result) <= LONGEST and not LARGE.search(result):
            groups.setdefault(result, {})[repr(values)] = values
    if len(groups) < least:
        return None
    queues = [[(values, result) for values in calls.values()] for result, calls in groups.items()]
    order = [queue[i] for i in range(CANDIDATES) for queue in queues if i < len(queue)]
    return order if len(order) >= ASSERTS + 3 else None


def call(name: str, values: tuple) -> str:
    return f"{name}({', '.join(map(repr, values))})"


def attempt(rng: random.Random, split: str) -> Problem | None:
    """A problem, unless the operands or arguments drawn do not tell its steps from fewer."""
    steps = compose(rng, split)
    start, operands = parameter(steps[0].takes, rng), draw_operands(steps, rng)
    kind = next((step.helper for step in steps if step.helper), None)
    helpers = draw_helpers(kind, Draw(rng, split).names(rng.choices((1, 2, 3), (3, 4, 2))[0]), rng) if kind else []
    helper = rng.choice(helpers) if helpers else None

    body, words = write(steps, operands, start, helper)
    name = f"{steps[-1].name.split('_')[0]}_{start.variable}"
    parameters = [o for o in operands if o and o.place == "parameter"]
    names = ", ".join([start.variable, *(o.name for o in parameters)])
    head, signature = above(operands, helpers, rng), f"def {name}({names}):\n"

    arguments = [(DRAW[start.kind](rng), *(rng.choice(o.choices) for o in parameters)) for _ in range(CANDIDATES)]
    results = outcomes(head + signature + body, name, arguments)
    order = choose(arguments, results, least=3 if steps[-1].results else 2)
    if order is None:
        return None
    tested, left = order[:ASSERTS], sorted(order[ASSERTS:], key=lambda pair: pair[1] in EMPTY)
    shown = left[: rng.choice((2, 2, 2, 3))]
    for i, step in enumerate(steps):
        if step.takes == step.gives:
            fewer, _ = write([*steps[:i], *steps[i + 1 :]], [*operands[:i], *operands[i + 1 :]], start, helper)
            if outcomes(head + signature + fewer, name, [values for values, _ in tested]) == [r for _, r in tested]:
                return None
    lines = [describe(steps, words, rng), ""]
    for values, result in shown:
        lines += [f"    >>> {call(name, values)}", f"    {result}"]
    asserts = tuple(f"assert {call(name, values)} == {result}" for values, result in tested)
    prompt = head + signature + "\n".join([*lines, '    """', ""])
    return Problem(name, prompt, body, asserts, tuple(step.name for step in steps))


def problem(seed: int, split: str = "test") -> Problem:
    """The problem of a seed.

    Raises:
        ValueError: for an unknown split.
    """
    rng = random.Random(f"function {split} {seed}")
    while True:
        if drawn := attempt(rng, split):
            return drawn
