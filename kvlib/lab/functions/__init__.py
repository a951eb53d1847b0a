"""Functions to be written from a docstring, and judged by running them.

`problem(seed, split)`: generated ones, composed of one to three steps over numbers, texts, lists and dictionaries; some
call small functions or use constants that stand above. Pairs of steps that follow each other in tests never do so in
training. `published.humaneval()`, `published.mbpp()`: those that people wrote.

`cut(text)` is the completion in what a model has written, `run` and `run_all` say how it fares.
"""

from kvlib.lab.functions.cutting import cut
from kvlib.lab.functions.generating import problem
from kvlib.lab.functions.problems import Problem
from kvlib.lab.functions.running import KINDS, Outcome, run, run_all

__all__ = ["KINDS", "Outcome", "Problem", "cut", "problem", "run", "run_all"]
