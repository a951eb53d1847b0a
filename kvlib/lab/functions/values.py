"""Parameters of generated functions: how they are named, what is passed to them, and what steps make of them."""

import random
from dataclasses import dataclass

NOUNS = {  # parameter and what it consists of, or the plural of the latter
    "number": "number year level".split(),
    "numbers": "price score age height weight mark distance temperature speed reading delay grade".split(),
    "text": "sentence message line phrase text title remark".split(),
    "words": "name fruit animal color tool flower planet river bird".split(),
    "table": ["stock name amount", "votes person vote", "ages child age", "prices article price", "points team point"],
}
WORDS = """
apple pear plum lemon cherry banana fig grape melon olive bear cat dog fox lion mouse otter rabbit tiger wolf blue red
green gold amber pink river lake forest mountain desert ocean island stone bread milk butter cheese salt letter paper
pencil rose lily tulip fern moss robin crow falcon swan
""".split()


@dataclass(frozen=True)
class Value:
    """A variable between two steps: its kind, and the words for what it consists of."""

    kind: str
    variable: str
    item: str
    key: str = ""
    given: bool = False  # a parameter

    def words(self) -> dict[str, str]:
        """Placeholders of a step that takes it."""
        them = "them" if self.kind in ("numbers", "words") else "it"
        it = f"the {self.variable.replace('_', ' ')}" if self.given else them
        return {"source": self.variable, "it": it, "item": self.item, "items": f"{self.item}s", "key": self.key}

    def after(self, kind: str, variable: str, item: str) -> "Value":
        """What a step makes of it; `item`: what that consists of, a dictionary's key behind it."""
        item, _, key = (item or self.item).partition(" ")
        item = "letter" if kind == "text" else item
        return Value(kind, variable, item, key or self.key)


def parameter(kind: str, rng: random.Random) -> Value:
    noun = rng.choice(NOUNS[kind])
    if kind == "table":
        variable, key, item = noun.split()
        return Value(kind, variable, item, key, given=True)
    if kind == "text":
        return Value(kind, noun, "letter", given=True)
    return Value(kind, noun if kind == "number" else f"{noun}s", noun, given=True)


def number(rng: random.Random) -> int:
    return rng.randint(0, 40)


def numbers(rng: random.Random) -> list[int]:
    size = rng.choice((0, 1, 3, 3, 4, 4, 5, 5, 6))
    return [rng.randint(-8, 15) for _ in range(size)]


def words(rng: random.Random) -> list[str]:
    pool = rng.sample(WORDS, 5)
    return [rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 3, 3, 4, 4)))]


def text(rng: random.Random) -> str:
    parts = rng.sample(WORDS, rng.choice((1, 2, 2, 3)))
    parts = [part.capitalize() if rng.random() < 0.2 else part for part in parts]
    if rng.random() < 0.4:
        parts.insert(rng.randrange(len(parts) + 1), str(rng.randint(1, 99)))
    return "" if rng.random() < 0.05 else " ".join(parts)


def table(rng: random.Random) -> dict[str, int]:
    return {key: rng.randint(0, 12) for key in rng.sample(WORDS, rng.choice((0, 1, 2, 3, 3, 4)))}


DRAW = {"number": number, "numbers": numbers, "text": text, "words": words, "table": table}
