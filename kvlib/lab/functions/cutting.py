"""Where a completion ends."""

from itertools import takewhile


def cut(text: str) -> str:
    """What a model has written, up to the first blank line or the next `def` at the left margin.

    The rule of AnchorCoder's authors (NUAAZXY/Anchor_Coder ac7bfd1), for every model the same. Bodies of functions that
    have blank lines are cut off there.
    """
    lines = text.splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.strip() and not line.startswith("def "), lines))
