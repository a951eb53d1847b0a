"""Generated problems, each from its seed alone."""

import random
import re

from kvlib.lab.functions.composing import compose
from kvlib.lab.functions.helpers import draw_helpers
from kvlib.lab.functions.operands import draw_operands
from kvlib.lab.functions.problems import Problem
from kvlib.lab.functions.values import DRAW, parameter
from kvlib.lab.functions.writing import above, describe, write
from kvlib.lab.tasks.words import Draw

ASSERTS = 6
CANDIDATES = 18  # arguments, of which the examples and the assertions take those with the most different results
LONGEST = 48  # characters of a result
LARGE = re.compile(r"\d{7}")
EMPTY = ([], {}, "")  # results that tell little about a function


def outcomes(source: str, name: str, arguments: list[tuple]) -> list:
    """What the function returns; None where it fails."""
    scope, result = {}, []
    exec(compile(source, name, "exec"), scope)  # the project's own templates
    for values in arguments:
        try:
            result.append(scope[name](*values))
        except (IndexError, ValueError, ZeroDivisionError):  # of an empty list
            result.append(None)
    return result


def choose(arguments: list[tuple], results: list, least: int) -> list[tuple[tuple, object]] | None:
    """Calls and results, as many different results as possible first; None if there are not enough."""
    groups = {}
    for values, result in zip(arguments, results):
        told = repr(result)
        if result is not None and len(told) <= LONGEST and not LARGE.search(told):
            groups.setdefault(told, {})[repr(values)] = (values, result)
    if len(groups) < least:
        return None
    queues = [[*calls.values()] for calls in groups.values()]
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
        lines += [f"    >>> {call(name, values)}", f"    {result!r}"]
    asserts = tuple(f"assert {call(name, values)} == {result!r}" for values, result in tested)
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
