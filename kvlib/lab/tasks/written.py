"""Functions to be written from their docstrings (`kvlib.lab.functions`), which are judged by running them."""

from kvlib.lab.tasks.catalogue import Family, enter
from kvlib.lab.tasks.prompt import Prompt, begin, cut

SHORTEST = 128  # tokens; some problems have more than 400


def function(seed: int):
    """A generated function, of a docstring with examples, and what must hold of it."""
    from kvlib.lab.functions.generating import problem  # here, because generated functions are made of tasks' words

    return problem(seed, "test")


def prompt(family: Family, tokens: int, seed: int, *, tokenizer) -> Prompt:
    """What stands above the function's body, as long as it is, but for the newline before it.

    Tokenizers may join this newline with the indentation, which a prompt that ends with it would prevent.

    Raises:
        ValueError: if prompt and reference together have more tokens.
    """
    made = family.make(seed)
    text = begin(tokenizer) + made.prompt.removesuffix("\n")
    drawn = cut(family.name, seed, text, len(text), f"\n{made.solution}", tokenizer)
    if drawn.length > tokens:
        raise ValueError(f"tokens={tokens}: {family.name}, seed {seed}, has {drawn.length}")
    return drawn


enter(Family("function", "function", "run", float("nan"), function, prompt, SHORTEST))
