"""What code reaches by name is found in the files, and a digest of it changes when any of it does, and only then."""

import shutil
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.core.method import METHODS
from kvlib.lab import definitions, tasks
from kvlib.lab.evaluation.evaluate import evaluate
from kvlib.paths import ROOT

SOURCES = {
    "__init__": "from kvlib.core.base import Base\n",
    "core/__init__": "",
    "core/base": "class Base:\n    def score(self): return helper()\n\ndef helper(): return 1\n",
    "a": '''
        """About a."""
        import torch
        import kvlib
        from . import b
        from kvlib.core.base import Base, helper
        from kvlib.sub import again as name
        from kvlib.d import Part, decorate

        LIMIT = 3

        @decorate
        def start(x: Part) -> Part:
            """Start."""
            torch.zeros(LIMIT)  # a comment
            return b.middle(x) + kvlib.Base.score

        class Own(Base):
            size: Part = LIMIT

            def score(self):
                from kvlib.e import late
                return helper() + name(late)
    ''',
    "b": """
        PAIR = 1
        PAIR += 1
        OTHER, LAST = 2, 3

        def middle(x): return [f for f in PAIR]

        def unused(): return OTHER
    """,
    "sub/__init__": "from .c import end as again\n",
    "sub/c": "from .. import d\n\ndef end(x): return d.Part.make(x)\n",
    "d": "class Part:\n    @classmethod\n    def make(cls): return cls\n\ndef decorate(f): return f\n",
    "e": "late = lambda x: late\n",
    "f": "",
}
START = {"kvlib.a:start", "kvlib.a:LIMIT", "kvlib.b:middle", "kvlib.b:PAIR"}
OWN = {"kvlib.a:Own", "kvlib.a:LIMIT", "kvlib.core.base:helper", "kvlib.sub.c:end", "kvlib.d:Part", "kvlib.e:late"}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, text in SOURCES.items():
        write(tmp_path, name, text)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    file = root / "kvlib" / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))


def digest(root: Path, *names: str) -> str:
    definitions.digest.cache_clear()
    return definitions.digest(*names, root=root)


def test_names_lead_through_imports(root):
    """To functions, constants, classes with their methods; not to annotations, decorators and classes of the core."""
    assert set(definitions.closure(["kvlib.a:start"], root)) == START
    assert set(definitions.closure(["kvlib.a:Own"], root)) == OWN
    assert set(definitions.closure(["kvlib.a:Own.score", "kvlib.f:gone", "torch:zeros"], root)) == {
        "kvlib.a:Own.score",
        *OWN - {"kvlib.a:Own"},
    }
    code = "import kvlib.sub\nfrom kvlib import a\n\ndef mine(x): return a.start(x)\nmine(kvlib.sub.again, kvlib.Base)"
    assert definitions.named(code, root) == {":mine", "kvlib.a:start", "kvlib.sub.c:end"}
    assert set(definitions.closure(definitions.named(code, root), root)) == START | {"kvlib.sub.c:end", "kvlib.d:Part"}


def test_imports_run_files(root):
    """Also files that nothing is used of, and the packages that they are in."""
    found = definitions.files("import os\nfrom kvlib.a import start", root)
    expected = {"__init__", "a", "b", "core/__init__", "core/base", "d", "e", "sub/__init__", "sub/c"}
    assert {str(file.relative_to(root / "kvlib").with_suffix("")) for file in found} == expected


@pytest.mark.parametrize(
    ("name", "old", "new", "same"),
    [
        ("a", "LIMIT = 3", "LIMIT = 4", False),
        ("a", "LIMIT = 3", "LIMIT = 3.0", False),
        ("b", "PAIR += 1", "PAIR += 2", False),
        ("b", "def middle(x): return", "def middle(x, y=1): return", False),
        ("a", "start(x: Part)", "start(x: int)", False),
        ("a", "Start.", "Begin.", True),
        ("a", "  # a comment", "", True),
        ("b", "return OTHER", "return 0", True),
        ("core/base", "return 1", "return 2", True),
        ("d", "return f", "return None", True),
    ],
)
def test_digests_follow_what_is_reached(root, name, old, new, same):
    before = digest(root, "kvlib.a:start")
    assert old in SOURCES[name]
    write(root, name, SOURCES[name].replace(old, new))
    assert (digest(root, "kvlib.a:start") == before) is same


def test_digests_stay_when_definitions_move(root):
    """Module, folder and the name that it is imported by do not count, as long as code that uses it stays the same."""
    before = digest(root, "kvlib.a:start", "kvlib.a:Own")
    write(root, "deep/er/moved", SOURCES["b"])
    write(root, "elsewhere", SOURCES["d"])
    write(root, "sub/c", "from kvlib import elsewhere as d\n\ndef end(x): return d.Part.make(x)\n")
    write(root, "a", SOURCES["a"].replace("from . import b", "from kvlib.deep.er import moved as b"))
    write(root, "b", "")
    assert digest(root, "kvlib.a:start", "kvlib.a:Own") == before


@given(st.lists(st.sets(st.integers(0, 9), max_size=3), min_size=10, max_size=10), st.integers(0, 9))
def test_closures_are_what_a_graph_search_finds(tmp_path_factory, calls, start):
    """Ten functions in three modules, each of which uses some others, in circles too."""
    root = tmp_path_factory.mktemp("graph")
    write(root, "__init__", "")
    for module in range(3):
        lines = [f"from kvlib import m{other}" for other in range(3) if other != module]
        for number in range(module, 10, 3):
            used = [f"f{n}" if n % 3 == module else f"m{n % 3}.f{n}" for n in calls[number]]
            lines.append(f"def f{number}(): return [{', '.join(used)}]")
        write(root, f"m{module}", "\n".join(lines))
    reached, pending = set(), [start]
    while pending:
        number = pending.pop()
        if number not in reached:
            reached.add(number)
            pending += calls[number]
    found = definitions.closure([f"kvlib.m{start % 3}:f{start}"], root)
    assert set(found) == {f"kvlib.m{number % 3}:f{number}" for number in reached}


# kvlib itself


def test_what_the_evaluation_reaches():
    reached = set(definitions.closure([definitions.name_of(evaluate)]))
    assert {
        *(f"kvlib.lab.evaluation.evaluate:{name}" for name in ("evaluate", "prepare", "score")),
        *(f"kvlib.lab.evaluation.answers:{name}" for name in ("first_choices", "compare", "write")),
        *(f"kvlib.lab.evaluation.prompts:{name}" for name in ("compressed", "one_by_one", "prefill_flops", "nats")),
        "kvlib.lab.evaluation.metrics:code_similarity",
        "kvlib.lab.tasks.scoring:judge",
        "kvlib.lab.tasks.sampling:sample",
    } <= reached
    assert not any(name.startswith(("kvlib.core", "kvlib.methods")) for name in reached)


def test_what_methods_reach():
    reached = set(definitions.closure([definitions.name_of(METHODS["streaming_llm"])]))
    assert {"kvlib.methods.baselines:StreamingLLM", "kvlib.core.rotary:rotation"} <= reached
    for name, method in METHODS.items():
        reached = definitions.closure([definitions.name_of(method)])
        assert definitions.name_of(method) in reached or not method.__module__.startswith("kvlib"), name
        assert not any(definition.endswith((":Method", ":Run", ":View")) for definition in reached), name


def test_every_task_is_found():
    for name, family in tasks.CATALOGUE.items():
        assert definitions.closure([definitions.name_of(family.make)]), name
        reached = definitions.closure([definitions.name_of(family.draw)])
        length = "cut" if name == "function" else "fitted"  # a function's prompt is as long as it is
        assert {"kvlib.lab.tasks.prompt:Prompt", f"kvlib.lab.tasks.prompt:{length}"} <= set(reached), name
    assert "kvlib.lab.functions.generating:problem" in definitions.closure(["kvlib.lab.tasks.written:function"])


def test_a_constant_of_the_library_counts(tmp_path):
    shutil.copytree(ROOT / "kvlib", tmp_path / "kvlib", ignore=shutil.ignore_patterns("__pycache__"))
    sample = definitions.name_of(tasks.find("needle").draw)
    before = digest(tmp_path, sample)
    assert before == digest(ROOT, sample)
    file = tmp_path / "kvlib" / "lab" / "tasks" / "composing.py"
    file.write_text(file.read_text().replace("FIRST = 20", "FIRST = 21"))
    assert digest(tmp_path, sample) != before
