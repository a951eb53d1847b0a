"""Two facts from different places, or from different files, are needed for an answer."""

from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.planted import MOST, family
from kvlib.lab.tasks.words import Draw

GROUP = "multi-document QA"


@family(GROUP, trained=True)
def two_hop(draw: Draw, tokens: int) -> Draft:
    """Variables bound to numbers, later others bound to those; asked which variable one is, and what number.

    The answer names the variable between: without it, pilots of 250 M tokens stayed at chance.
    """
    count = min(MOST, max(2, tokens // 128))
    names, values = draw.names(2 * count), draw.values(count)
    facts, questions = [], []
    for first, second, value in zip(names[:count], names[count:], values):
        early, late = sorted((draw.depth(), draw.depth()))
        facts += [(early, f"{first} = {value}\n"), (late, f"{second} = {first}\n")]
        questions.append((f"assert {second} is", f" {first} == {value}"))
    return Draft(facts, questions, set(names))


@family(GROUP, trained=True)
def file_lookup(draw: Draw, tokens: int) -> Draft:
    """Files that define the same constants; asked for the constant of one file."""
    headers, facts, spans = files(draw, tokens)
    constants = draw.names(2)
    values = iter(draw.values(2 * len(spans)))
    questions = []
    for file, start, end in spans:
        for constant in constants:
            value = next(values)
            facts.append((draw.rng.uniform(start, end), f"{constant} = {value}\n"))
            questions.append((f"assert {file}.{constant} == ", str(value)))
    return Draft(facts, questions, {*headers, *constants})


@family(GROUP, trained=False)
def override(draw: Draw, tokens: int) -> Draft:
    """Settings made, and made again once or twice; asked for the value that is valid in the end."""
    count = min(MOST, max(2, tokens // 128))
    names, values = draw.names(count), iter(draw.values(3 * count))
    facts, questions = [], []
    for name in names:
        places = sorted(draw.depth() for _ in range(draw.rng.randint(2, 3)))
        settings = [(place, f"{name} = {next(values)}\n") for place in places]
        facts += settings
        questions.append((f"assert {name} == ", settings[-1][1].split()[-1]))
    return Draft(facts, questions, set(names))


def files(draw: Draw, tokens: int) -> tuple[list[str], list, list[tuple[str, float, float]]]:
    """A prompt divided into files: their names, the header lines as facts, and (name, start, end) in depths."""
    names = draw.names(min(8, max(2, tokens // 256)))
    starts = [i / len(names) for i in range(len(names) + 1)]
    headers = [(start, f"\n# {name}.py\n") for start, name in zip(starts, names)]
    # a hair after its header, so that facts sort behind it and before the next one
    spans = [(name, start + 1e-6, end - 1e-6) for name, start, end in zip(names, starts, starts[1:])]
    return names, headers, spans
