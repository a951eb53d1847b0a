"""Questions about statements that stand among the novel's sentences, most of them beside others of the same kind."""

from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.words import BUILDINGS, GOODS, PROFESSIONS, QUOTES, Draw

SINGLE, MULTI = "single-document QA", "multi-document QA"


def about_the_first(draw: Draw, statements: list[tuple[str, str]], question: str) -> Draft:
    """Statements, each as a lead and the answer that ends its sentence; asked for the first."""
    facts = [(depth, f"{lead}{answer}.") for depth, (lead, answer) in zip(draw.depths(len(statements)), statements)]
    return Draft(facts, question, statements[0][0], (statements[0][1],))


@family(SINGLE, guess=1 / 3)
def secret_word(draw: Draw) -> Draft:
    """Secret words of three cities; asked for one."""
    cities, words = draw.cities(3), draw.nouns(3)
    statements = [(f"The secret word of {city} is", f" {word}") for city, word in zip(cities, words)]
    return about_the_first(draw, statements, f"What is the secret word of {cities[0]}?")


@family(SINGLE, guess=1 / 3)
def profession(draw: Draw) -> Draft:
    """What three people earned their living as; asked for one."""
    people, jobs = draw.people(3), draw.some(PROFESSIONS, 3)
    statements = [(f"{person} earned a living as a", f" {job}") for person, job in zip(people, jobs)]
    return about_the_first(draw, statements, f"What did {people[0]} earn a living as?")


@family(SINGLE, guess=1 / 3)
def year(draw: Draw) -> Draft:
    """Three entries of a chronicle; asked for the year of one."""
    names, years = draw.some(BUILDINGS, 3), draw.numbers(3, 4)
    places = draw.cities(3)
    statements = [
        (f"The {name} of {place} was opened in the year", f" {when}") for name, place, when in zip(names, places, years)
    ]
    return about_the_first(draw, statements, f"In which year was the {names[0]} of {places[0]} opened?")


@family(SINGLE, guess=1 / 3)
def quantity(draw: Draw) -> Draft:
    """How many barrels of three goods a ship carried; asked for one."""
    goods, counts = draw.some(GOODS, 3), draw.numbers(3, 3)
    statements = [(f"The number of barrels of {good} in the hold was", f" {n}") for good, n in zip(goods, counts)]
    return about_the_first(draw, statements, f"How many barrels of {goods[0]} were in the hold?")


@family(SINGLE, guess=1 / 3)
def foreign_word(draw: Draw) -> Draft:
    """Three words of an invented language; asked what one thing is called in it."""
    nouns, words = draw.nouns(3), draw.invented(3)
    statements = [(f"The islanders' word for {noun} is", f" {word}") for noun, word in zip(nouns, words)]
    return about_the_first(draw, statements, f"What is the islanders' word for {nouns[0]}?")


@family(SINGLE, guess=1 / 3)
def speaker(draw: Draw) -> Draft:
    """Three quotations with their speakers; asked who said one."""
    quotes, people = draw.some(QUOTES, 3), draw.people(3)
    statements = [(f'"{quote}," said', f" {person}") for quote, person in zip(quotes, people)]
    return about_the_first(draw, statements, f'Who said "{quotes[0]}"?')


@family(MULTI, guess=1 / 3)
def two_hops(draw: Draw) -> Draft:
    """Three people's sisters, and where the sisters live; asked where the sister of one lives."""
    people, cities = draw.people(6), draw.cities(3)
    brothers, sisters = people[:3], people[3:]
    depths = draw.depths(6)
    facts = [(depth, f"The sister of {a} is {b}.") for depth, a, b in zip(depths[:3], brothers, sisters)]
    facts += [(depth, f"{b} lives in {city}.") for depth, b, city in zip(depths[3:], sisters, cities)]
    question = f"In which city does the sister of {brothers[0]} live?"
    return Draft(facts, question, f"The sister of {brothers[0]} lives in", (f" {cities[0]}",))
