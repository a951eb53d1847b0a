"""The SHA256SUMS of a folder, in the format of `sha256sum`; `kvlib.load` checks a model's, `make check` all."""

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """File name -> checksum."""
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines() if (folder / NAME).is_file() else []
    return {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}


def record(file: Path) -> None:
    """List a file as it is now, or not any more if it is gone. Lines of other files stay as they are."""
    lines = listed(file.parent)
    lines.pop(file.name, None)
    _write(file.parent, lines | ({file.name: digest(file)} if file.is_file() else {}))


def write(folder: Path) -> None:
    """List every file in `folder` but the list itself."""
    _write(folder, {file.name: digest(file) for file in folder.iterdir() if file.is_file() and file.name != NAME})


def _write(folder: Path, lines: dict[str, str]) -> None:
    part = folder / f"{NAME}.{os.getpid()}.part"
    part.write_text("".join(f"{checksum}  {name}\n" for name, checksum in sorted(lines.items())), encoding="utf-8")
    part.replace(folder / NAME)


def problems(folder: Path) -> list[str]:
    """Files of a list that are gone or changed, in words."""
    found = []
    for name, checksum in listed(folder).items():
        file = folder / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif digest(file) != checksum:
            found.append(f"{file} is not what its checksum says")
    return found


def unlisted(folder: Path, *patterns: str) -> list[str]:
    """Files of these patterns that the list lacks, in words."""
    names = listed(folder)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [f"{file} has no checksum" for file in files if file.name not in names]
