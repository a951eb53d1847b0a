"""Citations like "[3]" of a lesson's prose as links to its references."""

import re

CITED = re.compile(r"(?<![\w\])=!])\[\d+\](?![\w\[(:])|(?<=et al\. )\[\d+(?:, \d+)+\]")
LISTED = re.compile(r"(?m)^(\d+)\. ")
NOT_PROSE = re.compile(r"(`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$)", re.S)
HEADING = "## References"


def listed(text: str) -> set[str]:
    """The numbers of the references that a cell lists, below their heading."""
    return set(LISTED.findall(text.partition(HEADING)[2]))


def linked(text: str, numbers: set[str]) -> str:
    """A cell with an anchor at each reference it lists, and links to those of `numbers` from where they are cited.

    Several in one pair of brackets are citations behind "et al." only, since intervals and lists of layers look like
    that.
    """
    prose, heading, references = text.partition(HEADING)
    parts = NOT_PROSE.split(prose)
    parts[::2] = (CITED.sub(lambda found: link(found, numbers), part) for part in parts[::2])
    return "".join(parts) + heading + LISTED.sub(r'\1. <a id="reference-\1"></a>', references)


def link(found: re.Match, numbers: set[str]) -> str:
    def each(number: re.Match) -> str:
        return f'<a href="#reference-{number[0]}">{number[0]}</a>' if number[0] in numbers else number[0]

    return re.sub(r"\d+", each, found[0])
