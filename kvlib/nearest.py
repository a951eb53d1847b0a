"""Errors that help to find a name."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`: with the nearest one or, if none is near, with all."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return ValueError(f"unknown {what} {name!r}; {hint}")
