"""Needles in the wordings of RULER (Hsieh et al., 2404.06654), and the pass key (Mohtashami and Jaggi, 2305.16300)."""

from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.words import Draw

GROUP = "synthetic"
HIDDEN = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards."
)
MANY = 4  # RULER's number of keys, of values and of queries
HOPS = 4


def hide(city: str, number: str) -> str:
    return f"One of the special magic numbers for {city} is: {number}."


def one_of(draw: Draw, keys: int) -> Draft:
    """Numbers of several cities; asked for one."""
    cities, numbers = draw.cities(keys), draw.numbers(keys, 7)
    facts = [(depth, hide(*pair)) for depth, *pair in zip(draw.depths(keys), cities, numbers)]
    subject = f"special magic number for {cities[0]} mentioned in the provided text"
    return Draft(facts, f"What is the {subject}?", f"The {subject} is", (f" {numbers[0]}",), HIDDEN)


@family(GROUP)
def number(draw: Draw) -> Draft:
    """One magic number hidden in the text: RULER's single needle."""
    return one_of(draw, 1)


@family(GROUP, guess=1 / MANY)
def number_of_four(draw: Draw) -> Draft:
    """Magic numbers of four cities; asked for one: RULER's needle with several keys."""
    return one_of(draw, MANY)


@family(GROUP, metric="share")
def all_numbers(draw: Draw) -> Draft:
    """Four magic numbers of one city; asked for all: RULER's needle with several values."""
    (city,), numbers = draw.cities(1), draw.numbers(MANY, 7)
    facts = [(depth, hide(city, number)) for depth, number in zip(draw.depths(MANY), numbers)]
    subject = f"special magic numbers for {city} mentioned in the provided text"
    answers = tuple(f" {number}" for number in numbers)
    return Draft(facts, f"What are all the {subject}?", f"The {subject} are", answers, HIDDEN)


@family(GROUP, metric="share")
def numbers_of_four(draw: Draw) -> Draft:
    """Magic numbers of four cities; asked for all: RULER's needle with several queries."""
    cities, numbers = draw.cities(MANY), draw.numbers(MANY, 7)
    facts = [(depth, hide(*pair)) for depth, *pair in zip(draw.depths(MANY), cities, numbers)]
    subject = f"special magic numbers for {', '.join(cities[:-1])}, and {cities[-1]} mentioned in the provided text"
    answers = tuple(f" {number}" for number in numbers)
    return Draft(facts, f"What are all the {subject}?", f"The {subject} are", answers, HIDDEN)


@family(GROUP, metric="share")
def variables(draw: Draw) -> Draft:
    """A chain of assignments; asked for all variables with its value: RULER's variable tracking."""
    (value,), names = draw.numbers(1, 5), [word[:5].upper() for word in draw.invented(HOPS + 1)]
    depths = sorted(draw.depths(HOPS + 1))
    sources = [value, *(f"VAR {name}" for name in names)]
    facts = [(depth, f"VAR {name} = {source}.") for depth, name, source in zip(depths, names, sources)]
    question = f"Find all variables that are assigned the value {value} in the text above."
    lead = (
        "According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    instruction = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    return Draft(facts, question, lead, tuple(f" {name}" for name in names), instruction)


@family(GROUP)
def pass_key(draw: Draw) -> Draft:
    """A pass key hidden in the text, stated twice in a row."""
    (key,) = draw.numbers(1, 5)
    facts = [(draw.depths(1)[0], f"The pass key is {key}. Remember it. {key} is the pass key.")]
    instruction = (
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there."
    )
    return Draft(facts, "What is the pass key?", "The pass key is", (f" {key}",), instruction)
