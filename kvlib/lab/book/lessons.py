"""Lessons as the book shows them, and what their first cells say about them."""

import re
from dataclasses import dataclass
from pathlib import Path

from kvlib.lab.book import citations
from kvlib.lab.notebooks.files import all_notebooks, code_cells, read, to_text

SAVED = re.compile(r'(?m)^\s*save\(\w+, "(\w+)"')

ELSEWHERE = re.compile(r"\[([^]]+)\]\(\.\./(?!data/VERDICTS|kvlib/methods/)[\w/]+\.md\)")


@dataclass(frozen=True)
class Lesson:
    """A lesson as its title cell describes it."""

    stem: str
    title: str
    question: str
    needs: str
    minutes: str
    exercises: tuple[str, ...]  # "★★, 20 minutes"

    @property
    def number(self) -> str:
        return self.stem.partition("_")[0]

    @property
    def link(self) -> str:
        return f"[{self.number}](notebooks/{self.stem}.ipynb)"


def every(root: Path) -> list[Lesson]:
    return [described(path) for path in all_notebooks(root)]


def described(path: Path) -> Lesson:
    """Raises ValueError if the title cell does not say what it has to say."""
    cells = [cell["source"] for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    patterns = {
        "title": r"\A# \w+ (.+)",
        "question": r"\*\*The question\.\*\* (.+?)(?:\n\n|\Z)",
        "needs": r"\*\*You need\*\* (.+?)\s*\*\*Time",
        "minutes": r"\*\*Time:\*\* (.*?minutes)",
    }
    said = {name: re.search(pattern, cells[0], 0 if name == "title" else re.S) for name, pattern in patterns.items()}
    if missing := [name for name, match in said.items() if match is None]:
        raise ValueError(f"{path.name}: its first cell does not say {', '.join(missing)}")
    exercises = re.findall(r"(?m)^\*\*Exercise \d+ (★+) \(([^)]+)\)", "\n".join(cells))
    said = {name: seen_from_above(" ".join(match[1].split())) for name, match in said.items()}
    return Lesson(path.stem, **said, exercises=tuple(", ".join(pair) for pair in exercises))


def seen_from_above(text: str) -> str:
    """Links to other lessons, as they have to be on a page beside the folder of lessons."""
    return re.sub(r"\]\((\w+\.ipynb)\)", r"](notebooks/\1)", text)


def alt_texts(notebook: dict) -> dict[str, str]:
    """Figure name -> the alternative text of the cell that saves it."""
    return {
        name: cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        for cell in code_cells(notebook)
        for name in SAVED.findall(cell["source"])
    }


def copy(path: Path) -> str:
    """The lesson as it is stored, with three differences.

    Captions of figures are in its prose, so that those that cells have go. Citations become links to the references.
    Links to READMEs of the repository that are no pages of the book become plain words.
    """
    notebook = read(path)
    prose = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    numbers = set().union(*(citations.listed(cell["source"]) for cell in prose))
    for cell in notebook["cells"]:
        cell["metadata"].get("mystnb", {}).pop("figure", None)
    for cell in prose:
        cell["source"] = citations.linked(ELSEWHERE.sub(r"\1", cell["source"]), numbers)
    return to_text(notebook)


def overview(root: Path) -> str:
    """notebooks/README.md, with a page of its own for the glossary."""
    text, _, _ = (root / "notebooks" / "README.md").read_text().partition("## Glossary")
    text = text.replace("](solutions)", "](solutions/00a_cache.ipynb)")
    return text + "**Unknown words** are in the [glossary](../glossary.md).\n"
