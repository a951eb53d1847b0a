"""Completions are judged by what they do, within limits, and none passes that has not been asserted."""

import os
import re
import sys
import time

import pytest

from kvlib.lab.functions import KINDS, Problem, cut, problem, run, run_all, running

PROMPT = 'def double(number):\n    """Twice the number."""\n'
ASSERTS = ["assert double(2) == 4", "assert double(5) == 10"]
RIGHT = "    return number * 2\n"


def kind(body: str, **options) -> str:
    return run(PROMPT, body, ASSERTS, **options).kind


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (RIGHT, "passed"),
        ("    return number + 2\n", "wrong value"),  # the first assert holds
        ("", "wrong value"),  # a docstring is a body
        ("    return (number\n", "syntax"),
        ("  return number * 2\n", "syntax"),
        ("    return number * 2\0\n", "syntax"),
        (f"    return {'(' * 400}number{')' * 400}\n", "syntax"),
        (f"    return {'-' * 100_000}number\n", "syntax"),  # too deep for the parser
        (f"    return number{' + 1' * 100_000}\n", "syntax"),  # and for the compiler
        ("    return numbr * 2\n", "undefined name"),
        ("    if number > 3:\n        result = 10\n    return result\n", "undefined name"),  # UnboundLocalError
        ("    return number.double()\n", "undefined name"),
        ("    return number / 0\n", "other error"),
        ("    return double(number)\n", "other error"),
        ("    return int('two')\n", "other error"),
        ("    import yaml\n    return number * 2\n", "other error"),  # whatever is installed here
        ("    import cutting\n    return number * 2\n", "other error"),  # which stands beside what runs this
        ("    raise KeyboardInterrupt\n", "other error"),
        ("    return input()\n", "other error"),
    ],
)
def test_kinds(body, expected):
    assert kind(body) == expected in KINDS


def test_the_error_is_told():
    assert run(PROMPT, "    return numbr\n", ASSERTS).detail == "NameError: name 'numbr' is not defined"
    long = run(PROMPT, "    raise ValueError('x' * 10**6)\n", ASSERTS)
    assert long.detail.startswith("ValueError: xxx") and len(long.detail) <= 200
    assert run(PROMPT, "    raise SystemExit(3)\n", ASSERTS).detail == "SystemExit: 3"
    assert run(PROMPT, RIGHT, ASSERTS).detail == ""


@pytest.mark.parametrize(
    "body",
    [
        "    import sys\n    sys.exit(0)\n",
        "    import os\n    os._exit(0)\n",
        "    raise SystemExit\n",
        "    print('passed')\n    return 0\n",
        "    import os\n    os.write(1, b'passed')\n    os._exit(0)\n",
        """    import os
    for stream in range(3, 30):
        try:
            os.write(stream, b'\\n["passed", ""]')
        except OSError:
            pass
    os._exit(0)
""",
        """    import os
    for stream in range(3, 30):
        try:
            os.write(stream, b'["passed", ""]\\n')
        except OSError:
            pass
    return 0
""",
        "    try:\n        assert False\n    except AssertionError:\n        return 5\n",
        "    global AssertionError\n    AssertionError = ZeroDivisionError\n    return 5\n",
        "    import os\n    os.closerange(0, 100)\n    return number * 2\n",
        "    import os\n    os.abort()\n",
    ],
)
def test_nothing_passes_that_was_not_asserted(body):
    assert kind(body) in ("wrong value", "other error")


def test_the_last_assert_counts():
    assert run(PROMPT, "    import os\n    return 4 if number == 2 else os._exit(0)\n", ASSERTS).kind == "other error"


def test_asserts_of_the_completion_itself_are_wrong_values():
    assert kind("    assert number == 0\n    return 0\n") == "wrong value"


def test_what_is_printed_goes_nowhere(capfd):
    noise = "    import os\n    print('x' * 10**6)\n    os.write(2, b'y' * 10**6)\n    return number * 2\n"
    assert kind(noise) == "passed"
    assert capfd.readouterr() == ("", "")


def test_time_runs_out():
    start = time.monotonic()
    outcome = run(PROMPT, "    while True:\n        pass\n", ASSERTS, seconds=1)
    assert outcome.kind == "time" and "CPU" in outcome.detail
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "body",
    [
        "    import time\n    time.sleep(1000)\n",
        """    import os
    for stream in range(3, 30):
        try:
            while True:
                os.write(stream, b'x' * 10**6)
        except OSError:
            pass
""",
    ],
    ids=["sleeping", "flooding its report"],
)
def test_patience_runs_out_too(monkeypatch, body):
    monkeypatch.setattr(running, "PATIENCE", 1)
    start = time.monotonic()
    assert kind(body, seconds=1) == "time"
    assert time.monotonic() - start < 9


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit the address space")
@pytest.mark.parametrize(
    "body", ["    return [0] * 10**10\n", "    kept = []\n    while True:\n        kept.append(' ' * 10**6)\n"]
)
def test_memory_runs_out(body):
    assert run(PROMPT, body, ASSERTS, megabytes=64).detail.startswith("MemoryError")


FORBIDDEN = """
open(file, 'w'); open(file, 'a'); open(file, 'r+b'); open('new', 'x'); os.open(file, os.O_WRONLY | os.O_TRUNC)
os.remove(file); os.rename(file, 'other'); os.truncate(file, 0); os.mkdir('new'); os.chmod(file, 0)
os.symlink(file, 'new'); shutil.rmtree(folder); pathlib.Path(file).write_text(''); tempfile.mkdtemp(dir='.')
os.fork(); os.system('true'); os.posix_spawn('/bin/true', ['true'], {}); os.execv('/bin/true', ['true'])
subprocess.run(['true']); os.kill(os.getppid(), 0); os.killpg(0, 0); importlib.import_module('ctypes').CDLL(None)
socket.socket(); socket.create_connection(('127.0.0.1', 9)); socket.getaddrinfo('localhost', 80)
"""


def test_forbidden(tmp_path):
    """All of it is stopped before it does anything; limits of the system would not stop root."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    calls = re.split("; |\n", FORBIDDEN.strip())
    body = f"""    import importlib, os, pathlib, shutil, socket, subprocess, tempfile
    file, folder = {str(kept)!r}, {str(tmp_path)!r}
    through = []
    for call in {calls}:
        try:
            eval(call)
        except PermissionError as error:
            if 'not allowed here' in str(error):
                continue
        through.append(call)
    raise ValueError(through)
"""
    assert len(calls) == 25
    assert run(PROMPT, body, ASSERTS).detail == "ValueError: []"
    assert kept.read_text() == "kept" and os.access(kept, os.R_OK) and [*tmp_path.iterdir()] == [kept]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may have any number of processes")
def test_no_process_beside():
    """Not even past the audit hook."""
    body = "    import threading\n    threading.Thread(target=print).start()\n    return number * 2\n"
    assert kind(body) == "other error"


def test_no_byte_into_a_file():
    """Not even past the audit hook: this library writes by itself."""
    body = """    import sqlite3
    sqlite3.connect('new').execute('create table if not exists t (x)')
    return number * 2
"""
    assert run(PROMPT, body, ASSERTS).detail == "OperationalError: disk I/O error"


def test_reading_is_allowed_and_the_folder_is_empty():
    assert kind("    import os\n    return number * 2 if os.listdir() == [] else 0\n") == "passed"
    assert kind("    import json, textwrap\n    return len(open(json.__file__).read()) and number * 2\n") == "passed"


def test_nothing_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    names = "{'PYTHONHASHSEED', 'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}"  # Python and macOS add the last two
    assert kind(f"    import os\n    return number * 2 if set(os.environ) <= {names} else 0\n") == "passed"
    assert kind("    import kvlib\n") == "other error"


def test_sets_have_the_same_order_every_time():
    body = "    raise ValueError(list({'pear', 'plum', 'fig', 'lime', 'rose', 'fern'}))\n"
    assert len({run(PROMPT, body, ASSERTS).detail for _ in range(3)}) == 1


def test_nothing_runs_after_the_last_assert(monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 1)
    late = "    import atexit, time\n    atexit.register(time.sleep, 1000)\n    return number * 2\n"
    assert kind(late) == "passed"


def test_many_in_order():
    problems = [problem(seed) for seed in range(6)]
    bodies = [p.solution if i % 2 else "    return undefined" for i, p in enumerate(problems)]
    outcomes = run_all(problems, bodies, workers=2)
    assert [o.kind for o in outcomes] == ["undefined name", "passed"] * 3
    assert [o.passed for o in outcomes] == [False, True] * 3
    with pytest.raises(ValueError):
        run_all(problems, bodies[1:])


def test_text_beyond_ascii():
    found = Problem("word", 'def word():\n    """«ä»"""\n', "    return 'ä'", ("assert word() == 'ä'",))
    assert run_all([found], [found.solution])[0].passed


# What belongs to a completion


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        ("    return 1\n\n\ndef other():\n", "    return 1\n"),
        ("    return 1\n    \n    x = 2\n", "    return 1\n"),
        ("    x = 1\n    def inner():\n        return x\n    return inner()\n", None),
        ("    return 1\ndef other():\n    return 2\n", "    return 1\n"),
        ("    return 1\ndefault = 3\n", None),
        ("    for i in", None),  # cut off by the number of tokens
        ("\n    return 1\n", ""),
        ("", ""),
    ],
)
def test_cut(text, completion):
    assert cut(text) == (text if completion is None else completion)
