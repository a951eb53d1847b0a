"""The sets by name: columns, files with their checksums, how to read them, where else they are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvlib.lab.evaluation.benchmarks.files import File
from kvlib.lab.evaluation.benchmarks.hub import Hub
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH
from kvlib.lab.evaluation.benchmarks.reading import (
    MBPP_SPLITS,
    join_wikitext,
    read_books,
    read_gutenberg,
    read_json,
    read_jsonl,
    read_mbpp,
    read_member,
    read_text,
)
from kvlib.nearest import unknown

MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
WIKITEXT = Hub(  # the variant with <unk>, which is what the two files hold
    "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-v1", join=join_wikitext
)
SAME_NAMES = ("input", "context", "answers", "all_classes", "length", "language", "dataset")
V2_COLUMNS = "domain sub_domain difficulty length question choice_A choice_B choice_C choice_D answer context"
PLUS_COLUMNS = "task_id prompt canonical_solution entry_point base_input plus_input atol"
LONGBENCH_ARCHIVE = "longbench/data.zip"
LONGBENCH_HUB = Hub("zai-org/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672", file="data.zip")
LONGBENCH_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"


@dataclass(frozen=True)
class Benchmark:
    """A set: column -> its published name, split -> file (the first is the default), how to read it, where else it is.

    read: (bytes of the file, split) -> rows with the published names.
    """

    columns: dict[str, str]
    files: dict[str, File]
    read: Callable[[bytes, str], list[dict]]
    hub: Hub | None = None


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
        same("title text"),
        {"test": File("pg19/test", None, 100)},
        read_books,
        Hub(
            "emozilla/pg19",
            "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
            file="data/test-00000-of-00001-29a571947c0b5ccc.parquet",
        ),
    ),
    "humaneval+": Benchmark(
        same(PLUS_COLUMNS),
        {"test": File("HumanEvalPlus.jsonl.gz", None, 164)},
        read_jsonl,
    ),
    "mbpp+": Benchmark(
        same(PLUS_COLUMNS),
        {"test": File("MbppPlus.jsonl.gz", None, 378)},
        read_jsonl,
    ),
    "longbench-v2": Benchmark(
        {"id": "_id", **same(V2_COLUMNS)},
        {"test": File("longbench_v2.json", None, 503)},
        read_json,
        Hub("zai-org/LongBench-v2", None, file="data.json"),  # no commit of it has been seen from here
    ),
    **{f"longbench/{name}": longbench(name, task.samples) for name, task in LONGBENCH.items()},
    **{
        f"longbench/{name}_e": longbench(f"{name}_e", task.samples_e)
        for name, task in LONGBENCH.items()
        if task.samples_e
    },
}


def find(name: str) -> Benchmark:
    """The set of that name. Raises ValueError with the nearest name."""
    if name not in BENCHMARKS:
        raise unknown("data set", name, BENCHMARKS)
    return BENCHMARKS[name]
