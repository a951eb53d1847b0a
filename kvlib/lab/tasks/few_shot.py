"""Solved examples among the code say what is asked for."""

from itertools import permutations, product

from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.planted import MOST, family
from kvlib.lab.tasks.words import ADJECTIVES, NOUNS, Draw, belongs, nouns_of

GROUP = "few-shot"
# which parts of (adjective, noun, number) are written, in which order, with what between them
TRANSFORMS = [(*order, mark) for size in (2, 3) for order in permutations(range(3), size) for mark in "-./:+"]
# brackets around the name, what stands between question and answer, how the answer is written
WRITTEN = ("{}", '"{}"', "<{}>", "({})", "{}.")
SYNTAXES = list(product(["()", "<>", "[]", "{}", "||"], ["->", "=>", ":", "=", "~", "is"], WRITTEN))


@family(GROUP, trained=True)
def label(draw: Draw, tokens: int) -> Draft:
    """Names labelled by their first word; asked for the label of a name that has not occurred."""
    nouns = nouns_of(draw.split)
    labels = draw.rng.sample([noun for noun in NOUNS if belongs(noun, draw.split)], 8)
    shots = 3 if tokens >= 256 else 2
    adjectives = draw.rng.sample(ADJECTIVES, max(2, min(12, tokens // 128)))
    facts, questions, names = [], [], set()
    for adjective in adjectives:
        answer = draw.rng.choice(labels)
        *shown, asked = (f"{adjective}_{noun}" for noun in draw.rng.sample(nouns[adjective], shots + 1))
        facts += [(draw.depth(), f'assert kind("{name}") == "{answer}"\n') for name in shown]
        questions.append((f'assert kind("{asked}") == "', f'{answer}"'))
        names |= {*shown, asked}
    return Draft(facts, questions, names)


@family(GROUP, trained=True)
def transform(draw: Draw, tokens: int) -> Draft:
    """Two functions that write a name and a number in another way; asked what one makes of new ones.

    The ways of the two splits differ.
    """
    facts, questions, functions = [], [], draw.names(2 if tokens >= 320 else 1)
    shots = 4 if tokens >= 640 else 2 if tokens >= 160 else 1
    for function in functions:
        *order, mark = draw.pattern(TRANSFORMS)
        for i, (name, value) in enumerate(zip(draw.names(shots + 4), draw.values(shots + 4))):
            parts = [*name.split("_"), str(value)]
            call, answer = f'assert {function}("{name}", {value}) == "', mark.join(parts[j] for j in order) + '"'
            if i < shots:
                facts.append((draw.depth(), f"{call}{answer}\n"))
            else:
                questions.append((call, answer))
    return Draft(facts, questions, set(functions))


@family(GROUP, trained=True)
def shown_syntax(draw: Draw, tokens: int) -> Draft:
    """Constants, and solved questions in a made-up syntax, which tests alone use; asked in it, answered in it."""
    shots = 3 if tokens >= 256 else 2 if tokens >= 160 else 1
    count = min(MOST, max(shots + 2, tokens // 128))
    names, values = draw.names(count), draw.values(count)
    (left, right), arrow, written = draw.pattern(SYNTAXES)
    word = draw.rng.choice([noun for noun in NOUNS if belongs(noun, draw.split)])
    facts = [(draw.depth(), f"{name} = {value}\n") for name, value in zip(names, values)]
    pairs = list(zip(names, values))
    asked = [(f"{word}{left}{name}{right} {arrow}", f" {written.format(value)}") for name, value in pairs]
    facts += [(draw.rng.uniform(0.5, 1), f"# {question}{answer}\n") for question, answer in asked[:shots]]
    return Draft(facts, [(f"# {question}", answer) for question, answer in asked[shots:]], set(names))
