"""Completions are run against their assertions, each in a process of its own."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from kvlib.lab.functions.problems import Problem

CHILD = Path(__file__).parent / "child.py"
KINDS = ("passed", "syntax", "undefined name", "wrong value", "other error", "time")
PATIENCE = 10  # wall-clock time, in multiples of the CPU time: machines are busy, and sleeping costs none


@dataclass(frozen=True)
class Outcome:
    """How a completion fared: one of `KINDS`, and the error in words."""

    kind: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def run(prompt: str, completion: str, asserts: Sequence[str], *, seconds: int = 4, megabytes: int = 256) -> Outcome:
    """Run a completion behind its prompt, and then the assertions.

    A process of its own, with nothing but the standard library, in an empty folder: limited CPU time and memory, no
    new file and no change of one, no other process, no socket, nothing on the screen. Hashes of strings are the same
    every time, or the order of a set would decide.

    This holds accidents off: models write endless loops and `sys.exit()`, not attacks. The audit hook sees what goes
    through Python's own functions, not what native code does; files can be read; and a completion can forge its report
    if it searches the interpreter's frames for the key, or return what equals everything.

    Args:
        asserts: statements, run in this order. seconds: of CPU time. megabytes: of address space.

    Returns:
        "syntax": prompt and completion do not compile; "undefined name": a NameError (UnboundLocalError included) or
        AttributeError; "wrong value": an AssertionError; "time": a limit of time was reached; "other error": any other
        exception, memory and forbidden calls included, and the end of the process before the last assertion.
    """
    key = secrets.token_hex(16)
    job = {"source": prompt + completion, "asserts": list(asserts), "seconds": seconds, "megabytes": megabytes}
    with TemporaryDirectory() as folder, TemporaryFile() as file:
        file.write(json.dumps(job | {"key": key}).encode())
        file.seek(0)
        with subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", CHILD],
            stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                status = process.wait(PATIENCE * seconds)
            except subprocess.TimeoutExpired:
                return Outcome("time", f"more than {PATIENCE * seconds} s")
            finally:
                if process.returncode is None:  # after an interrupt, too
                    os.killpg(process.pid, signal.SIGKILL)
            said, _, report = process.stdout.read().partition(b"\n")  # as much as a pipe holds, at most
    if status == -signal.SIGXCPU:
        return Outcome("time", f"more than {seconds} s of CPU time")
    if said != key.encode():
        return Outcome("other error", f"ended without a report, with status {status}")
    return Outcome(*json.loads(report))


def run_all(problems: Sequence[Problem], completions: Sequence[str], workers: int | None = None) -> list[Outcome]:
    """The outcomes of completions, which are not cut here, one for each problem.

    Args:
        workers: processes at a time; None: one for each processor.

    Raises:
        ValueError: if there are more of one than of the other.
    """
    pairs = list(zip(problems, completions, strict=True))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda pair: run(pair[0].prompt, pair[1], pair[0].asserts), pairs))
