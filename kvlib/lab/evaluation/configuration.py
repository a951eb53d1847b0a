"""A method with its budget and other arguments: what a cell of a table is about."""

import json
from dataclasses import dataclass

import kvlib


@dataclass(frozen=True)
class Configuration:
    """A method, its budget and, as JSON, its other arguments: what identifies a cell of a table."""

    method: str
    budget: float
    arguments: str = "{}"

    def make(self):
        return kvlib.method(self.method, budget=self.budget, **json.loads(self.arguments))
