"""Source code: no chat format, and the text is held-out code."""

from kvlib.lab.tasks.code import heldout_files
from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.family import family
from kvlib.lab.tasks.natural.repeated import LINES, evenly
from kvlib.lab.tasks.natural.words import Draw
from kvlib.lab.tasks.prompt import boundary

GROUP = "code"


@family(GROUP, guess=1 / 4, code=True)
def constant(draw: Draw) -> Draft:
    """Four constants among lines of code; asked for the value of one."""
    names = [f"{a}_{b}".upper() for a, b in zip(draw.adjectives(4), draw.nouns(4))]
    values = draw.numbers(4, 5)
    facts = [(depth, f"{name} = {value}") for depth, name, value in zip(draw.depths(4), names, values)]
    return Draft(facts, f"assert {names[0]}", " ==", (f" {values[0]}",))


@family(GROUP, guess=1 / 4, code=True)
def returned(draw: Draw) -> Draft:
    """Four functions that return a text each; asked for the text of one."""
    names = [f"{a}_{b}" for a, b in zip(draw.adjectives(4), draw.nouns(4))]
    texts = draw.cities(4)
    facts = [
        (depth, f'\ndef {name}():\n    return "{text}"\n') for depth, name, text in zip(draw.depths(4), names, texts)
    ]
    return Draft(facts, f"assert {names[0]}()", ' == "', (texts[0],))


@family(GROUP, code=True)
def repeated_line(draw: Draw) -> Draft:
    """A file up to a line that stood in it before; asked for the line, all of it."""
    found = evenly(draw.tokens, draw.tokenizer)
    if draw.number >= len(found):
        raise ValueError(f"seed={draw.number}: held-out code has {len(found)} such lines")
    place = found[draw.number]
    lines = heldout_files()[place.file]["text"].split("\n")[: place.line + 1]
    lead, answer = split(lines[-2], lines[-1], draw.tokenizer)
    context, question = lines[: -LINES - 1], lines[-LINES - 1 : -2]
    return Draft([], "\n".join(question), lead, (answer,), text="\n".join(context))


def split(last: str, asked: str, tokenizer) -> tuple[str, str]:
    """A line and the beginning of the next as lead, the rest as answer, so that no token spans the two.

    Most tokenizers join the last space of the indentation to the word behind it, and the others to the newline.
    """
    indent = len(asked) - len(asked.lstrip())
    return boundary(f"\n{last}\n", f"{asked}\n", (max(0, indent - 1), indent, 0), tokenizer)
