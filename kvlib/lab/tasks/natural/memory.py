"""What stood in the text word for word, and rules that examples show."""

from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.texts import novel
from kvlib.lab.tasks.natural.words import ADJECTIVES, KINDS, Draw

SHOWN, ASKED = 8, 5  # words of a sentence
SHOTS = 4


@family("synthetic")
def recall(draw: Draw) -> Draft:
    """A sentence from elsewhere in the novel; asked for the five words behind its first eight."""
    while True:
        sentence = draw.rng.choice(novel().pieces).strip()
        words = sentence.split()
        plain = sentence.replace(",", "").replace(" ", "").rstrip(".").isalpha()
        if plain and SHOWN + ASKED < len(words) <= 30:
            break
    shown, asked = " ".join(words[:SHOWN]), " ".join(words[SHOWN : SHOWN + ASKED])
    question = f'A sentence of the text begins with "{shown}". How does it continue?'
    return Draft([(draw.depths(1)[0], sentence)], question, shown, (f" {asked.rstrip(',')}",))


@family("synthetic")
def saying(draw: Draw) -> Draft:
    """A made-up saying that occurs three times; asked for its second half."""
    first, second, third, fourth = draw.nouns(4)
    a, b, c, d = draw.some(ADJECTIVES, 4)
    half, rest = f"the {a} {first} greets the {b} {second},", f" and the {c} {third} greets the {d} {fourth}"
    openings = ("They have a saying here:", "As the old saying goes:", "And again they said:")
    facts = [(depth, f"{opening} {half}{rest}.") for depth, opening in zip(draw.depths(3), openings)]
    question = f'The text has a saying that begins with "{half}" How does it continue?'
    return Draft(facts, question, f"The saying is: {half}", (rest,))


@family("few-shot", guess=1 / 4, name="class_label")
def label(draw: Draw) -> Draft:
    """Things labelled by their class, with invented labels; asked for the label of one that has not occurred."""
    kinds, labels = draw.some(list(KINDS), 4), draw.invented(4)
    facts, asked = [], None
    depths = iter(draw.depths(4 * SHOTS))
    for kind, name in zip(kinds, labels):
        *shown, new = draw.some(KINDS[kind], SHOTS + 1)
        facts += [(next(depths), f"Label of {thing}: {name}.") for thing in shown]
        asked = asked or (new, name)
    return Draft(facts, f"What is the label of {asked[0]}?", f"Label of {asked[0]}:", (f" {asked[1]}",))
