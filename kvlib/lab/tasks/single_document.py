"""One fact of one document answers the question."""

from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.planted import MOST, family
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
    return Draft([(draw.depth(), f"{table} = {{\n{entries}}}\n")], questions, {table.lower(), *keys})


@family(GROUP, trained=True)
def function_lookup(draw: Draw, tokens: int) -> Draft:
    """Functions scattered in source code, each returning a number; asked for what one of them returns."""
    count = min(MOST, max(2, tokens // 64))
    pairs = list(zip(draw.names(count), draw.values(count)))
    facts = [(draw.depth(), f"\n\ndef {name}():\n    return {value}\n\n\n") for name, value in pairs]
    return Draft(facts, [(f"assert {name}() == ", str(value)) for name, value in pairs], {name for name, _ in pairs})


@family(GROUP, trained=False)
def annotated_lookup(draw: Draw, tokens: int) -> Draft:
    """Annotated constants scattered in source code; asked for the value of one."""
    count = min(MOST, max(2, tokens // 64))
    pairs = list(zip(draw.names(count), draw.values(count)))
    facts = [(draw.depth(), f"{name}: int = {value}\n") for name, value in pairs]
    return Draft(facts, [(f"assert {name} == ", str(value)) for name, value in pairs], {name for name, _ in pairs})
