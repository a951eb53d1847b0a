"""Books of PG-19 (1911.05507), which are not shipped: how well what follows is foretold, book by book.

The protocol is that of `prose_bits`: a stretch of a book is read and compressed, the next sentences of it, 64 to 96
tokens, cost the model so many bits per character. Bits are comparable between models with different tokenizers;
perplexities are not.
"""

from collections.abc import Callable
from contextlib import suppress

from kvlib.lab.evaluation.benchmarks.loading import data, load
from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.natural.composing import CHARACTERS, SHORTEST
from kvlib.lab.tasks.natural.label_free import SEEDS, continued, prose_bits
from kvlib.lab.tasks.natural.texts import Text, sentences
from kvlib.lab.tasks.prompt import Prompt

WINDOWS = 4  # of a book, at most


def read_books() -> list[str]:
    """The texts of the 100 test books. Errors as of `load`."""
    return [book["text"] for book in load("pg19")]


def book_bits(seed: int, characters: int, text: Text, count: Callable) -> tuple[list[str], str]:
    """As `prose_bits`, at the first place of this window's that has sentences of the right length."""
    for place in range(seed, SEEDS, WINDOWS) if seed < WINDOWS else ():
        with suppress(ValueError):
            return prose_bits(place, characters, text, count)
    raise ValueError(f"window {seed} of a book: there are {WINDOWS}, with {characters} characters before each")


def of_book(family: Family, tokens: int, seed: int, *, tokenizer) -> Prompt:
    """A window of a book, of each that is long enough in turn: with as many seeds as books each counts once."""
    books = [book for book in data(read_books) if len(book) > 1.25 * CHARACTERS * tokens]
    if not books:
        raise ValueError(f"tokens={tokens}: no book is long enough")
    turn, place = divmod(seed, len(books))
    return continued(family, tokens, turn, tokenizer=tokenizer, text=sentences(books[place]))


enter(Family("pg19", "book", "bits", float("nan"), book_bits, of_book, SHORTEST))
