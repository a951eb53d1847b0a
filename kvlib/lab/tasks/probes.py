"""Measured beside the families: long answers, and how far apart two lines may be."""

from collections.abc import Callable

from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.planted import SHORTEST, family, prompt
from kvlib.lab.tasks.words import Draw

ENTRIES = 48  # of a long answer: more than 512 tokens
DISTANCES = (1, 2, 4, 8, 16, 32, 64)  # lines


@family("probe", trained=True)
def long_generation(draw: Draw, tokens: int) -> Draft:
    """One dictionary, to be written again as assignments: more than 512 tokens from 2048 tokens on."""
    count = max(2, min(ENTRIES, (tokens - 32) // 42))
    table, *keys = draw.names(count + 1)
    table, pairs = table.upper(), list(zip(keys, draw.values(count)))
    entries = "".join(f'    "{key}": {value},\n' for key, value in pairs)
    answer = "\n".join(f"{key} = {value}" for key, value in pairs)
    fact = f"{table} = {{\n{entries}}}\n"
    return Draft([(draw.depth(), fact)], [(f"# {table} as assignments\n", answer)], {table.lower(), *keys})


@family("probe", trained=True)
def distance(draw: Draw, tokens: int, lines: int = 8) -> Draft:
    """A constant that is used `lines` lines after its definition (the long-range probe for AnchorCoder).

    Trained as `needle`, whose format it has.
    """
    if not (isinstance(lines, int) and lines >= 0):
        raise ValueError(f"lines={lines}: a whole number, at least 0")
    (name,), (value,) = draw.names(1), draw.values(1)
    return Draft([(lines, f"{name.upper()} = {value}\n")], [(f"assert {name.upper()} == ", str(value))], {name})


def at(lines: int) -> Callable:
    """`distance` at one distance, as a family: studies have no options."""

    def make(draw: Draw, tokens: int) -> Draft:
        return distance(draw, tokens, lines)

    return make


for apart in DISTANCES:
    enter(Family(f"distance_{apart}", "distance", "exact", float("nan"), at(apart), prompt, SHORTEST))
