"""A method with its budget and other arguments: what a cell of a table is about."""

import json
from dataclasses import dataclass

import kvlib
from kvlib.core.method import budgeted


@dataclass(frozen=True)
class Configuration:
    """A method, its budget and, as JSON, its other arguments: what identifies a cell of a table.

    budget: 1.0 for a method that takes none.
    """

    method: str
    budget: float
    arguments: str = "{}"

    def make(self):
        """The method. Raises ValueError as `kvlib.method` does, and for a budget of a method that takes none."""
        arguments = json.loads(self.arguments)
        if self.budget == 1.0 and self.method not in budgeted():
            return kvlib.method(self.method, **arguments)
        return kvlib.method(self.method, budget=self.budget, **arguments)
