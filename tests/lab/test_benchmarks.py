"""Loading of real data sets: from made-up files of the same schemas, from a hub that is replaced, and from real files.

The real files are read only where KVLIB_DATA names a folder that has them.
"""

import ast
import gzip
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import AutoTokenizer

from kvlib.lab.evaluation import metrics
from kvlib.lab.evaluation.benchmarks import hub as hubs
from kvlib.lab.evaluation.benchmarks import load, longbench, reading
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH
from kvlib.lab.evaluation.benchmarks.registry import BENCHMARKS
from kvlib.paths import MODELS

MADE_UP = Path(__file__).parent / "benchmarks"
COMMIT = "0123456789abcdef" * 2 + "01234567"
REAL = os.environ.get("KVLIB_DATA")
MBPP = [1, 10, 11, 12, 510, 511, 600, 601, 974]  # numbers of the made-up problems


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.write(MADE_UP / "longbench.jsonl", f"data/{name}.jsonl")


def change(monkeypatch, name: str, rows: int, data: bytes | None = None, hub=None) -> None:
    """Expect other rows of a set, with the checksum of `data` (None: any), on another hub repository."""
    sha256 = None if data is None else hashlib.sha256(data).hexdigest()
    old = BENCHMARKS[name]
    files = {split: replace(file, sha256=sha256, rows=rows) for split, file in old.files.items()}
    monkeypatch.setitem(BENCHMARKS, name, replace(old, files=files, hub=hub or old.hub))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with made-up files under the real names, and a registry that knows their checksums."""
    (tmp_path / "longbench").mkdir()
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress((MADE_UP / "humaneval.jsonl").read_bytes()))
    (tmp_path / "mbpp.jsonl").write_bytes((MADE_UP / "mbpp.jsonl").read_bytes())
    for split in ("test", "valid"):
        (tmp_path / f"wikitext-2-{split}.txt").write_bytes((MADE_UP / "wikitext.txt").read_bytes())
    book = (MADE_UP / "book.txt").read_text().replace("\n", "\r\n")  # as Project Gutenberg has them
    (tmp_path / "moby-dick.txt").write_bytes(book.encode())
    (tmp_path / "pg19" / "test").mkdir(parents=True)  # as the authors have it, beside train and validation
    for number, text in (("10146", "a\n"), ("1022", "b\n")):
        (tmp_path / "pg19" / "test" / f"{number}.txt").write_text(text)
    books = {"short_book_title": ["A", "B"], "publication_date": [1900, 1901], "url": ["", ""], "text": ["a\n", "b\n"]}
    pd.DataFrame(books).to_parquet(tmp_path / "hub.parquet")
    archive(tmp_path / "longbench/data.zip", *LONGBENCH, "qasper_e")
    change(monkeypatch, "pg19", 2)
    for name, rows in {"humaneval": 2, "mbpp": 3, "wikitext-2": 1, "moby-dick": 1}.items():
        change(monkeypatch, name, rows, (tmp_path / BENCHMARKS[name].files["test"].name).read_bytes())
    for name in ("longbench/qasper", "longbench/qasper_e", "longbench/lcc"):
        change(monkeypatch, name, 2, (tmp_path / "longbench/data.zip").read_bytes())
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    return tmp_path


def published(name: str) -> list[dict]:
    return [json.loads(line) for line in (MADE_UP / f"{name}.jsonl").read_text().split("\n")[:-1]]


# The folder


def test_humaneval(folder):
    rows = load("humaneval")
    assert [list(row) for row in rows] == [["task_id", "prompt", "canonical_solution", "test", "entry_point"]] * 2
    assert rows == published("humaneval")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [(None, MBPP[2:5]), ("test", MBPP[2:5]), ("train", MBPP[7:]), ("validation", MBPP[5:7]), ("prompt", MBPP[:2])],
)
def test_mbpp_has_its_splits(folder, monkeypatch, split, numbers):
    change(monkeypatch, "mbpp", len(numbers))
    rows = load("mbpp", split)
    assert [row["task_id"] for row in rows] == numbers
    assert rows == [row for row in published("mbpp") if row["task_id"] in numbers]


def test_texts(folder):
    text = (MADE_UP / "wikitext.txt").read_text()
    assert load("wikitext-2") == load("wikitext-2", "validation") == [{"title": "wikitext-2", "text": text}]
    assert load("pg19") == [{"title": "10146", "text": "a\n"}, {"title": "1022", "text": "b\n"}]


def test_a_book_comes_without_header_and_licence(folder):
    (book,) = load("moby-dick")
    story = "CHAPTER 1. The Gate\n\nShe opened the gate and went out.\n\nThe road was *** not *** long.\n"
    assert book == {"title": "Moby Dick", "text": story}
    with pytest.raises(ValueError, match=r"no \*\*\* START OF"):
        reading.read_gutenberg(b"CHAPTER 1", "test", "A Short Walk")


@pytest.mark.parametrize("name", ["qasper", "qasper_e", "lcc"])
def test_longbench(folder, name):
    rows = load(f"longbench/{name}")
    columns = ["id", "input", "context", "answers", "all_classes", "length", "language", "dataset"]
    assert [list(row) for row in rows] == [columns] * 2
    assert [row["id"] for row in rows] == ["5f0c", "5f0d"] and rows[0]["answers"] == ["the gardener", "a gardener"]
    assert "\u2028" in rows[1]["context"]  # which ends no line of a JSON-lines file


def test_members_of_the_archive_are_told_apart(folder, monkeypatch):
    archive(folder / "longbench/data.zip", "lcc_e")
    change(monkeypatch, "longbench/lcc_e", 2)
    change(monkeypatch, "longbench/lcc", 2)
    assert len(load("longbench/lcc_e")) == 2
    with pytest.raises(KeyError, match=r"data/lcc\.jsonl"):
        load("longbench/lcc")


def test_a_changed_file_is_refused(folder):
    file = folder / "mbpp.jsonl"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text().replace("Write", "write"))
    changed = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"^mbpp\.jsonl in {folder}, .* has sha256 {changed}, expected {found}$"):
        load("mbpp")


def test_files_made_up_here_are_not_the_real_ones(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("KVLIB_DATA", str(folder))
    for name in ("humaneval", "mbpp", "wikitext-2", "moby-dick", "longbench/qasper"):
        expected = BENCHMARKS[name].files["test"].sha256
        with pytest.raises(ValueError, match=f"expected {expected}"):
            load(name)
    with pytest.raises(ValueError, match=r"pg19, split 'test': 2 rows, expected 100"):
        load("pg19")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    for split, file in BENCHMARKS[name].files.items():
        with pytest.raises(FileNotFoundError) as error:
            load(name, split)
        for part in (file.name, file.sha256 or "", str(tmp_path), "KVLIB_DATA"):
            assert part in str(error.value)


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NotADirectoryError, match=r"KVLIB_DATA='.*nowhere' is not a folder"):
        load("humaneval")


def test_too_few_rows_and_missing_columns(folder, monkeypatch):
    change(monkeypatch, "humaneval", 164)
    with pytest.raises(ValueError, match=r"humaneval, split 'test': 2 rows, expected 164"):
        load("humaneval")
    change(monkeypatch, "mbpp", 3)
    row = {"task_id": 11, "text": "", "code": ""}
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row | {"task_id": i}) + "\n" for i in (11, 12, 13)))
    with pytest.raises(ValueError, match=r"mbpp: a row lacks test_list, test_setup_code, challenge_test_list; it has "):
        load("mbpp")


def test_unknown_names_and_splits(folder):
    with pytest.raises(ValueError, match=r"unknown data set 'humanevil'; did you mean 'humaneval'\?"):
        load("humanevil")
    with pytest.raises(
        ValueError, match=r"unknown data set 'xyz'; known: humaneval, mbpp, wikitext-2, moby-dick, pg19"
    ):
        load("xyz")
    with pytest.raises(ValueError, match=r"mbpp: unknown split 'dev'; there are: test, train, validation, prompt"):
        load("mbpp", "dev")


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub without network: `calls` of `datasets.load_dataset` and `hf_hub_download`, which give `rows` and `file`."""
    fake = SimpleNamespace(calls=[], rows=[], file=tmp_path / "downloaded")

    def load_dataset(*args, **kwargs):
        fake.calls.append((args, kwargs))
        return SimpleNamespace(to_list=lambda: fake.rows)

    def hf_hub_download(*args, **kwargs):
        fake.calls.append((args, kwargs))
        return str(fake.file)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    monkeypatch.delenv("KVLIB_DATA", raising=False)
    return fake


@pytest.mark.parametrize("name", [name for name, each in BENCHMARKS.items() if each.hub and each.hub.revision])
def test_the_hub_is_asked_for_one_commit(hub, monkeypatch, name):
    where = BENCHMARKS[name].hub
    assert len(where.revision) == 40
    hub.file.write_bytes(b"")
    monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], read=lambda data, split: []))
    change(monkeypatch, name, 0)
    assert load(name) == [] == load(name, revision=COMMIT)
    if where.file:
        arguments = (where.repository, where.file), {"repo_type": "dataset"}
    else:
        arguments = (where.repository, where.config), {"split": "test"}
    revisions = (where.revision, COMMIT)
    assert hub.calls == [(arguments[0], arguments[1] | {"revision": revision}) for revision in revisions]


def test_rows_from_the_hub_are_those_of_the_folder(hub, folder, monkeypatch):
    """Wikitext's blank lines are empty on the hub; more columns do not matter."""
    sets = ("humaneval", "mbpp", "wikitext-2", "longbench/qasper")
    wanted = {name: load(name) for name in sets}
    monkeypatch.delenv("KVLIB_DATA")
    lines = (MADE_UP / "wikitext.txt").read_text().splitlines(keepends=True)
    served = {
        "humaneval": [row | {"extra": 1} for row in published("humaneval")],
        "mbpp": [row for row in published("mbpp") if 11 <= row["task_id"] <= 510],
        "wikitext-2": [{"text": "" if line == " \n" else line} for line in lines],
    }
    files = {"longbench/qasper": "longbench/data.zip"}
    for name in sets:
        hub.rows, hub.file = served.get(name), folder / files.get(name, "")
        assert load(name) == wanted[name]
    hub.file = folder / "hub.parquet"
    assert load("pg19") == [{"title": "A", "text": "a\n"}, {"title": "B", "text": "b\n"}]


def test_content_of_the_recorded_commit_is_checked(hub, folder, monkeypatch):
    monkeypatch.delenv("KVLIB_DATA")
    hub.rows = [{"text": " = Another text = \n"}]
    with pytest.raises(
        ValueError, match=r"wikitext-2-test\.txt from Salesforce/wikitext, revision b08601e\w+, has sha256"
    ):
        load("wikitext-2")
    assert load("wikitext-2", revision=COMMIT) == [{"title": "wikitext-2", "text": " = Another text = \n"}]
    hub.file = folder / "another.zip"
    archive(hub.file, "qasper")
    with pytest.raises(
        ValueError, match=r"longbench/data\.zip from zai-org/LongBench, revision 5e628be\w+, has sha256"
    ):
        load("longbench/qasper")
    assert len(load("longbench/qasper", revision=COMMIT)) == 2


@pytest.mark.parametrize("revision", ["main", COMMIT[:7], COMMIT.upper(), COMMIT + "0"])
def test_only_commits_are_revisions(hub, revision):
    with pytest.raises(ValueError, match=rf"revision='{revision}': openai/openai_humaneval needs the 40 hexadecimal"):
        load("humaneval", revision=revision)


def test_a_set_without_a_known_commit_asks_for_one(hub, monkeypatch):
    change(monkeypatch, "humaneval", 0, hub=hubs.Hub("owner/name", None))
    with pytest.raises(ValueError, match=r"revision=None: owner/name needs the 40 hexadecimal digits of a commit"):
        load("humaneval")
    assert load("humaneval", revision=COMMIT) == []


def test_no_hub_no_folder(hub):
    sha256 = BENCHMARKS["moby-dick"].files["test"].sha256
    with pytest.raises(
        FileNotFoundError, match=rf"not on the hub: put moby-dick\.txt \(sha256 {sha256}\) into a folder"
    ):
        load("moby-dick")


@pytest.mark.parametrize("name", ["humaneval", "longbench/qasper"])
def test_what_to_do_offline(monkeypatch, name):
    """With the real `datasets` and hub client, for a repository that nobody has a local copy of."""
    pytest.importorskip("datasets")
    monkeypatch.delenv("KVLIB_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    old = BENCHMARKS[name]
    monkeypatch.setitem(BENCHMARKS, name, replace(old, hub=replace(old.hub, repository="kvlib-tests/no-such-set")))
    file = old.files["test"]
    where = r"kvlib-tests/no-such-set on the hub \(HF_HUB_OFFLINE is set\)"
    with pytest.raises(OSError, match=rf"cannot load '{name}' from {where}: put {file.name} \(sha256 {file.sha256}\)"):
        load(name)


def test_machines_without_datasets(hub, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load("humaneval")) == 2
    monkeypatch.delenv("KVLIB_DATA")
    with pytest.raises(ImportError, match=r"humaneval: install `datasets`, or put HumanEval\.jsonl\.gz"):
        load("humaneval")


# LongBench


def test_longbench_has_sixteen_tasks_and_thirteen_in_e():
    assert len(LONGBENCH) == 16 and set(LONGBENCH) < set(metrics.METRICS)
    assert [name for name in BENCHMARKS if name.endswith("_e")] == [
        f"longbench/{name}_e" for name in LONGBENCH if name not in ("narrativeqa", "musique", "qmsum")
    ]
    # 4750 samples are in all of LongBench, 1000 of them in its five Chinese tasks
    assert sum(BENCHMARKS[f"longbench/{name}"].files["test"].rows for name in LONGBENCH) == 4750 - 1000
    assert {name for name, task in LONGBENCH.items() if not task.chat} == {
        *("trec", "triviaqa", "samsum", "lcc", "repobench-p")
    }


def test_prompts_and_lengths(tmp_path, monkeypatch):
    prompts = {name: f"{name}\n{{context}}\n{{input}}" for name in LONGBENCH}
    for file, content in (
        (longbench.LONGBENCH_PROMPTS, prompts),
        (longbench.LONGBENCH_LENGTHS, dict.fromkeys(prompts, 8)),
    ):
        (tmp_path / file.name).write_text(json.dumps(content))
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"longbench_dataset2prompt\.json in .* expected 56d22ad4"):
        longbench.longbench_settings()
    for name in ("LONGBENCH_PROMPTS", "LONGBENCH_LENGTHS"):
        monkeypatch.setattr(longbench, name, replace(getattr(longbench, name), sha256=None))
    settings = longbench.longbench_settings()
    assert list(settings) == list(LONGBENCH) and settings["qasper"].max_new_tokens == 8
    row = published("longbench")[0]
    assert settings["qasper"].template.format(**row) == f"qasper\n{row['context']}\n{row['input']}"
    monkeypatch.delenv("KVLIB_DATA")
    with pytest.raises(FileNotFoundError, match=r"put longbench_dataset2prompt\.json .* github\.com/THUDM/LongBench"):
        longbench.longbench_settings()


def test_the_middle_is_cut():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "minilm")
    prompt = "".join(f"line {i}\n" for i in range(50))
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert longbench.cut_middle(prompt, len(ids), tokenizer) == prompt
    for limit in (len(ids) - 1, 40, 41):
        half = limit // 2
        wanted = tokenizer.decode(ids[1:half]) + tokenizer.decode(ids[-half:])
        assert longbench.cut_middle(prompt, limit, tokenizer) == wanted


# The real files

needs_real_files = pytest.mark.skipif(not REAL, reason="KVLIB_DATA is not set")


def real(name: str, split: str | None = None) -> list[dict]:
    file = BENCHMARKS[name].files[split or "test"]
    if not (Path(REAL) / file.name).exists():
        pytest.skip(f"{file.name} is not in the folder of KVLIB_DATA")
    return load(name, split)


@needs_real_files
def test_real_humaneval():
    for row in real("humaneval"):
        names = [
            node.name for node in ast.parse(row["prompt"] + row["canonical_solution"]).body if hasattr(node, "name")
        ]
        assert row["entry_point"] in names


@needs_real_files
def test_real_mbpp():
    rows = [row for split in BENCHMARKS["mbpp"].files for row in real("mbpp", split)]
    assert sorted(row["task_id"] for row in rows) == list(range(1, 975))
    assert all(row["test_list"] for row in rows)


@needs_real_files
@pytest.mark.parametrize("split", ["test", "validation"])
def test_real_wikitext(split):
    """The hub's rows, as its dataset viewer counts them, are the lines."""
    (row,) = real("wikitext-2", split)
    assert row["text"].count("\n") == {"test": 4358, "validation": 3760}[split]
    assert {line for line in row["text"].split("\n")[:-1] if not line.strip()} == {" "}


@needs_real_files
def test_real_book():
    (row,) = real("moby-dick")
    assert len(row["text"]) > 1_200_000 and row["text"].count("\n\n") > 2000
    assert "\r" not in row["text"] and "START OF THIS PROJECT" not in row["text"]


@needs_real_files
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("longbench/")])
def test_real_longbench(name):
    assert all(row["context"] and row["answers"] for row in real(name))


@needs_real_files
def test_real_longbench_settings():
    if not (Path(REAL) / longbench.LONGBENCH_PROMPTS.name).exists():
        pytest.skip("LongBench's prompts are not in the folder of KVLIB_DATA")
    settings = longbench.longbench_settings()
    assert {setting.max_new_tokens for setting in settings.values()} == {32, 64, 128, 512}
    assert all("{context}" in setting.template for setting in settings.values())
