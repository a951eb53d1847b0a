"""Functions to be written from a docstring, and judged by running them."""

from kvlib.lab.functions.generating import problem
from kvlib.lab.functions.problems import Problem

__all__ = ["Problem", "problem"]
