"""Real data sets: HumanEval, MBPP, wikitext-2, books, and LongBench with LongBench-E.

`load("humaneval")` reads the files of the folder that the environment variable `KVLIB_DATA` names, and compares each
with its sha256. Without `KVLIB_DATA` it asks the hub, for one commit of one repository. Nothing of these sets belongs
to this project, so none of their text is ever committed.

What a row holds, under the names of the publishers:

- humaneval: task_id, prompt, canonical_solution, test, entry_point (164 problems, split "test");
- mbpp: task_id (a number), text, code, test_list, test_setup_code, challenge_test_list (974 problems; "test" are the
  500 that are reported, beside "train", "validation" and "prompt");
- wikitext-2 (one row a split: "test", "validation", "train"), moby-dick (one row), pg19 (100 books): title, text;
- longbench/<task> and longbench/<task>_e: id, dataset, language, input, context, answers, all_classes, length (words).
"""

import gzip
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from kvlib.nearest import unknown

VARIABLE = "KVLIB_DATA"


@dataclass(frozen=True)
class File:
    """A file in the folder of `KVLIB_DATA`; what it holds after reading, None where that is not known."""

    name: str
    sha256: str | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Hub:
    """Where the hub has a set.

    repository, revision (a commit: branches move), config: arguments of `datasets.load_dataset`.
    file: download this file as it is. `datasets` refuses repositories with loading scripts, and would fetch all splits.
    join: turns rows into the bytes of the published file, so that both ways end in the same text with one checksum.
    """

    repository: str
    revision: str | None
    config: str | None = None
    file: str | None = None
    join: Callable[[list[dict]], bytes] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set: column -> its published name, split -> file (the first is the default), how to read it, where else it is.

    read: (bytes of the file, split) -> rows with the published names.
    """

    columns: dict[str, str]
    files: dict[str, File]
    read: Callable[[bytes, str], list[dict]]
    hub: Hub | None = None


# Reading files


def read_jsonl(data: bytes, split: str = "test") -> list[dict]:
    """One JSON object a line, compressed with gzip or not."""
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_mbpp(data: bytes, split: str) -> list[dict]:
    """The published file has all problems; their numbers say which split they are in."""
    first, last = MBPP_SPLITS[split]
    return [row for row in read_jsonl(data) if first <= row["task_id"] <= last]


def read_text(data: bytes, split: str, title: str) -> list[dict]:
    return [{"title": title, "text": data.decode()}]


def read_gutenberg(data: bytes, split: str, title: str) -> list[dict]:
    """A book of Project Gutenberg without its header and licence, as PG-19 has its books, and with plain newlines.

    Raises:
        ValueError: if the lines that mark beginning and end are missing.
    """
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    marks = r"\*\*\* ?START OF TH.*?\*\*\*\n(.*)\*\*\* ?END OF TH"
    if (body := re.search(marks, text, re.DOTALL)) is None:
        raise ValueError(f"{title}: no *** START OF ... *** and *** END OF ... lines of Project Gutenberg")
    return [{"title": title, "text": body[1].strip() + "\n"}]


def read_parquet(data: bytes, split: str) -> list[dict]:
    return pd.read_parquet(io.BytesIO(data)).to_dict("records")


def read_member(data: bytes, split: str, member: str) -> list[dict]:
    """One JSON-lines file of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return read_jsonl(archive.read(member))


def join_wikitext(rows: list[dict]) -> bytes:
    """The published text: the hub has one row a line and has emptied the blank lines, which hold a space."""
    return "".join(row["text"] or " \n" for row in rows).encode()


# The sets


MBPP_SPLITS = {"test": (11, 510), "train": (601, 974), "validation": (511, 600), "prompt": (1, 10)}  # of task_id
MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
WIKITEXT = Hub(  # the variant with <unk>, which is what the two files hold
    "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-v1", join=join_wikitext
)
SAME_NAMES = ("input", "context", "answers", "all_classes", "length", "language", "dataset")
LONGBENCH_ARCHIVE = "longbench/data.zip"
LONGBENCH_HUB = Hub("zai-org/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672", file="data.zip")
LONGBENCH_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
LONGBENCH_PROMPTS = File(
    "longbench_dataset2prompt.json", "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
)
LONGBENCH_LENGTHS = File(
    "longbench_dataset2maxlen.json", "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022"
)
LONGBENCH_CONFIG = "LongBench/config of github.com/THUDM/LongBench, commit 2e00731"


@dataclass(frozen=True)
class LongBenchTask:
    """One of the sixteen English and code tasks.

    samples: rows, of LongBench and of LongBench-E (None: not in it). chat: whether prompts go through a chat template;
    few-shot and code prompts never do. Metrics are in `kvlib.lab.metrics`, by the same names.
    """

    group: str
    samples: int
    samples_e: int | None
    chat: bool = True


LONGBENCH = {
    "narrativeqa": LongBenchTask("single-document QA", 200, None),
    "qasper": LongBenchTask("single-document QA", 200, 224),
    "multifieldqa_en": LongBenchTask("single-document QA", 150, 150),
    "hotpotqa": LongBenchTask("multi-document QA", 200, 300),
    "2wikimqa": LongBenchTask("multi-document QA", 200, 300),
    "musique": LongBenchTask("multi-document QA", 200, None),
    "gov_report": LongBenchTask("summarisation", 200, 300),
    "qmsum": LongBenchTask("summarisation", 200, None),
    "multi_news": LongBenchTask("summarisation", 200, 294),
    "trec": LongBenchTask("few-shot", 200, 300, chat=False),
    "triviaqa": LongBenchTask("few-shot", 200, 300, chat=False),
    "samsum": LongBenchTask("few-shot", 200, 300, chat=False),
    "passage_count": LongBenchTask("synthetic", 200, 300),
    "passage_retrieval_en": LongBenchTask("synthetic", 200, 300),
    "lcc": LongBenchTask("code", 500, 300, chat=False),
    "repobench-p": LongBenchTask("code", 500, 300, chat=False),
}


def longbench(member: str, samples: int) -> Benchmark:
    return Benchmark(
        {"id": "_id", **{name: name for name in SAME_NAMES}},
        {"test": File(LONGBENCH_ARCHIVE, LONGBENCH_SHA256, samples)},
        partial(read_member, member=f"data/{member}.jsonl"),
        LONGBENCH_HUB,
    )


def same(names: str) -> dict[str, str]:
    """Columns that keep their published names."""
    return {name: name for name in names.split()}


BENCHMARKS = {
    "humaneval": Benchmark(
        same("task_id prompt canonical_solution test entry_point"),
        {"test": File("HumanEval.jsonl.gz", "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", 164)},
        read_jsonl,
        Hub("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),
    ),
    "mbpp": Benchmark(
        same("task_id text code test_list test_setup_code challenge_test_list"),
        {split: File("mbpp.jsonl", MBPP_SHA256, last - first + 1) for split, (first, last) in MBPP_SPLITS.items()},
        read_mbpp,
        Hub("google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "full"),
    ),
    "wikitext-2": Benchmark(
        same("title text"),
        {
            "test": File("wikitext-2-test.txt", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1),
            "validation": File(
                "wikitext-2-valid.txt", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1
            ),
            "train": File("wikitext-2-train.txt", None, 1),
        },
        partial(read_text, title="wikitext-2"),
        WIKITEXT,
    ),
    "moby-dick": Benchmark(  # Project Gutenberg, no. 2701
        same("title text"),
        {"test": File("moby-dick.txt", "f17ab08e0ad8c6e43d1e85e3cdae4e1b617ae35069cee7db8dcd457c87b1ec76", 1)},
        partial(read_gutenberg, title="Moby Dick"),
    ),
    "pg19": Benchmark(
        {"title": "short_book_title", "text": "text"},
        {"test": File("pg19-test.parquet", None, 100)},
        read_parquet,
        Hub(
            "emozilla/pg19",
            "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
            file="data/test-00000-of-00001-29a571947c0b5ccc.parquet",
        ),
    ),
    **{f"longbench/{name}": longbench(name, task.samples) for name, task in LONGBENCH.items()},
    **{
        f"longbench/{name}_e": longbench(f"{name}_e", task.samples_e)
        for name, task in LONGBENCH.items()
        if task.samples_e
    },
}


# Loading


def load(name: str, split: str | None = None, revision: str | None = None) -> list[dict]:
    """The rows of a set: from the folder of `KVLIB_DATA` if that is set, else from the hub.

    Args:
        name: one of `BENCHMARKS`. split: "test" if left out.
        revision: another commit of the hub's repository than the one recorded here; its content is not compared with
            the recorded checksum. The folder's files are always compared.

    Returns:
        rows with the columns of the module's description, in the publishers' order.

    Raises:
        ValueError: for an unknown name, split or revision; for a file that differs from its checksum, lacks a column
            or has another number of rows than it should.
        FileNotFoundError, NotADirectoryError: if the folder or its file is missing, or a set is not on the hub.
        ImportError: if the hub is needed and `datasets` is not installed.
        OSError: if the hub cannot be reached.
    """
    benchmark = find(name)
    split = split or next(iter(benchmark.files))
    if split not in benchmark.files:
        raise ValueError(f"{name}: unknown split {split!r}; there are: {', '.join(benchmark.files)}")
    file = benchmark.files[split]
    if os.environ.get(VARIABLE):
        rows = benchmark.read(local(file, from_hub(benchmark)), split)
    else:
        rows = fetch(name, benchmark, split, revision)
    if file.rows is not None and len(rows) != file.rows:
        raise ValueError(f"{name}, split {split!r}: {len(rows)} rows, expected {file.rows}")
    return [pick(name, row, benchmark.columns) for row in rows]


def find(name: str) -> Benchmark:
    """The set of that name. Raises ValueError with the nearest name."""
    if name not in BENCHMARKS:
        raise unknown("data set", name, BENCHMARKS)
    return BENCHMARKS[name]


def pick(name: str, row: dict, columns: dict[str, str]) -> dict:
    """The documented columns of a row."""
    missing = [published for published in columns.values() if published not in row]
    if missing:
        raise ValueError(f"{name}: a row lacks {', '.join(missing)}; it has {', '.join(row)}")
    return {ours: row[published] for ours, published in columns.items()}


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
    """The content of a file in the folder of `KVLIB_DATA`; `elsewhere` says where it can be had."""
    value = os.environ.get(VARIABLE)
    if not value:
        raise FileNotFoundError(f"{hint(file)}; it is {elsewhere}")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{VARIABLE}={value!r} is not a folder")
    if not (folder / file.name).is_file():
        raise FileNotFoundError(f"{describe(file)} is missing in {folder}, the folder of {VARIABLE}; it is {elsewhere}")
    return check((folder / file.name).read_bytes(), file, f"in {folder}, the folder of {VARIABLE},")


def from_hub(benchmark: Benchmark) -> str:
    if benchmark.hub is None:
        return "not on the hub"
    return f"read from {benchmark.hub.repository} on the hub when {VARIABLE} is not set"


def fetch(name: str, benchmark: Benchmark, split: str, revision: str | None) -> list[dict]:
    """Rows of a set from the hub."""
    hub, file = benchmark.hub, benchmark.files[split]
    if hub is None:
        raise FileNotFoundError(f"{name} is not on the hub: {hint(file)}")
    commit = revision or hub.revision
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise ValueError(
            f"revision={commit!r}: {hub.repository} needs the 40 hexadecimal digits of a commit, because branches move"
        )
    try:
        got = download(hub, commit) if hub.file else rows_of(hub, commit, split)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: install `datasets`, or {hint(file)}") from error
    except Exception as error:  # many kinds, depending on what fails and on versions
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise OSError(f"cannot load {name!r} from {hub.repository} on the hub{offline}: {hint(file)}") from error
    if hub.join:
        got = hub.join(got)
    if isinstance(got, list):
        return got
    if commit == hub.revision:
        check(got, file, f"from {hub.repository}, revision {commit},")
    return benchmark.read(got, split)


def rows_of(hub: Hub, commit: str, split: str) -> list[dict]:
    import datasets  # here, because machines with GPUs may lack it

    return datasets.load_dataset(hub.repository, hub.config, split=split, revision=commit).to_list()


def download(hub: Hub, commit: str) -> bytes:
    import huggingface_hub

    path = huggingface_hub.hf_hub_download(hub.repository, hub.file, repo_type="dataset", revision=commit)
    return Path(path).read_bytes()


# LongBench's prompts


@dataclass(frozen=True)
class Setting:
    """The official prompt of a task, to be filled by `template.format(**row)`, and its longest answer in tokens."""

    template: str
    max_new_tokens: int


def longbench_settings() -> dict[str, Setting]:
    """The official settings of the sixteen tasks, from two files in the folder of `KVLIB_DATA`. Errors as in `load`."""
    prompts, lengths = (json.loads(local(f, LONGBENCH_CONFIG)) for f in (LONGBENCH_PROMPTS, LONGBENCH_LENGTHS))
    return {name: Setting(prompts[name], lengths[name]) for name in LONGBENCH}


def cut_middle(prompt: str, limit: int, tokenizer) -> str:
    """LongBench's truncation: of a prompt of more than `limit` tokens the first and the last `limit // 2` stay.

    As published: special tokens count and are then skipped, and the text is tokenised again afterwards, which can give
    a few tokens more than `limit`. To be done before a chat template is applied.
    """
    ids = tokenizer(prompt).input_ids
    if len(ids) <= limit:
        return prompt
    halves = ids[: limit // 2], ids[-(limit // 2) :]
    return "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)
