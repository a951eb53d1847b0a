"""Result tables: rows are made once, survive a killed run, and are made again when something behind them changes."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlib import checksums, paths
from kvlib.lab import definitions
from kvlib.lab.evaluation import anchored, drift, evaluate, running
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results import __main__ as command
from kvlib.lab.results import keys, making, studies, tables, verification
from kvlib.lab.results.study import Study, samples_of
from kvlib.lab.results.summaries import summarise

TOKENIZER = paths.MODELS / "minilm"
STUDY = Study(
    tasks=("needle", "count"),
    length=200,
    configurations=(Configuration("full", 1.0), Configuration("snapkv", 0.2), Configuration("h2o", 0.4)),
    models={"minilm-test": 6},
)


def place(folder: Path, monkeypatch=None, name: str = "minilm-test") -> None:
    """Let `kvlib.load` and the tables use `folder`, where a random model is made."""
    model = folder / "models" / name
    if not model.exists():
        torch.manual_seed(len(name))
        config = LlamaConfig(
            vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(model)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / file, model)
        checksums.write(model)
    making.loaded.cache_clear()  # models of other folders have the same names
    change = monkeypatch.setattr if monkeypatch else setattr
    change(paths, "MODELS", folder / "models")
    change(paths, "RESULTS", folder / "results")
    change(tables, "BUILD", folder / "build")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def computed(monkeypatch):
    """The (task, samples, configurations) that the evaluator was asked for."""
    asked, plain = [], evaluate.evaluate

    def counting(model, tokenizer, configurations, task, length, samples, **options):
        asked.append((task, tuple(samples), len(configurations)))
        return plain(model, tokenizer, configurations, task, length, samples, **options)

    monkeypatch.setattr(evaluate, "evaluate", counting)
    return asked


def table_bytes(folder: Path) -> bytes:
    return (folder / "results" / "study.parquet").read_bytes()


def test_a_table_has_every_cell_once_and_is_made_once(folder, computed):
    table = making.make("study", STUDY)
    assert len(table) == 2 * 6 * 3 and not table.duplicated([*evaluate.CELL, "sample"]).any()
    assert sorted(computed) == sorted((task, block, 3) for task in STUDY.tasks for block in [(0, 1, 2, 3), (4, 5)])
    assert set(table["key"].value_counts()) == {6} and table["key"].nunique() == 6
    before = table_bytes(folder)
    computed.clear()
    making.make("study", STUDY)
    shutil.rmtree(folder / "build")
    making.make("study", STUDY)  # from the table alone
    assert computed == [] and table_bytes(folder) == before


def test_only_what_changed_is_made_again(folder, computed, monkeypatch):
    before = making.make("study", STUDY)
    computed.clear()
    more = replace(
        STUDY, configurations=(*STUDY.configurations, Configuration("random", 0.3)), models={"minilm-test": 7}
    )
    table = making.make("study", more)
    asked = [((0, 1, 2, 3), 1), ((4, 5, 6), 4)]
    assert sorted(computed) == [(task, *each) for task in ("count", "needle") for each in asked]
    assert len(table) == 2 * 7 * 4
    computed.clear()
    plain = keys.key
    monkeypatch.setattr(keys, "key", lambda m, t, s, c: plain(m, t, s, c) + ("new" if c.method == "h2o" else ""))
    making.make("study", STUDY)
    assert sorted(computed) == sorted((task, block, 1) for task in STUDY.tasks for block in [(0, 1, 2, 3), (4, 5)])
    monkeypatch.undo()
    assert len(before)


def test_keys_follow_code_parameters_and_checkpoint(folder, monkeypatch):
    snapkv = STUDY.configurations[1]

    def key(study=STUDY, task="needle", configuration=snapkv):
        return keys.key("minilm-test", task, study, configuration)

    first = key()
    assert key() == first
    others = [
        key(replace(STUDY, length=201)),
        key(replace(STUDY, protocol="later")),
        key(replace(STUDY, measure="sinks")),
        key(task="count"),
        key(configuration=Configuration("snapkv", 0.3)),
        key(configuration=Configuration("snapkv", 0.2, '{"kernel": 9}')),
        key(configuration=Configuration("h2o", 0.2)),
    ]

    monkeypatch.setattr(definitions, "digest", lambda *reached: "other code")
    others.append(key())
    monkeypatch.undo()
    place(folder, monkeypatch)
    with (folder / "models" / "minilm-test" / "config.json").open("a") as file:
        file.write("\n")
    checksums.write(folder / "models" / "minilm-test")
    others.append(key())
    assert len({first, *others}) == len(others) + 1


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_results
from kvlib.lab.evaluation import drift, evaluate
from kvlib.lab.results import making
test_results.place(Path({folder!r}))
plain = evaluate.evaluate
def slow(*args, **options):
    rows = plain(*args, **options)
    time.sleep(0.4)
    return rows
evaluate.evaluate = slow
print("ready", flush=True)
making.make("study", test_results.STUDY, 2)
"""


def test_processes_side_by_side_give_the_same_table(folder):
    making.make("study", STUDY, 2)
    whole = table_bytes(folder)
    shutil.rmtree(tables.BUILD)
    (folder / "results" / "study.parquet").unlink()
    taken = multiprocessing.Value("i", 1)
    making.work("study", STUDY, 2, 1, 2, taken)  # all but the first block
    assert taken.value == 1 + len(making.blocks(STUDY, 2))
    with pytest.raises(ValueError, match="rows; shards of another block size"):
        making.merge("study", STUDY, 2)
    making.work("study", STUDY, 2, 0, 2, multiprocessing.Value("i", 0))
    making.merge("study", STUDY, 2)
    assert table_bytes(folder) == whole
    with pytest.raises(RuntimeError, match="the process that owns the table is gone"):
        making.work("study", STUDY, 2, 0, 2, multiprocessing.Value("i", 0), parent=-1)


def test_processes_share_the_blocks():
    todo, counter = making.blocks(STUDY, 2), multiprocessing.Value("i", 0)
    one, other, taken = making.turns(todo, counter), making.turns(todo, counter), []
    for mine in (one, other, other, one):
        taken.append(next(mine))
    taken += [*one, *other]
    assert sorted(number for number, _ in taken) == list(range(len(todo)))
    assert all(todo[number] is block for number, block in taken)


def test_the_longest_blocks_come_first(folder, monkeypatch):
    order = []
    monkeypatch.setattr(making, "make_block", lambda block, *rest: order.append(block.task) or 0)
    study = replace(STUDY, tasks=("needle", "next_line", "label", "code_bits"))
    making.work("study", study, 2, 0, 1, multiprocessing.Value("i", 0))
    slow = len(order) // 2
    assert set(order[:slow]) == {"next_line", "code_bits"} and set(order[slow:]) == {"needle", "label"}


def test_means_are_written_and_deleted_with_the_table(folder, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "study", STUDY)
    table = making.make("study", STUDY)
    file = folder / "results" / "study.csv"
    pd.testing.assert_frame_equal(pd.read_csv(file), summarise(table).round(5))
    tables.clean(["study"])
    assert not file.exists() and not file.with_suffix(".parquet").exists()


def test_a_killed_run_goes_on_and_gives_the_same_table(folder, computed):
    making.make("study", STUDY, 2)
    whole = table_bytes(folder)
    tables.BUILD.rename(folder / "first")
    (folder / "results" / "study.parquet").unlink()
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"CI": "true"})
    shards = folder / "build" / "study"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.parquet"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(shards.glob("*.parquet")))
    assert 2 <= done < 6 and not (folder / "results" / "study.parquet").exists()
    computed.clear()
    making.make("study", STUDY, 2)
    assert len(computed) == 6 - done and table_bytes(folder) == whole


def test_a_block_of_many_configurations_is_kept_in_portions(folder, computed, monkeypatch):
    whole = making.make("study", STUDY)
    shutil.rmtree(folder / "build" / "study")
    (folder / "results" / "study.parquet").unlink()
    monkeypatch.setattr(making, "PORTION", 2)
    computed.clear()
    counting = evaluate.evaluate

    def failing(*arguments, **options):
        if len(computed) == 1:
            raise KeyboardInterrupt
        return counting(*arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate", failing)
    with pytest.raises(KeyboardInterrupt):
        making.make("study", STUDY)
    monkeypatch.setattr(evaluate, "evaluate", counting)
    making.make("study", STUDY)
    (task, samples, first), (_, _, rest), *others = computed
    assert (first, rest) == (2, 1) and computed[1][:2] == (task, samples)
    assert sorted(count for *_, count in others) == [1] * (len(others) // 2) + [2] * (len(others) // 2)
    pd.testing.assert_frame_equal(tables.read(folder / "results" / "study.parquet"), whole)


def test_one_owner_at_a_time(folder):
    with tables.owner("study"):
        with pytest.raises(RuntimeError, match="another process is making the table study"):
            making.make("study", STUDY)
        with tables.owner("other"):
            pass
    with tables.owner("study"):
        pass


def test_damaged_and_foreign_shards(folder):
    making.make("study", STUDY)
    shard = next((folder / "build" / "study").glob("*.parquet"))
    (folder / "results" / "study.parquet").unlink()
    content = shard.read_bytes()
    shard.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read .*; delete it, and it will be made again"):
        making.make("study", STUDY)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="0 of 36 rows; shards of another block size"):
        making.merge("study", STUDY, 3)
    pd.read_parquet(shard).drop(columns="read_bytes").assign(speed=1.0).to_parquet(shard)
    with pytest.raises(
        ValueError, match=rf"{shard.name} is of another version \(columns read_bytes, speed\); delete it"
    ):
        making.make("study", STUDY)


def test_a_current_table_beside_older_shards_stays(folder, monkeypatch):
    """As after changing to a newer state of the repository."""
    plain = keys.key
    monkeypatch.setattr(keys, "key", lambda *a: plain(*a) + "old")
    making.make("study", STUDY)
    tables.BUILD.rename(folder / "old")
    (folder / "results" / "study.parquet").unlink()
    monkeypatch.setattr(keys, "key", plain)
    making.make("study", STUDY)
    before = table_bytes(folder)
    shutil.rmtree(tables.BUILD)
    (folder / "old").rename(tables.BUILD)
    making.make("study", STUDY)
    assert table_bytes(folder) == before


# Verification


def test_verification_finds_a_tampered_table(folder):
    table = making.make("study", STUDY)
    assert verification.verify("study", STUDY, 6) == verification.verify("study", STUDY, 100) == 1.0
    for column in ("value", *verification.EXACT):
        changed = ~table[column] if column == "clamped" else 1 - table[column]
        table.assign(**{column: changed}).to_parquet(folder / "results" / "study.parquet")
        message = "rows agree with the table" if column == "value" else f"{column} differs from what the table records"
        with pytest.raises(ValueError, match=message):
            verification.verify("study", STUDY, 3, seed=5)
    table.assign(key="0").to_parquet(folder / "results" / "study.parquet")
    with pytest.raises(ValueError, match="study: rows of other code, text or models"):
        verification.verify("study", STUDY, 4)
    table[1:].to_parquet(folder / "results" / "study.parquet")
    with pytest.raises(ValueError, match="the table lacks 1 of 36 recomputed rows"):
        verification.verify("study", STUDY, 12)


MEASURED = {  # measure -> a task, its length, a protocol, and what is measured beside full
    "stepwise": ("needle", 200, "later-stepwise", Configuration("snapkv", 0.3)),
    "drift": ("prose_bits", 512, "steps 1-64", Configuration("h2o", 0.3)),
    "running": ("prose_bits", 512, "tokens 65-256", Configuration("h2o", 8)),
    "recall": ("needle", 200, "dense steps", Configuration("tidaldecode", 0.3, '{"selection_layers": [0]}')),
}


@pytest.mark.parametrize("measure", MEASURED)
def test_every_measure_can_be_made_and_verified(folder, monkeypatch, measure):
    monkeypatch.setitem(drift.PROTOCOLS, "steps 1-64", (1, 16))  # sooner done
    monkeypatch.setitem(running.PROTOCOLS, "tokens 65-256", (9, 24))
    task, length, protocol, other = MEASURED[measure]
    configurations = (Configuration("full", 1.0), other)
    study = Study((task,), length, configurations, {"minilm-test": 4}, protocol, measure=measure)
    table = making.make("study", study, size=3)
    assert set(table["protocol"]) == {protocol} and len(table) == 8
    assert table.groupby("method")["key"].nunique().eq(1).all() and table["key"].nunique() == 2
    assert verification.verify("study", study, 4) == 1.0
    others = table["method"] == other.method
    wrong = table.assign(value=table["value"].mask(others, table["value"] + 0.04))
    tables.write(wrong, folder / "results" / "study.parquet")
    with pytest.raises(ValueError, match="rows agree with the table"):
        verification.verify("study", study, 4)
    with pytest.raises(ValueError, match=f"protocol='asked': {re.escape(protocol)}"):
        replace(study, protocol="asked")
    with pytest.raises(ValueError, match=f"protocol='{re.escape(protocol)}': asked or later"):
        replace(study, measure="answers")
    with pytest.raises(ValueError, match="measure='speed': answers or"):
        replace(study, measure="speed")


@pytest.mark.parametrize(
    ("measure", "rounded"), [("answers", 1e-10), ("drift", 1 / 64), ("recall", 5e-4), ("running", 4e-4)]
)
def test_what_counts_as_rounding(measure, rounded):
    """One first choice of 64, a token or two of the best ones; nothing of an answer."""
    one = {**dict.fromkeys((*evaluate.CELL, *evaluate.MEASURED), 1.0), "task": "needle", "sample": 0, "value": 0.5}
    table = pd.DataFrame([one])
    assert verification.compare(table, table.assign(value=0.5 + rounded), measure) == 1.0
    with pytest.raises(ValueError, match="rows agree with the table"):
        verification.compare(table, table.assign(value=0.5 + 4 * rounded + 1e-8), measure)


def test_tables_get_new_keys_if_every_row_is_confirmed(folder, computed, monkeypatch, capsys):
    """Those of the tasks that were recomputed, and nothing else of the table changes; what has its key is not made."""
    monkeypatch.setitem(studies.STUDIES, "study", STUDY)
    plain, file = keys.key, folder / "results" / "study.parquet"
    monkeypatch.setattr(keys, "key", lambda m, t, s, c: plain(m, t, s, c) + ("old" if c.method != "h2o" else ""))
    older = making.make("study", STUDY)
    other = older[:2].assign(method="tova")  # of another configuration than the study has
    tables.write(pd.concat([older, other], ignore_index=True), file)
    monkeypatch.setattr(keys, "key", plain)
    before = tables.read(file)
    with pytest.raises(ValueError, match="rows of other code, text or models"):
        verification.verify("study", STUDY, 4)
    computed.clear()
    assert verification.rekey("study", STUDY, 1, seed=3) == (12, 12 + len(other))  # one task
    assert verification.rekey("study", STUDY, 4, seed=3) == (12, len(other))
    assert {task: made for task, _, made in computed} == {"count": 2, "needle": 2}  # without h2o
    after, wanted = tables.read(file), keys.keys(STUDY)
    pd.testing.assert_frame_equal(after.drop(columns="key"), before.drop(columns="key"))
    assert len(keys.current(after, wanted)) == 36 and after["key"][36:].tolist() == before["key"][36:].tolist()
    command.main(["study", "--rekey", "0.1"])
    pd.testing.assert_frame_equal(tables.read(file), after)
    assert "rows of 4 recomputed samples agree; 0 rows have new keys, 2 old ones" in capsys.readouterr().out


def test_only_what_has_old_keys_is_recomputed_to_get_new_ones(folder, computed, monkeypatch):
    """A task and a method of which there are fewer samples: the second of eight cells of two samples."""
    few = replace(
        STUDY, models={"minilm-test": 8}, configurations=STUDY.configurations[:1], fewer=STUDY.configurations[1:]
    )
    plain, (first, *_, last) = keys.key, few.tasks
    moved = few.fewer[0].method
    old = lambda m, t, s, c: plain(m, t, s, c) + "old" * (c.method == moved and t in (first, last))  # noqa: E731
    monkeypatch.setattr(keys, "key", old)
    table = making.make("study", few)
    monkeypatch.setattr(keys, "key", plain)
    found = verification.with_old_keys(few, table, keys.keys(few))
    assert (found.tasks, found.fewer, found.models) == ((first, last), (), {"minilm-test": 2})
    assert [c.method for c in found.configurations] == [moved]
    computed.clear()
    assert verification.rekey("study", few, 4) == (4, 0)
    assert sorted(computed) == sorted((task, (0, 1), 1) for task in (first, last))
    assert verification.rekey("study", few, 4) == (0, 0) and len(computed) == 2


def test_tables_keep_their_keys_if_one_row_differs(folder):
    """Which `verify` would call chance: 35 of 36 rows agree, 97.2 %."""
    file = folder / "results" / "study.parquet"
    table = making.make("study", STUDY)
    changed = table.assign(key="old", value=table["value"].where(table.index != 7, 1 - table["value"]))
    tables.write(changed, file)
    before = table_bytes(folder)
    assert verification.compare(changed, table) == pytest.approx(35 / 36)
    with pytest.raises(ValueError, match="study: 97.22% of the recomputed rows agree, not all: make results"):
        verification.rekey("study", STUDY, 12)
    assert table_bytes(folder) == before
    tables.write(changed.assign(stored_bytes=1), file)
    with pytest.raises(ValueError, match="stored_bytes differs from what the table records"):
        verification.rekey("study", STUDY, 4)


def test_models_with_different_numbers_of_samples(folder, computed, monkeypatch):
    place(folder, monkeypatch, "minilm-second")
    study = replace(STUDY, models={"minilm-test": 5, "minilm-second": 2})
    table = making.make("study", study, size=2)
    assert sorted(computed) == sorted(
        (task, samples, 3) for task in STUDY.tasks for samples in [(0, 1), (2, 3), (4,), (0, 1)]
    )
    counts = table.groupby(["model", "task", "method"])["sample"].agg(list)
    assert counts["minilm-test"].tolist() == [[*range(5)]] * 6 and counts["minilm-second"].tolist() == [[0, 1]] * 6
    assert table.groupby("model")["key"].nunique().tolist() == [6, 6] and table["key"].nunique() == 12
    assert samples_of(study) == 14 and len(table) == 14 * 3
    computed.clear()
    assert verification.verify("study", study, 14) == 1.0
    assert sorted(computed) == sorted((task, (*range(n),), 3) for task in STUDY.tasks for n in (5, 2))
    # fewer of one model afterwards, the others stay
    fewer = making.make("study", replace(study, models={"minilm-test": 3, "minilm-second": 2}), size=2)
    assert fewer.groupby("model")["sample"].nunique().to_dict() == {"minilm-second": 2, "minilm-test": 3}


def test_what_decides_nothing_has_a_quarter_of_the_samples(folder, computed):
    more = (Configuration("random", 0.3), Configuration("tova", 0.3))
    study = replace(STUDY, fewer=more, models={"minilm-test": 9})
    table = making.make("study", study, size=4)
    samples = table.groupby(["method", "task"])["sample"].agg(list)
    assert all(own == [*range(2 if method in ("random", "tova") else 9)] for (method, _), own in samples.items())
    assert len(table) == study.rows == 2 * (9 * 3 + 2 * 2)
    before = table_bytes(folder)
    computed.clear()
    making.make("study", study, size=4)
    assert computed == [] and table_bytes(folder) == before
    assert verification.verify("study", study, 18) == 1.0  # all of them
    assert {(samples, count) for _, samples, count in computed} == {((0, 1), 5), ((*range(2, 9),), 3)}
    with pytest.raises(ValueError, match="a configuration twice"):
        replace(STUDY, fewer=STUDY.configurations[:1])


def test_of_each_method_one_by_lot(folder, computed):
    again = tuple(Configuration("snapkv", budget) for budget in (0.3, 0.4, 0.5))
    study = replace(STUDY, configurations=(*STUDY.configurations, *again))
    making.make("study", study)
    computed.clear()
    assert verification.verify("study", study, 2, seed=1, by_lot=True) == 1.0
    assert {count for *_, count in computed} == {3}
    chosen = {verification.one_of_each_method(study, seed).everything for seed in range(40)}
    assert {len({c.method for c in own}) for own in chosen} == {3} and len(chosen) == 4


def test_a_share_is_of_the_samples_of_all_models(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(verification, "verify", lambda name, study, *given: asked.append(given[:2]) or 1.0)
    study = replace(STUDY, models={"minilm-test": 30, "minilm-second": 20})
    monkeypatch.setitem(studies.STUDIES, "study", study)
    for share, seed in (("0.2", 3), ("0.01", 0), ("1", 1)):
        command.main(["study", "--verify", share, "--seed", str(seed)])
    assert asked == [(20, 3), (4, 0), (100, 1)]
    assert "study: 100.0% of the rows of 20 recomputed samples agree" in capsys.readouterr().out
    monkeypatch.setitem(studies.STUDIES, "study", replace(STUDY, models={"minilm-test": 1}))
    command.main(["study", "--verify", "1"])
    assert asked[-1] == (2, verification.todays_seed())  # all that there are, drawn by the date


def test_cleaning_leaves_other_tables(folder, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "study", STUDY)
    making.make("study", STUDY)
    other = folder / "results" / "timings.parquet"
    pd.DataFrame({"seconds": [1.0]}).to_parquet(other)
    assert [*checksums.listed(folder / "results")] == ["study.csv", "study.parquet"]
    assert checksums.problems(folder / "results") == []
    command.main(["study", "--clean"])
    assert sorted(path.name for path in (folder / "results").iterdir()) == [checksums.NAME, other.name]
    assert checksums.listed(folder / "results") == {}
    assert not list((folder / "build" / "study").glob("*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["00_kv_cash"], "unknown study 00_kv_cash; known: 00_real"),
        (["--verify", "0"], "a share of the samples, in (0, 1]"),
        (["--verify", "1.5"], "a share of the samples, in (0, 1]"),
        (["--rekey", "0"], "--rekey 0.0: a share of the samples, in (0, 1]"),
        (["--rekey", "1", "--clean"], "--clean: not allowed with argument --rekey"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_bad_studies(folder):
    with pytest.raises(ValueError, match="unknown task 'needles'; did you mean 'needle'"):
        replace(STUDY, tasks=("needles",))
    with pytest.raises(ValueError, match="unknown method 'snapkw'"):
        replace(STUDY, configurations=(Configuration("snapkw", 0.5),))
    with pytest.raises(ValueError, match="protocol='spoken': asked or later"):
        replace(STUDY, protocol="spoken")
    with pytest.raises(ValueError, match="measure='speed': answers or sinks"):
        replace(STUDY, measure="speed")
    for models in ({}, {"minilm-test": 0}, {"minilm-test": 2.0}):
        with pytest.raises(ValueError, match="a whole number of samples >= 1 for at least one model"):
            replace(STUDY, models=models)
    with pytest.raises(ValueError, match="length=4096: the model's window is 2048 tokens"):
        making.make("study", replace(STUDY, length=4096))


# Arms, most of which are not shipped

ARM = replace(STUDY, tasks=("needle",), models={"minilm-test": 4, "minilm-gone": 4})


def arms(folder: Path, monkeypatch, **changed) -> None:
    """Both models of `ARM` are listed as arms."""
    for name in ARM.models:
        place(folder, monkeypatch, name)
    sums = {name: name[::-1] for name in ARM.models} | changed
    file = folder / "models" / "arms.csv"
    file.write_text("arm,base,sha256\n" + "".join(f"{name},minilm,{each}\n" for name, each in sums.items()))
    keys.recorded.cache_clear()


def test_keys_of_arms_are_there_without_their_weights(folder, monkeypatch):
    arms(folder, monkeypatch)
    first = keys.keys(ARM)
    shutil.rmtree(folder / "models" / "minilm-gone")
    assert keys.checkpoint("minilm-gone") == "minilm-gone"[::-1] and keys.keys(ARM).equals(first)
    with pytest.raises(
        ValueError, match=r"minilm-D1 is not listed in arms.csv: train it with `python -m kvlib.anchored"
    ):
        keys.checkpoint("minilm-D1")
    arms(folder, monkeypatch, **{"minilm-gone": "other weights"})
    assert ((keys.keys(ARM)["key"] != first["key"]) == (first["model"] == "minilm-gone")).all()


def test_arms_that_are_not_here_are_not_recomputed(folder, monkeypatch, capsys):
    arms(folder, monkeypatch)
    making.make("study", ARM)
    rows, asked = tables.read(folder / "results" / "study.parquet"), []
    monkeypatch.setattr(
        verification, "draw", lambda study, *rest: asked.append(study.models) or [("minilm-test", "needle", 1)]
    )
    shutil.rmtree(folder / "models" / "minilm-gone")
    assert verification.verify("study", ARM, 4) == 1 and asked == [{"minilm-test": 4}]
    said = "study: without the weights of minilm-gone, which `python -m kvlib.anchored train` makes, "
    assert f"{said}only rows of other models are recomputed\n" in capsys.readouterr().out
    rows.assign(key="old").to_parquet(folder / "results" / "study.parquet")
    assert verification.rekey("study", ARM, 4) == (12, 12)  # of those that were recomputed
    shutil.rmtree(folder / "models" / "minilm-test")
    making.loaded.cache_clear()
    rows.to_parquet(folder / "results" / "study.parquet")
    for check in (verification.verify, verification.rekey):
        with pytest.raises(FileNotFoundError, match="minilm-test, minilm-gone, which .* nothing can be recomputed"):
            check("study", ARM, 4)
    monkeypatch.setitem(studies.STUDIES, "study", ARM)
    command.main(["study", "--verify", "0.5"])  # goes on with the next one
    assert "nothing can be recomputed" in capsys.readouterr().out


PLANTED = Study(
    tasks=("needle", "code_bits"),
    length=512,
    configurations=(Configuration("anchorcoder", 1.0),),
    models={"minilm-test": 4},
    protocol="planted",
    measure="anchored",
)


def test_measures_may_have_columns_of_their_own(folder):
    config = folder / "models" / "minilm-test" / "config.json"
    settings = {"anchor": 3, "ends": [202], "per": None, "source": None, "beyond": None, "spread": True, "longest": 96}
    config.write_text(json.dumps({**json.loads(config.read_text()), "anchorcoder": settings}))
    checksums.write(config.parent)
    table = making.make("study", PLANTED)
    before = table_bytes(folder)
    shutil.rmtree(folder / "build")
    making.make("study", PLANTED)
    file = folder / "results" / "study.parquet"
    assert table_bytes(folder) == before and list(tables.read(file)) == [*tables.COLUMNS, *anchored.EXTRA]
    assert table["anchor_nats"].notna().eq(table["task"] == "code_bits").all() and table["spurious"].notna().all()
    assert verification.verify("study", PLANTED, 8) == 1
    for column in anchored.EXTRA:
        table.assign(**{column: 1.01 * table[column] + 0.01}).to_parquet(file)
        with pytest.raises(ValueError, match="recomputed rows agree with the table"):
            verification.verify("study", PLANTED, 8)
    table.assign(speed=1.0).to_parquet(file)
    with pytest.raises(ValueError, match=r"of another version \(columns speed\)"):
        making.make("study", PLANTED)
