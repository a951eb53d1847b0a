"""Everything of one kind has to be gathered from the whole prompt: what a summary needs."""

from itertools import islice

from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.planted import family
from kvlib.lab.tasks.words import Draw

GROUP = "aggregation"


@family(GROUP, trained=True)
def collect(draw: Draw, tokens: int) -> Draft:
    """Values appended to lists here and there; asked for one list, in order."""
    lists = draw.names(max(2, min(4, tokens // 512)))
    facts, questions = [], []
    for name in lists:
        values = draw.values(draw.rng.randint(2, 4 if tokens >= 512 else 2))
        places = sorted(draw.depth() for _ in values)
        facts += [(place, f"{name}.append({value})\n") for place, value in zip(places, values)]
        questions.append((f"assert {name} == [", ", ".join(map(str, values)) + "]"))
    return Draft(facts, questions, set(lists))


@family(GROUP, trained=True)
def exports(draw: Draw, tokens: int) -> Draft:
    """Functions registered by decorators; asked for the names in one register, in order."""
    count = max(1, min(3, tokens // 512))
    registers, names = (drawn := draw.names(5 * count))[:count], iter(drawn[count:])
    facts, questions = [], []
    for register in registers:
        functions = list(islice(names, draw.rng.randint(2, 4 if tokens >= 512 else 2)))
        places = sorted(draw.depth() for _ in functions)
        facts += [
            (place, f"\n\n@{register}.add\ndef {function}():\n    return {value}\n\n\n")
            for place, function, value in zip(places, functions, draw.values(len(functions)))
        ]
        questions.append((f'assert {register}.names == ["', '", "'.join(functions) + '"]'))
    return Draft(facts, questions, set(drawn))


@family(GROUP, trained=True)
def count(draw: Draw, tokens: int) -> Draft:
    """Events logged once to six times; asked how often one of them was."""
    events = draw.names(max(2, min(8, tokens // 128)))
    facts, questions = [], []
    for event in events:
        times = draw.rng.randint(1, min(6, tokens // 64))
        facts += [(draw.depth(), f'log.append("{event}")\n') for _ in range(times)]
        questions.append((f'assert log.count("{event}") == ', str(times)))
    return Draft(facts, questions, set(events))
