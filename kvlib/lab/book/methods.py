"""A page for each registered method: what it keeps, its source, settings and whose they are, results, tests, code."""

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

from kvlib.core.method import METHODS, Budgeted, Method
from kvlib.lab.book import results, verdicts
from kvlib.lab.book.tables import cells, rows, table

DEFAULTS = "its authors' class or library", "its authors' experiments", "kvpress 0.5.5", "here"
BUDGET = "a share of the prompt, or a number of tokens (of what is kept or, by a method that reads, of what is read)"


def pages(root: Path) -> dict[str, str]:
    """An index and one page a method, in the order of README's table."""
    short, shipped = in_short(root), [name for name, cls in METHODS.items() if cls.__module__.startswith("kvlib.")]
    names = sorted(shipped, key=lambda name: list(short).index(name) if name in short else len(short))
    body = [[f"[`{name}`]({name}.md)", *short.get(name, ("", ""))] for name in names]
    index = "# Methods\n\nOne page each, made from its class, the tables and the tests.\n\n"
    index += table(["method", "keeps", "source"], body)
    index += "\n```{toctree}\n:hidden:\n\n" + "".join(f"{name}\n" for name in names) + "```\n"
    lessons, measured, claims = results.lessons(root), results.means(root), verdicts.ledger(root)
    made = {"methods/index.md": index}
    for name in names:
        found = results.section(name, lessons, measured), verdicts.about(name, claims)
        made[f"methods/{name}.md"] = page(root, name, short.get(name, ("", "")), *found)
    return made


def page(root: Path, name: str, short: tuple[str, str], measured: str, decided: str) -> str:
    cls, (keeps, source) = METHODS[name], short
    parts = [f"# {name}"]
    parts += [f"**Keeps** {keeps}."] if keeps else []
    parts += [f"**Source:** {source or 'none; it is a control, or ours'}."]
    parts += [f"**Known from:** {known}."] if (known := known_from(root, name)) else []
    parts += [f"**Budget:** {BUDGET if issubclass(cls, Budgeted) else 'none'}.", f"```python\n{call(cls)}\n```"]
    parts += ["## What it does", *docstring(cls)]
    parts += ["## Whose defaults", whose(root, name)]
    parts += ["## Results", measured, "## Verdicts", decided]
    parts += ["## Tests", tests(root, name), "## Code", code(cls)]
    return "\n\n".join(parts) + "\n"


def in_short(root: Path) -> dict[str, tuple[str, str]]:
    """Method -> what it keeps and its source, from README's table; a row may be about several."""
    found = {}
    for names, keeps, source in rows((root / "README.md").read_text(), "## Methods"):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), (keeps, source))
    return found


def known_from(root: Path, name: str) -> str:
    """How well the original is known, where the table of systems says it."""
    body = rows((root / "kvlib" / "methods" / "systems" / "README.md").read_text(), "named beside")
    return next((known for _, here, known in body if name in re.findall(r"`(\w+)`", here)), "")


def call(cls: type[Method]) -> str:
    """The call that makes the method with its defaults."""
    arguments = [f"{field.name}={field.default!r}" for field in dataclasses.fields(cls)]
    whole = f"kvlib.method({', '.join([repr(cls.name), *arguments])})".replace("'", '"')
    return "\n".join(textwrap.wrap(whole, 88, subsequent_indent=" " * 13, break_long_words=False))


def docstring(cls: type[Method]) -> list[str]:
    """The class's docstring as Markdown; the lists of arguments and errors become lists."""
    parts, *sections = re.split(r"(?m)^(Args|Raises):\n", inspect.cleandoc(cls.__doc__))
    parts = [parts.strip()]
    for kind, text in zip(sections[::2], sections[1::2]):
        entries = re.split(r"\n(?=\S)", textwrap.dedent(text).strip())
        entries = [re.sub(r"^([\w, .]+?):", r"**\1:**", " ".join(entry.split())) for entry in entries]
        parts += [f"**{'Settings' if kind == 'Args' else 'Errors'}**", "".join(f"- {entry}\n" for entry in entries)]
    return parts


def whose(root: Path, name: str) -> str:
    text = (root / "kvlib" / "methods" / "README.md").read_text()
    line = re.search(rf"(?m)^\| `{name}` \|.*$", text)
    if not line:
        return "No source has settings for it."
    said = [list(pair) for pair in zip(DEFAULTS, cells(line[0])[1:]) if pair[1] != "–"]
    return table(["where", "settings"], said) + "\nWhere no settings are known the row is left out."


def tests(root: Path, name: str) -> str:
    """The files that name the method, behind those that run every registered one."""
    files = sorted((root / "tests").rglob("test_*.py"))
    naming = [path.relative_to(root).as_posix() for path in files if f'"{name}"' in path.read_text()]
    listed = "".join(f"- `{path}`\n" for path in naming)
    return "Every registered method goes through `tests/test_generic.py`. Files that name this one:\n\n" + (
        listed or "- none\n"
    )


def code(cls: type[Method]) -> str:
    """The class without its docstring, folded."""
    source = textwrap.dedent(inspect.getsource(cls)).replace(f'"""{cls.__doc__}"""\n', "", 1)
    lines = re.sub(r":\n\s*\n", ":\n", source, count=1).strip()
    summary = f"<summary><code>{cls.__module__}</code></summary>"
    return f"```{{raw}} html\n<details>{summary}\n```\n\n```python\n{lines}\n```\n\n```{{raw}} html\n</details>\n```"
