"""What the pages for teaching are made of: the syllabus, the lecturer's notes, the slides.

Notes on a lesson are in docs/lecturer/<lesson>.yaml: `show`, its two best figures (or its only one) with what to say;
`questions` to discuss; `misconceptions`, each with what is right.
"""

from pathlib import Path

import yaml

from kvlib.lab.book.lessons import Lesson, alt_texts, every
from kvlib.lab.book.tables import rows, table
from kvlib.lab.notebooks.files import read


def parts(root: Path) -> dict[str, str]:
    """Name of a part, which a page of docs/ includes -> its text."""
    lessons = every(root)
    noted = [(lesson, notes(root, lesson)) for lesson in lessons]
    times = runtimes(root)
    taught = [(lesson, said) for lesson, said in noted if said]
    return {
        "sessions": sessions(lessons),
        "lecturer": "\n\n".join(guide(root, lesson, said, times.get(lesson.number, "")) for lesson, said in taught),
        "slides": "\n\n".join(slide(root, lesson, said) for lesson, said in taught),
    }


def notes(root: Path, lesson: Lesson) -> dict:
    """What a lecturer should know of the lesson; nothing if nobody has written it yet."""
    path = root / "docs" / "lecturer" / f"{lesson.stem}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def sessions(lessons: list[Lesson]) -> str:
    """One row a lesson, with what its own first cell says."""
    body = [
        [
            f"{lesson.link} {lesson.title}",
            lesson.question,
            lesson.minutes,
            lesson.needs,
            "; ".join(lesson.exercises).replace(" minutes", ""),
        ]
        for lesson in lessons
    ]
    return table(["session", "question", "time", "you need", "exercises, minutes"], body)


def runtimes(root: Path) -> dict[str, str]:
    """Number of a lesson -> how long its code runs."""
    return {row[0]: row[1] for row in rows((root / "notebooks" / "README.md").read_text(), "**Exercises**")}


def picture(root: Path, lesson: Lesson, shown: dict) -> str:
    name = f"{lesson.stem}_{shown['figure']}"
    alt = alt_texts(read(root / "notebooks" / f"{lesson.stem}.ipynb"))[name].translate(
        {ord(mark): " " for mark in "[]"}
    )
    return f"![{alt}](figures/{name}.svg)"


def guide(root: Path, lesson: Lesson, said: dict, times: str) -> str:
    """The lecturer's notes on one lesson."""
    lines = [f"## {lesson.number} {lesson.title}"]
    lines += [f"{lesson.link}, {lesson.minutes}. Its code runs in: {times}."]
    lines += [
        "**Show**",
        "\n".join(f"1. {shown['say']}\n\n   {picture(root, lesson, shown)}\n" for shown in said["show"]),
    ]
    lines += ["**Discuss**", "\n".join(f"- {question}" for question in said["questions"])]
    pairs = [f"- *“{pair['wrong']}”* {pair['right']}" for pair in said["misconceptions"]]
    return "\n\n".join([*lines, "**Common misconceptions**", "\n".join(pairs)])


def slide(root: Path, lesson: Lesson, said: dict) -> str:
    """One page with the question and its best pictures, two if the lesson has two."""
    pictures = [f"{picture(root, lesson, shown)}\n\n{shown['say']}" for shown in said["show"]]
    return "\n\n".join([f"## {lesson.number} {lesson.title}", f"**{lesson.question}**", *pictures])
