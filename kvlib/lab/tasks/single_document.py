"""One fact of one document answers the question."""

from kvlib.lab.tasks.draft import MOST, Draft, family
from kvlib.lab.tasks.words import Draw

GROUP = "single-document QA"


@family(GROUP, trained=True)
def dict_lookup(draw: Draw, tokens: int) -> Draft:
    """One long dictionary; asked for the value of a key."""
    count = min(MOST, tokens // 32)
    table, *keys = draw.names(count + 1)
    table, pairs = table.upper(), list(zip(keys, draw.values(count)))
    entries = "".join(f'    "{key}": {value},\n' for key, value in pairs)
    questions = [(f'assert {table}["{key}"] == ', str(value)) for key, value in pairs]
    return Draft([(draw.rng.random(), f"{table} = {{\n{entries}}}\n")], questions, {table.lower(), *keys})


@family(GROUP, trained=True)
def function_lookup(draw: Draw, tokens: int) -> Draft:
    """Functions scattered in source code, each returning a number; asked for what one of them returns."""
    count = min(MOST, max(2, tokens // 64))
    pairs = list(zip(draw.names(count), draw.values(count)))
    facts = [(draw.rng.random(), f"\n\ndef {name}():\n    return {value}\n\n\n") for name, value in pairs]
    return Draft(facts, [(f"assert {name}() == ", str(value)) for name, value in pairs], {name for name, _ in pairs})


@family(GROUP, trained=False)
def attribute_lookup(draw: Draw, tokens: int) -> Draft:
    """Classes scattered in source code, each setting two attributes; asked for one of them."""
    count = min(MOST, max(1, tokens // 128))
    names, values = draw.names(3 * count), draw.values(2 * count)
    facts, questions = [], []
    for i in range(count):
        owner, *attributes = names[3 * i : 3 * i + 3]
        pairs = list(zip(attributes, values[2 * i : 2 * i + 2]))
        body = "".join(f"        self.{attribute} = {value}\n" for attribute, value in pairs)
        facts.append((draw.rng.random(), f"\n\nclass {owner}:\n    def __init__(self):\n{body}\n\n"))
        questions += [(f"assert self.{attribute} == ", str(value)) for attribute, value in pairs]
    return Draft(facts, questions, set(names))
