"""RULER's single needle in fewer tokens: does a comparison of methods hang on how a tokenizer writes numbers?

SmolLM2 writes one token a digit, as Llama 2 does; others write three digits in one, so that a needle has three tokens
where it had seven, and a method must keep fewer in a row. No such model is at hand. Here the number is spelled so:
with three digits, or as three words of a token each, which tell as many numbers apart as six digits.
"""

from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.needles import HIDDEN, hide
from kvlib.lab.tasks.natural.words import Draw
from kvlib.lab.tasks.words import NOUNS

GROUP = "spelling"
PARTS = 3  # tokens of the answer


@family(GROUP)
def number_short(draw: Draw) -> Draft:
    """One magic number of three digits."""
    return asked(draw, *draw.numbers(1, PARTS))


@family(GROUP)
def number_in_words(draw: Draw) -> Draft:
    """Three words in place of a number, each of them one token."""
    short = [noun for noun in NOUNS if len(draw.tokenizer(f" {noun}", add_special_tokens=False).input_ids) == 1]
    return asked(draw, " ".join(draw.some(short, PARTS)))


def asked(draw: Draw, number: str) -> Draft:
    """The wording of `number`."""
    (city,), (depth,) = draw.cities(1), draw.depths(1)
    subject = f"special magic number for {city} mentioned in the provided text"
    return Draft([(depth, hide(city, number))], f"What is the {subject}?", f"The {subject} is", (f" {number}",), HIDDEN)
