"""The glossary of notebooks/README.md as one that Sphinx can link to."""

from pathlib import Path

from kvlib.lab.book.tables import rows


def page(root: Path) -> str:
    words = rows((root / "notebooks" / "README.md").read_text(), "## Glossary")
    body = "\n".join(f"{word}\n  {meaning}\n" for word, meaning in sorted(words, key=lambda row: row[0].lower()))
    return f"```{{glossary}}\n{body}```\n"
