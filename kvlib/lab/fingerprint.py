"""A hash of what a function or class does: its source and that of everything in kvlib it uses by name.

Comments, docstrings and layout do not count, nor does what is reached through arguments (`view.protect`): that is the
library under everything, for which the recomputed samples vouch.
"""

import ast
import hashlib
import inspect
import json
import re
import textwrap
from functools import cache
from types import CodeType, FunctionType, ModuleType

from kvlib.core.method import Method
from kvlib.lab.notebooks import skeleton


def names(code: CodeType) -> set[str]:
    """The global names that a function's code, and the code inside it, refers to."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names, inner))


def functions(thing) -> list[FunctionType]:
    """A function itself, or the functions that a class defines."""
    if isinstance(thing, FunctionType):
        return [thing]
    around = ("fget", "func", "__func__")  # a property, a cached property, a class method
    found = [next((getattr(v, name) for name in around if hasattr(v, name)), v) for v in vars(thing).values()]
    return [value for value in found if isinstance(value, FunctionType) and value.__module__ == thing.__module__]


def constant(value) -> str | None:
    """A constant as text, None for what is more than numbers, strings and containers of them, or a pattern."""
    if isinstance(value, re.Pattern):
        return value.pattern
    text = ascii(sorted(value) if isinstance(value, set | frozenset) else value)
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None
    return text


@cache
def tree(thing) -> object:
    """The syntax tree of a function or class."""
    return skeleton(ast.parse(textwrap.dedent(inspect.getsource(thing))))


def parts(thing, found: dict[str, object]) -> None:
    """Collect into `found`, by qualified name, the syntax tree of `thing` and of what it uses, and plain constants."""
    thing = inspect.unwrap(thing)
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name in found or not thing.__module__.startswith("kvlib") or thing is Method:
        return
    found[name] = tree(thing)
    for base in getattr(thing, "__bases__", ()):
        parts(base, found)
    for function in functions(thing):
        for used in names(function.__code__) & function.__globals__.keys():
            value = function.__globals__[used]
            if isinstance(value, ModuleType) and value.__name__.startswith("kvlib."):
                inside = {name: vars(value).get(name) for name in names(function.__code__)}
                for name, thing_inside in inside.items():
                    add(f"{value.__name__}.{name}", thing_inside, found)
            else:
                add(f"{function.__module__}.{used}", value, found)


def add(name: str, value, found: dict[str, object]) -> None:
    """A function or class with its parts, or a constant; nothing for anything else."""
    if callable(value):
        value = inspect.unwrap(value)  # from under a cache
    if isinstance(value, type | FunctionType):
        parts(value, found)
    elif value is not None and (text := constant(value)) is not None:
        found[name] = text


@cache
def fingerprint(*things) -> str:
    """Sixteen hexadecimal digits for functions and classes together."""
    found: dict[str, object] = {}
    for thing in things:
        parts(thing, found)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
