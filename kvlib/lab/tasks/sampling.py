"""Drawing a prompt of any family from a seed."""

from kvlib.lab.tasks.catalogue import find
from kvlib.lab.tasks.prompt import Prompt


def sample(task: str, tokens: int, seed: int, *, tokenizer, **options) -> Prompt:
    """Draw one `Prompt` of at most `tokens` tokens, answers included, and at most 2 % (and 8) fewer.

    options: `text`, what hides the facts instead of the family's own filler; others go to the task (`depth` of a
    needle).

    Raises ValueError for an unknown task, a prompt too short, an option out of range, a seed without text.
    """
    family = find(task)
    if tokens < family.shortest:
        raise ValueError(f"tokens={tokens}: at least {family.shortest}")
    return family.draw(family, tokens, seed, tokenizer=tokenizer, **options)
