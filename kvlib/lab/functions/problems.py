"""A function to be written: what is told about it, how a reference writes it, and what must hold of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A function to be written.

    Attributes:
        prompt: whatever stands above the function, its signature and its docstring; ends with a newline.
        solution: the body of the reference, without the last newline.
        asserts: lines of Python, on other arguments than the docstring's.
        composition: names of the steps that the function was composed of.
    """

    name: str
    prompt: str
    solution: str
    asserts: tuple[str, ...]
    composition: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Prompt and solution, as a training text."""
        return f"{self.prompt}{self.solution}\n"
