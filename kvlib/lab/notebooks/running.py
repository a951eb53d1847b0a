"""Running a notebook."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from kvlib.lab.notebooks.files import lesson, root_of, to_text
from kvlib.lab.notebooks.parameters import build_folder, other_model, trained_for, write_parameters

TERMINAL_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def run(path: Path, profile: str) -> None:
    """Execute a lesson with its solutions into build/<profile>; the result takes its final name if no cell failed."""
    root, stem = root_of(path), path.stem
    build = build_folder(root, profile)
    values = write_parameters(path, profile)
    part, broken, log = (build / f"{stem}.{kind}" for kind in ("part.ipynb", "failed.ipynb", "log"))
    environment = os.environ | {
        "KVLIB_FIGURES": str(build / "figures" if other_model(profile) or profile != "default" else root / "figures"),
        "PYTHONPATH": str(root),  # this checkout's kvlib, even if .venv was copied from another one
        "IPYTHONDIR": str(root / "build" / "ipython"),  # no personal start-up files
        "PYTHONWARNINGS": "ignore:IProgress not found",  # from tqdm, on the import of transformers in a notebook
        "OMP_NUM_THREADS": "1",  # sums, and so figures, depend on the number of threads; two would fight with tests
        "TQDM_DISABLE": "1",
    }
    environment.pop("MPLBACKEND", None)  # agg would remove every inline figure
    if profile != "paper":
        environment.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "papermill", part, part, "-f", values, "--cwd", path.parent]
    command += ["--kernel", "python3", "--log-output", "--no-progress-bar", "--no-request-save-on-cell-execute"]

    own = trained_for(path) if other_model(profile) else ""
    print(f"{stem}: running ({f'on {own}, trained for it, ' if own else ''}{profile} profile)", flush=True)
    broken.unlink(missing_ok=True)
    part.write_text(to_text(lesson(path)))
    start = time.monotonic()
    with log.open("w") as stream:
        failed = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    seconds = f"{time.monotonic() - start:.0f} s"
    if failed:
        if part.exists():
            part.replace(broken)
        tail = TERMINAL_COLOR.sub("", log.read_text()).splitlines()[-25:]
        files = [str(file.relative_to(root)) for file in (broken, log) if file.exists()]
        raise ValueError("\n".join([*tail, f"{stem}: failed after {seconds}; read on in {' and '.join(files)}"]))
    part.replace(build / path.name)
    print(f"{stem}: done in {seconds}", flush=True)
