"""Functions to be written from a docstring, and judged by running them."""

from kvlib.lab.functions.problems import Problem, problem

__all__ = ["Problem", "problem"]
