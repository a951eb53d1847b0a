"""What may stand above a generated function: small functions and constants that it has to use, and others."""

import random
from dataclasses import dataclass

ADJECTIVES = "lucky rare safe ripe fair valid busy heavy bright quiet golden famous".split()
BODIES = {  # by kind: what such a helper tells, and how it may be written; {a} to {c} are small numbers
    "number": ("fee bonus rank toll charge rating credit penalty quota tariff refund rebate".split(), (
        "return number * {a} + {b}",
        "return number * {a} - {b}",
        "return (number + {a}) % {b}",
        "if number > {a}:\n    return number - {b}\nreturn number + {c}",
        "if number % 2 == 0:\n    return number + {a}\nreturn number * {b}",
    )),
    "number test": (ADJECTIVES, (
        "return number % {a} == 1",
        "return number > {a} or number % {b} == 0",
        "return (number + {a}) % {b} < 2",
        "if number < {a}:\n    return number % 2 == 0\nreturn number % {b} == 0",
    )),
    "word": ("alias nickname badge motto emblem password slogan callsign".split(), (
        "return word[:{a}] + word[-1:]",
        "return word[::-1] + '{b}'",
        "return word[:1] + str(len(word) * {a})",
        "if len(word) > {a}:\n    return word[:{b}]\nreturn word + word",
    )),
    "word test": (ADJECTIVES, (
        "return len(word) % 2 == {b} % 2",
        "return word.count('e') + word.count('o') == 1",
        "return word[:1] < 'm'",
        "return len(word) > {a} or 'a' in word",
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Helper:
    """A function of one argument: `purpose` is what its docstring says that it tells."""

    name: str
    purpose: str
    source: str


def draw_helpers(kind: str, names: list[str], rng: random.Random) -> list[Helper]:
    """Helpers of one kind, each with another purpose."""
    purposes, bodies = BODIES[kind]
    argument, _, test = kind.partition(" ")
    result = []
    for name, purpose in zip(names, rng.sample(purposes, len(names))):
        told = f"Tell whether a {argument} is {purpose}." if test else f"Return the {purpose} of a {argument}."
        body = rng.choice(bodies).format(**dict(zip("abc", rng.sample(range(2, 10), 3)))).replace("\n", "\n    ")
        result.append(Helper(name, purpose, f'def {name}({argument}):\n    """{told}"""\n    {body}\n'))
    return result
