"""What is committed: small enough, free of one machine's traces, figures and manifest in step."""

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from kvlib.lab.notebooks import files as notebooks
from kvlib.paths import FIGURES, ROOT

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Everything that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in sorted(set(listing.stdout.split("\0"))) if (ROOT / name).is_file()]


def test_sizes(files):
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in files}
    assert {name: size for name, size in sizes.items() if size > 16 * MEBIBYTE} == {}
    assert sum(sizes.values()) < 56 * MEBIBYTE


def test_no_traces_of_a_machine_or_a_registry(files):
    traces = re.compile(
        rf"{re.escape(str(ROOT))}\b|/(?:home|Users|root)/\w|\bindex[-_]url|find[-_]links|trusted[-_]host|py(?:pi|thonhosted)\.org"
    )
    found = []
    for file in files:
        if file.is_relative_to(ROOT / "data" / "heldout"):  # other people's code and prose, quoted as it is
            continue
        try:
            text = file.read_text()
        except UnicodeDecodeError:  # weights and tables
            continue
        found += [f"{file.relative_to(ROOT)}: {match.group()}" for match in traces.finditer(text)]
    assert found == []


def saved_figures() -> dict[str, str]:
    """Figure file -> notebook, from the calls of `save` in the notebooks."""
    calls = re.compile(r"""\bsave\(\s*\w+\s*,\s*["']([^"']+)["']""")
    return {
        f"{name}.svg": path.stem
        for path in notebooks.all_notebooks()
        for cell in notebooks.code_cells(notebooks.read(path))
        for name in calls.findall(cell["source"])
    }


def test_figures_are_those_of_the_manifest_and_the_notebooks():
    """No figure outlives the code that drew it, and none is changed by hand."""
    manifest = json.loads((FIGURES / "manifest.json").read_text())
    assert {name: entry["notebook"] for name, entry in manifest.items()} == saved_figures()
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in FIGURES.glob("*.svg")}
    assert {name: entry["sha256"] for name, entry in manifest.items()} == hashes
    assert {file.name: file.stat().st_size for file in FIGURES.glob("*.svg") if file.stat().st_size > 200_000} == {}
