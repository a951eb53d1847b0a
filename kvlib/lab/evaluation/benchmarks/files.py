"""Files in the folder that the environment variable `KVLIB_DATA` names, compared with their checksums."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "KVLIB_DATA"


@dataclass(frozen=True)
class File:
    """A file in the folder of `KVLIB_DATA`, or a folder of texts; rows after reading, None where that is not known."""

    name: str
    sha256: str | None = None
    rows: int | None = None


def describe(file: File) -> str:
    return f"{file.name} (sha256 {file.sha256})" if file.sha256 else file.name


def hint(file: File) -> str:
    return f"put {describe(file)} into a folder and set {VARIABLE} to it"


def check(data: bytes, file: File, where: str) -> bytes:
    """`data` if it has the file's checksum. Raises ValueError otherwise."""
    found = hashlib.sha256(data).hexdigest()
    if file.sha256 not in (None, found):
        raise ValueError(f"{file.name} {where} has sha256 {found}, expected {file.sha256}")
    return data


def local(file: File, elsewhere: str) -> bytes:
    """The content of a file in the folder of `KVLIB_DATA`; `elsewhere` says where it can be had.

    Of a folder of texts, 123.txt and so on: a JSON object a line, {"name": "123", "text": ...}, in the order of names.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        raise FileNotFoundError(f"{hint(file)}; it is {elsewhere}")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{VARIABLE}={value!r} is not a folder")
    place = folder / file.name
    if not place.exists():
        raise FileNotFoundError(f"{describe(file)} is missing in {folder}, the folder of {VARIABLE}; it is {elsewhere}")
    if place.is_dir():
        texts = ({"name": each.stem, "text": each.read_text(encoding="utf-8")} for each in sorted(place.glob("*.txt")))
        return "\n".join(map(json.dumps, texts)).encode()
    return check(place.read_bytes(), file, f"in {folder}, the folder of {VARIABLE},")
