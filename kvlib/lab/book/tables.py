"""Tables of Markdown, read and written."""

import re


def rows(text: str, heading: str = "") -> list[list[str]]:
    """The body of the first table behind `heading`, cell by cell; `\\|` in a cell is a bar."""
    _, found, rest = text.partition(heading)
    if not found and heading:
        raise ValueError(f"there is no heading {heading!r}")
    lines = re.search(r"(?m)(?:^\|.*\n?)+", rest)[0].splitlines()
    return [cells(line) for line in lines[2:]]


def cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def table(head: list[str], body: list[list[str]], numbers: int = 0) -> str:
    """A table whose last `numbers` columns are aligned to the right."""
    aligned = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [head, aligned, *([cell.replace("|", r"\|") for cell in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
