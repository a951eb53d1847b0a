"""Run as a program of its own by `running`: reads a job, runs it within limits, and reports how that went.

Only the standard library is imported, for this file starts without kvlib.
"""

import contextlib
import json
import os
import resource
import sys

ALLOWED = ("os.listdir", "os.scandir")  # imports look into folders
DENIED = ("ctypes", "os", "socket", "subprocess", "syslog")
DETAIL = 200  # characters of an error's description
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, megabytes: int) -> None:
    """CPU time, address space, no byte into any file, no process besides (root is exempt from the last one)."""
    for name, most in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", megabytes << 20),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses the second one
            hard = most + 1 if name == "RLIMIT_CPU" else most
            resource.setrlimit(getattr(resource, name), (most, hard))


def deny(event: str, arguments: tuple) -> None:
    """An audit hook, which nothing can remove: no sockets, no processes, no change of any file."""
    if event == "open":
        denied = isinstance(arguments[2], int) and arguments[2] & WRITING
    else:
        denied = event.partition(".")[0] in DENIED and event not in ALLOWED
    if denied:
        raise PermissionError(f"{event} is not allowed here")


def kind_of(error: BaseException) -> str:
    if isinstance(error, NameError | AttributeError):
        return "undefined name"
    return "wrong value" if isinstance(error, AssertionError) else "other error"


def judge(source: str, asserts: list[str]) -> tuple[str, str]:
    """Kind and description of what happens."""
    scope = {"__name__": "solution"}
    try:
        code = compile(source, "solution", "exec")
    except Exception as error:  # a SyntaxError, or what too deep nesting and null characters raise
        return "syntax", f"{type(error).__name__}: {error}"
    try:
        exec(code, scope)
        for line in asserts:
            exec(compile(line, "assertion", "exec"), scope)
    except BaseException as error:  # SystemExit, too
        return kind_of(error), f"{type(error).__name__}: {error}"
    return "passed", ""


def main() -> None:
    job = json.load(sys.stdin.buffer)
    report = os.dup(1)
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    limit(job["seconds"], job["megabytes"])
    sys.addaudithook(deny)
    kind, detail = judge(job["source"], job["asserts"])
    os.write(report, f"{job['key']}\n{json.dumps([kind, detail[:DETAIL]])}".encode())
    os._exit(0)  # nothing that was left behind runs at exit


if __name__ == "__main__":
    main()
