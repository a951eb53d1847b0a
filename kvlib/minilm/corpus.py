"""The corpus: Python sources and documentation of the standard library, the locked environment and further packages.

The environment alone is one-sided, half of it numerics. `packages.txt` pins what else people write in Python: servers,
clients, tools, applications. Their wheels are downloaded once and read in place; nothing is installed, nothing is run.

Text is taken as it is, except that CRLF becomes LF: indentation stays spaces (the tokenizer has tokens for runs of
them), so that what a user pastes is what the model has seen. Whole packages are held out, not files, and the held-out
packages pass the duplicate filter first: what they share with another package is dropped from training.
"""

import ast
import contextlib
import csv
import gzip
import hashlib
import importlib.metadata
import inspect
import io
import json
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

from tqdm import tqdm

from kvlib import checksums
from kvlib.minilm import BUILD, HELDOUT, MODEL
from kvlib.paths import ROOT

PACKAGES = Path(__file__).with_name("packages.txt")
WHEELS = BUILD / "packages"
HELD_OUT = ("attrs", "beautifulsoup4", "click", "jinja2", "requests")  # permissive licences, no vendored copies
CODE_BYTES = 285_000_000  # 94 M tokens with the prose: 47 MiB compressed, and 50 is the most that may travel
PACKAGE_BYTES = 3_000_000  # of code, a hundredth; uncapped, a few large packages would crowd out the many ordinary ones
PROSE_SHARE = 0.05  # of the code, in bytes
LATER = ("peft",)  # in the lock since texts were drawn from it; with them, whatever is drawn again would be others
LONGEST_LINE = 400  # characters; longer lines are data, not code
LARGEST_FILE = 262_144  # bytes
SMALLEST_FILE = 3_000  # characters, in training: smaller ones are 5 % of the text, mostly imports, in 38 % of the files
DUPLICATE = 0.5  # a file with this share of known shingles is a near-duplicate
COPIED = 0.1  # the same for held-out text: stricter, since some packages carry edited copies of held-out ones
SHINGLE = 3  # lines

GENERATED = re.compile(r"(?i)(auto-?generated|generated (by|from|with|file)|do not (edit|modify))")
COLUMNS = ("distribution", "version", "file", "kind", "split", "licence", "bytes", "sha256")


@dataclass(frozen=True)
class Source:
    """A file of a package before it is read; `file` is relative to the package root."""

    distribution: str
    version: str
    file: str
    path: Path | zipfile.Path  # on disk or inside a wheel
    licence: str

    @property
    def split(self) -> str:
        return "heldout" if self.distribution in HELD_OUT else "train"

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.distribution}/{self.file}".encode()).hexdigest()


@dataclass(frozen=True)
class Document:
    """A text that entered the corpus; `sha256` is that of `text` in UTF-8."""

    distribution: str
    version: str
    file: str
    kind: str
    split: str
    licence: str
    text: str

    @property
    def row(self) -> dict:
        data = self.text.encode()
        row = asdict(self) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return {name: row[name] for name in COLUMNS}


def licence(metadata) -> str:
    """The licence a distribution declares: expression, else first line of the text, else classifier."""
    declared = metadata.get("License-Expression") or (metadata.get("License") or "").strip().split("\n")[0]
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    return (declared if 0 < len(declared) <= 120 else ", ".join(classifiers)) or "unknown"


def wheels() -> dict[str, Path]:
    """The wheel of each package in `packages.txt`, downloaded where it is missing.

    One by one, so that a stopped run can go on. Raises RuntimeError with what pip says where it does not get one.
    """
    pins = re.findall(r"^([\w.-]+)==(\S+)$", PACKAGES.read_text(), re.MULTILINE)
    for name, version in tqdm(pins, desc="wheels"):
        if not wheel(name, version):
            # a wheel, because to ask a source archive for its metadata is to run its code
            options = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(WHEELS), f"{name}=={version}")
            done = subprocess.run([sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True)
            if done.returncode:
                reason = f"is there a network? pip says:\n{done.stderr.strip()}"
                raise RuntimeError(f"{name}=={version} cannot be downloaded; {reason}")
    return {name: wheel(name, version) for name, version in pins}


def wheel(name: str, version: str) -> Path | None:
    """The downloaded wheel of a pin; file names of wheels differ in case and in what stands for a hyphen."""
    pattern = re.compile(rf"(?i){re.sub(r'[-_.]+', '[-_.]+', name)}-{re.escape(version)}-.*[.]whl")
    return next((path for path in WHEELS.glob("*.whl") if pattern.fullmatch(path.name)), None)


def distributions() -> Iterator[tuple[str, Distribution]]:
    """Every distribution in the lock that is installed, but for `LATER`, then every downloaded one."""
    lock = (ROOT / "requirements.lock").read_text()
    for name in sorted({*re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)} - {*LATER}):
        with contextlib.suppress(PackageNotFoundError):  # pinned for another platform
            yield name, importlib.metadata.distribution(name)
    for name, path in wheels().items():
        for distribution in importlib.metadata.distributions(path=[str(path)]):
            yield name, distribution


def sources() -> list[Source]:
    """Python and documentation files of the standard library and of every distribution, but for those of tests."""
    standard = Path(sysconfig.get_path("stdlib"))
    found = [
        Source("python", platform.python_version(), path.relative_to(standard).as_posix(), path, "PSF-2.0")
        for path in sorted(standard.rglob("*.py"))
        if "site-packages" not in path.parts
    ]
    for name, distribution in distributions():
        declared = licence(distribution.metadata)
        for file in distribution.files or []:
            if file.suffix in (".py", ".md", ".rst") or file.name == "METADATA":
                path = distribution.locate_file(file)
                found.append(Source(name, distribution.version, file.as_posix(), path, declared))
    return [s for s in found if not {"test", "tests"} & set(s.file.split("/")) and s.path.is_file()]


def read(source: Source) -> str | None:
    """The normalised text, or None where it is no UTF-8, too large, generated, or has very long lines."""
    data = source.path.read_bytes()
    if not 64 <= len(data) <= LARGEST_FILE:
        return None
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    if source.path.name == "METADATA":  # headers, a blank line, then the project's description
        text = text.partition("\n\n")[2]
    lines = text.split("\n")
    if GENERATED.search("\n".join(lines[:10])) or max(map(len, lines)) > LONGEST_LINE:
        return None
    return text


class Duplicates:
    """Remembers the shingles (runs of three non-empty lines) of the texts it has admitted."""

    def __init__(self):
        self.known = set()
        self.heldout = set()

    def admit(self, text: str, training: bool) -> bool:
        """False when half of the text, or more, has been seen before; in training, a tenth of it in held-out text."""
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if line]
        shingles = {hash_lines(lines[i : i + SHINGLE]) for i in range(max(1, len(lines) - SHINGLE + 1))}
        if not lines or len(shingles & self.known) >= DUPLICATE * len(shingles):
            return False
        if training and len(shingles & self.heldout) >= COPIED * len(shingles):
            return False
        self.known |= shingles
        if not training:
            self.heldout |= shingles
        return True


def hash_lines(lines: list[str]) -> int:
    data = "\n".join(lines).encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def docstrings(text: str) -> str:
    """The long docstrings of a module, without their indentation; "" where it does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    return "\n\n".join(inspect.cleandoc(doc) + "\n" for doc in found if len(doc) >= 600)


def documents() -> Iterator[Document]:
    """Held-out packages first, then training files in the order of a hash until there is enough.

    Documentation files are few, so docstrings of the training files make up the missing prose.
    """
    duplicates = Duplicates()
    size = {"code": 0, "prose": 0}
    share = Counter()  # code by distribution
    for source in tqdm(sorted(sources(), key=lambda s: (s.split, s.key)), desc="corpus"):
        kind = "code" if source.path.suffix == ".py" else "prose"
        training = source.split == "train"
        full = size["code"] >= CODE_BYTES or share[source.distribution] >= PACKAGE_BYTES
        if training and kind == "code" and full:
            continue
        text = read(source)
        if text is None or (training and len(text) < SMALLEST_FILE) or not duplicates.admit(text, training):
            continue
        fields = (source.distribution, source.version, source.file)
        yield Document(*fields, kind, source.split, source.licence, text)
        size[kind] += len(text) * training
        share[source.distribution] += len(text) * (kind == "code")
        prose_wanted = size["prose"] < PROSE_SHARE * size["code"] or not training
        if kind == "code" and prose_wanted and (prose := docstrings(text)):
            yield Document(*fields, "prose", source.split, source.licence, prose)
            size["prose"] += len(prose) * training


def build() -> None:
    """Write build/minilm/corpus/<split>-<kind>.jsonl, the manifest, and the shipped held-out text with its licences."""
    folder = BUILD / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    files = {(s, k): (folder / f"{s}-{k}.jsonl").open("w") for s in ("train", "heldout") for k in ("code", "prose")}
    for document in documents():
        rows.append(document.row)
        print(json.dumps(asdict(document)), file=files[document.split, document.kind])
    for file in files.values():
        file.close()
    write_manifest(rows, MODEL / "manifest.csv.gz")
    HELDOUT.mkdir(parents=True, exist_ok=True)
    for kind in ("code", "prose"):
        (HELDOUT / f"{kind}.jsonl").write_bytes((folder / f"heldout-{kind}.jsonl").read_bytes())
    (HELDOUT / "LICENSES.txt").write_text(licence_texts())
    checksums.write(HELDOUT)
    for split, kind in files:
        size = sum(row["bytes"] for row in rows if (row["split"], row["kind"]) == (split, kind))
        print(f"{split:8} {kind:6} {size / 1e6:8.2f} MB")


def write_manifest(rows: list[dict], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["distribution"], row["file"], row["kind"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))  # no time stamp: same rows, same bytes


def licence_texts() -> str:
    """The licence files of the held-out packages, whose text is redistributed."""
    parts = []
    for name in HELD_OUT:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files:
            if re.match(r"(?i)(licen[cs]e|copying|notice)", file.name):
                parts.append(f"==== {name} {distribution.version}: {file.name} ====\n\n{file.read_text().strip()}\n")
    return "\n".join(parts)


def load(path: Path) -> list[str]:
    """The texts of a corpus file. Raises FileNotFoundError with the command that makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing; make it with: python -m kvlib.minilm corpus")
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]
