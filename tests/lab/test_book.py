"""The book has a page for everything, says what its sources say, and leads nowhere outside."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from sphinx.cmd.build import main as sphinx

import kvlib
from kvlib.lab.book import checking, citations, course, lessons, mathml, methods, pages, references, tables
from kvlib.lab.notebooks import files
from kvlib.paths import ROOT

LESSONS = [pytest.param(lesson, id=lesson.stem) for lesson in lessons.every(ROOT)]


@pytest.fixture(scope="module")
def content() -> dict[str, bytes]:
    return pages.pages(ROOT)


def test_the_same_repository_gives_the_same_book(content):
    assert pages.pages(ROOT) == content


# Lessons


@pytest.mark.parametrize("lesson", LESSONS)
def test_each_lesson_is_in_the_book_the_syllabus_and_the_lecturer_s_notes(content, lesson):
    assert f"notebooks/{lesson.stem}.ipynb" in content
    assert lesson.link in content["generated/sessions.md"].decode()
    notes = course.notes(ROOT, lesson)
    assert notes, f"docs/lecturer/{lesson.stem}.yaml is missing: what to show, to discuss, to put right"
    assert notes.keys() == {"show", "questions", "misconceptions"}
    drawn = [name for name in content if name.startswith(f"figures/{lesson.stem}_")]
    assert len(notes["show"]) == min(2, len(drawn))
    assert len(notes["questions"]) >= 3 and len(notes["misconceptions"]) >= 2
    for shown in notes["show"]:
        assert f"figures/{lesson.stem}_{shown['figure']}.svg" in content
    assert all(pair.keys() == {"wrong", "right"} for pair in notes["misconceptions"])
    heading = f"## {lesson.number} {lesson.title}\n"
    assert heading in content["generated/lecturer.md"].decode() and heading in content["generated/slides.md"].decode()
    assert course.runtimes(ROOT)[lesson.number].startswith("smoke ")


def test_notes_are_on_lessons_that_exist():
    assert {path.stem for path in (ROOT / "docs" / "lecturer").glob("*")} <= {case.id for case in LESSONS}


def test_every_figure_has_an_alternative_text(content):
    for case in LESSONS:
        for cell in files.code_cells(json.loads(content[f"notebooks/{case.id}.ipynb"])):
            if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
                shown = cell["metadata"].get("mystnb", {}).get("image", {})
                assert shown.get("alt", "").strip(), f"{case.id}: cell {cell['id']} needs mystnb.image.alt"


def test_a_lesson_that_does_not_describe_itself_is_refused(tmp_path):
    path = tmp_path / "77_toy.ipynb"
    path.write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": "# 77 Toy\n\n**You need** it. **Time:**"}]})
    )
    with pytest.raises(ValueError, match=r"77_toy.ipynb: its first cell does not say question, minutes"):
        lessons.described(path)


def test_every_formula_becomes_mathml(content):
    parser, found = MarkdownIt().use(dollarmath_plugin), 0
    for name in content:
        if not name.endswith(".ipynb"):
            continue
        for cell in json.loads(content[name])["cells"]:
            if cell["cell_type"] == "markdown":
                blocks = parser.parse("".join(cell["source"]))
                for token in [*blocks, *(child for block in blocks for child in block.children or [])]:
                    if token.type.startswith("math"):
                        assert mathml.mathml(token.content, "block" in token.type).startswith("<math"), token.content
                        found += 1
    assert found > 100


def test_formulas():
    assert mathml.mathml(r"o' - \frac12", False).startswith("<math><mrow><mi>o</mi><mo")
    assert 'display="block"' in mathml.mathml("x", True)
    with pytest.raises(ValueError, match="nosuch"):
        mathml.mathml(r"\nosuch x", False)


# Methods


@pytest.mark.parametrize("name", sorted(kvlib.METHODS))
def test_each_method_has_a_page(content, name):
    if not kvlib.METHODS[name].__module__.startswith("kvlib."):
        pytest.skip("defined by a test")
    page = content[f"methods/{name}.md"].decode()
    first = kvlib.METHODS[name].__doc__.strip().splitlines()[0]
    for said in (f"# {name}\n", "**Source:** ", "**Budget:** ", first, f'kvlib.method("{name}"', "## Code"):
        assert said in page
    assert re.search(r"\*\*Keeps\*\* \w", page), "README's table of methods"
    assert f"[`{name}`]({name}.md)" in content["methods/index.md"].decode()


def test_a_page_s_numbers_are_those_of_the_table(content):
    with (ROOT / "data" / "results" / "00_real.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tasks"] == "natural" and row["configuration"] == "snapkv"]
    (row,) = [row for row in rows if row["budget"] == "0.2"]
    low, mean, high = (f"{100 * float(row[name]):.1f}" for name in ("low", "mean", "high"))
    _, _, section = content["methods/snapkv.md"].decode().partition("**`00_real`**")
    assert section.index(f"| {mean} | {low} to {high} | {row['samples']} |") < section.index("The full cache has")


def test_verdicts_stand_with_the_method_that_was_run_and_not_with_its_baseline(content):
    claim = "Choosing by the end of the prompt beats choosing by all attention so far at equal bytes."
    assert claim in content["methods/snapkv.md"].decode()
    assert claim not in content["methods/h2o.md"].decode() and claim in content["generated/verdicts.md"].decode()


def test_docstrings_become_lists():
    class Toy:
        """Keep the first.

        More.

        Args:
            first, second: one thing
                on two lines.
            third. A note.

        Raises:
            ValueError: for x.
        """

    assert methods.docstring(Toy) == [
        "Keep the first.\n\nMore.",
        "**Settings**",
        "- **first, second:** one thing on two lines.\n- third. A note.\n",
        "**Errors**",
        "- **ValueError:** for x.\n",
    ]


# Tables, words, works


def test_tables_are_read_and_written():
    text = "## One\n\n| a | b |\n|---|---|\n| no | no |\n\n## Two\n\n| a | b |\n|---|---|\n| `x` | 2 \\| 3 |\n"
    assert tables.rows(text, "## Two") == [["`x`", "2 | 3"]]
    assert tables.table(["a", "b"], [["x", "2 | 3"]], numbers=1) == "| a | b |\n| --- | ---: |\n| x | 2 \\| 3 |\n"
    with pytest.raises(ValueError, match="no heading '## Three'"):
        tables.rows(text, "## Three")


def test_every_word_is_in_the_glossary(content):
    glossary = content["generated/glossary.md"].decode()
    words = tables.rows((ROOT / "notebooks" / "README.md").read_text(), "## Glossary")
    assert len(words) > 20 and all(f"\n{word}\n  {meaning}\n" in glossary for word, meaning in words)
    assert "## Glossary" not in content["notebooks/README.md"].decode()


def test_every_work_is_listed_once(content):
    listed = content["generated/references.md"].decode()
    numbers = re.findall(r"\[arXiv:([\d.]+)\]", listed)
    assert len(set(numbers)) == len(numbers) > 10
    for path in files.all_notebooks():
        cited = references.cited(path)
        assert cited, f"{path.stem}: numbered entries under References"
        assert f"](notebooks/{path.name})" in listed


# Links


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_citations_lead_to_references():
    prose = "As in [1] and [3], not `x[1]`, $a[1]$, [1](a.md), y[1], 3 [1, 2] or z = [1]; Yang et al. [1, 2].\n\n"
    cell = f"{prose}## References\n\n1. One.\n2. Two.\n"
    assert citations.listed(cell) == {"1", "2"} and citations.listed("1. a step") == set()
    first, second = (f'<a href="#reference-{n}">{n}</a>' for n in (1, 2))
    found, _, references = citations.linked(cell, {"1", "2"}).partition("## References")
    assert found == (
        f"As in [{first}] and [3], not `x[1]`, $a[1]$, [1](a.md), y[1], 3 [1, 2] or z = [{first}]; "
        f"Yang et al. [{first}, {second}].\n\n"
    )
    assert references == '\n\n1. <a id="reference-1"></a>One.\n2. <a id="reference-2"></a>Two.\n'


def test_links_into_nothing_and_things_from_outside_are_found(tmp_path):
    write(
        tmp_path,
        a_html='<h1 id="top">A</h1><a href="b.html#here">b</a><a href="#top"></a><img src="x.svg" alt="x">'
        '<a href="https://example.org">outside</a><link rel="stylesheet" href="s.css">',
        b_html='<p id="here"></p><a href="a.html#gone"></a><a href="c.html"></a><img src="x.svg">'
        '<script src="https://example.org/x.js"></script>',
        x_svg="<svg/>",
        s_css="@import 'https://example.org/y.css'; p { background: url(x.svg) }",
    )
    assert checking.problems(tmp_path) == [
        "b.html: loads https://example.org/x.js",
        "b.html: a.html#gone is not there",
        "b.html: c.html is not there",
        "b.html: x.svg has no alternative text",
        "s.css: loads https://example.org/y.css",
    ]


def build(tmp_path: Path, text: str) -> int:
    """Sphinx with the book's settings on one page."""
    source = tmp_path / "source"
    pages.lay(source, {"index.md": text.encode()})
    return sphinx(["-q", "-W", "--keep-going", "-n", "-c", str(ROOT / "docs"), str(source), str(tmp_path / "built")])


def test_a_small_book_needs_nothing_from_outside(tmp_path):
    assert build(tmp_path, "# Toy\n\nInline $a_k$, and\n\n$$\\sum_k a_k v_k$$\n\n## Again\n\n[Up](#toy)\n") == 0
    assert checking.problems(tmp_path / "built") == []
    page = (tmp_path / "built" / "index.html").read_text()
    assert page.count("<math") == 2 and not re.search("mathjax.*js", page)
    assert (tmp_path / "built" / "_static" / "STIXTwoMath-Regular.ttf").is_file()


def test_a_link_into_nothing_is_an_error(tmp_path, capsys):
    assert build(tmp_path, "# Toy\n\n[Nowhere](nowhere.md)\n") != 0


def test_notes_read_as_text():
    """A colon in YAML makes a mapping of what was meant as a sentence."""
    for path in (ROOT / "docs" / "lecturer").glob("*.yaml"):
        notes = yaml.safe_load(path.read_text())
        said = [*notes["questions"], *(shown["say"] for shown in notes["show"])]
        said += [text for pair in notes["misconceptions"] for text in pair.values()]
        assert all(isinstance(text, str) and text[-1] in ".?" for text in said), path.name
