"""Passages that hold several things: lists, tables, a procession. Where several are asked for, each counts."""

from itertools import pairwise

from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.words import GOODS, PROFESSIONS, Draw

GROUP = "aggregation"


@family(GROUP, metric="share", guess=1 / 2)
def guests(draw: Draw) -> Draft:
    """The guests of two dinners; asked for those of one."""
    cities, people = draw.cities(2), draw.people(10)
    parties = people[:5], people[5:]
    facts = [
        (depth, f"The guests at the dinner in {city} were {', '.join(party[:-1])} and {party[-1]}.")
        for depth, city, party in zip(draw.depths(2), cities, parties)
    ]
    question = f"Who were the guests at the dinner in {cities[0]}?"
    answers = tuple(f" {person}" for person in parties[0])
    return Draft(facts, question, f"The guests at the dinner in {cities[0]} were", answers)


@family(GROUP, metric="share")
def cargoes(draw: Draw) -> Draft:
    """Goods that one ship took on, told in four places; asked for all."""
    (port,), goods = draw.cities(1), draw.some(GOODS, 4)
    facts = [(depth, f"The ship from {port} took on a cargo of {good}.") for depth, good in zip(draw.depths(4), goods)]
    question = f"Which four cargoes did the ship from {port} take on?"
    return Draft(facts, question, f"The ship from {port} took on cargoes of", tuple(f" {good}" for good in goods))


@family(GROUP, metric="share")
def table_row(draw: Draw) -> Draft:
    """A table of eight people; asked for the row of one."""
    people, jobs, cities, numbers = draw.people(8), draw.some(PROFESSIONS, 8), draw.cities(8), draw.numbers(8, 3)
    rows = list(zip(people, jobs, cities, numbers))
    lines = ["| Name | Profession | City | Room |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in draw.rng.sample(rows, len(rows))]
    question = f"Copy the row of {people[0]} from the table."
    return Draft(
        [(draw.depths(1)[0], "\n".join(lines))], question, f"| {people[0]} |", tuple(f" {x}" for x in rows[0][1:])
    )


@family(GROUP, guess=1 / 8)
def register(draw: Draw) -> Draft:
    """Eight people with the numbers of their rooms, line by line; asked for one."""
    people, numbers = draw.people(8), draw.numbers(8, 3)
    lines = [f"Room of {person}: {number}" for person, number in zip(people, numbers)]
    block = "\n".join(draw.rng.sample(lines, len(lines)))
    question = f"What is the number of the room of {people[0]}?"
    return Draft([(draw.depths(1)[0], block)], question, f"Room of {people[0]}:", (f" {numbers[0]}",))


@family(GROUP, guess=1 / 8)
def procession(draw: Draw) -> Draft:
    """Eight people who walk one behind the other; asked who walks behind one of them."""
    people = draw.people(8)
    at = draw.rng.randrange(7)
    steps = [f"behind {first} walked {second}" for first, second in pairwise(people)]
    fact = f"The procession began with {people[0]}; {', '.join(steps)}."
    question = f"Who walked behind {people[at]} in the procession?"
    return Draft([(draw.depths(1)[0], fact)], question, f"Behind {people[at]} walked", (f" {people[at + 1]}",))
