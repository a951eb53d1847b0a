"""SHA256SUMS of a data folder, in the format of `sha256sum`; `kvlib.core.models.verify` checks it."""

import hashlib
from pathlib import Path


def write(folder: Path) -> None:
    """List every file in `folder` but the list itself."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
