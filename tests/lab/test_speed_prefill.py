"""What is measured of prefill, on tiny models and on a clock that counts what layers compute; no timings."""

import csv
import itertools
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch

from kvlib import paths
from kvlib.lab.speed import prefill, summary
from kvlib.lab.speed.captured import NOTHING
from kvlib.lab.speed.settings import STOCK, WINDOW, build

TOKENS, LAYERS, PAIRS = 96, 8, 2
ORDER = [STOCK, "full", "snapkv", "h2o", "stages", "uncomp", "uncomp_stage", "participation"]
SHORTENED = ("stages", "uncomp_stage", "participation")
COLUMNS = (
    "model dtype tokens device threads torch transformers python date method arguments budget baseline "
    "ms ms_min ms_max baseline_ms ratio ratio_min ratio_max pairs command"
).split()


@pytest.fixture(scope="module")
def watched():
    """Eight layers, read by all contestants: the columns that each layer computes, the outputs, and the rows.

    The clock shows how many columns all layers have computed.
    """
    model = tiny.build("llama-gqa", torch.float32, num_hidden_layers=LAYERS)
    columns, outputs = [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: columns.append(args[0].shape[1]))
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    rows = prefill.measure("tiny", model, TOKENS, PAIRS, lambda: float(sum(columns)), command="none")
    layers = [columns[i : i + LAYERS] for i in range(0, len(columns), LAYERS)]
    return SimpleNamespace(rows=rows, layers=layers, outputs=outputs)


def test_all_read_in_turn_once_before_the_clock_counts(watched):
    """As many passes of so many layers, and no other one: nothing is decoded."""
    assert len(watched.layers) == len(watched.outputs) == len(ORDER) * (1 + PAIRS)
    assert {row["pairs"] for row in watched.rows} == {PAIRS}


def test_all_compute_the_same_logits_of_the_last_position_alone(watched):
    """`full` is stock to the last bit, and so are methods that evict when the prompt has ended; stages are not."""
    for i, output in enumerate(watched.outputs):
        stock = watched.outputs[i - i % len(ORDER)]
        assert output.logits.shape == (1, 1, tiny.VOCABULARY)
        assert torch.equal(output.logits, stock.logits) == (ORDER[i % len(ORDER)] not in SHORTENED)
    assert [type(output.past_key_values).__name__ for output in watched.outputs[:2]] == ["DynamicCache", "KVCache"]


def test_stages_compute_fewer_tokens_in_later_layers(watched):
    """Layers 2, 15, 26 and 31 of 32 are 0, 3, 6 and 7 of 8: three stages after the first, in steps down to 0.375."""
    shares = [1.0] * 3 + [1 - 0.625 / 3] * 3 + [1 - 2 * 0.625 / 3] + [0.375]
    for i, layers in enumerate(watched.layers):
        few = ORDER[i % len(ORDER)] in SHORTENED
        assert layers == [int(round(share * TOKENS, 6)) if few else TOKENS for share in shares]


def test_rows_hold_what_the_clock_has_shown(watched):
    read = LAYERS * TOKENS
    short = sum(watched.layers[-1])
    assert [list(row) for row in watched.rows] == [COLUMNS] * 13
    shorter = float(f"{short / read:.4g}")
    assert [(row["method"], row["baseline"], row["ratio"]) for row in watched.rows] == [
        ("full", STOCK, 1.0),
        ("snapkv", STOCK, 1.0),
        ("snapkv", "full", 1.0),
        ("h2o", STOCK, 1.0),
        ("h2o", "full", 1.0),
        ("stages", STOCK, shorter),
        ("stages", "snapkv", shorter),
        ("uncomp", STOCK, 1.0),
        ("uncomp", "snapkv", 1.0),
        ("uncomp_stage", STOCK, shorter),
        ("uncomp_stage", "uncomp", shorter),
        ("participation", STOCK, shorter),
        ("participation", "stages", 1.0),
    ]
    for row in watched.rows:
        assert (row["tokens"], row["dtype"], row["model"], row["command"]) == (TOKENS, "float32", "tiny", "none")
        assert row["ms"] == 1e3 * (short if row["method"] in SHORTENED else read)
        assert row["baseline_ms"] == 1e3 * (short if row["baseline"] == "stages" else read)
        assert row["ratio_min"] == row["ratio"] == row["ratio_max"]
        assert row["budget"] == (1.0 if row["method"] == "full" else 0.1)
        arguments = {
            "snapkv": '{"window": 8}',
            "stages": '{"spread": 0.0}',
            "participation": '{"statistic": "participation"}',
        }
        assert row["arguments"] == arguments.get(row["method"], "{}")


@pytest.mark.parametrize(("seconds", "turns"), [(18.0, 4), (20.0, 3), (30.0, 2)])
def test_slow_contestants_take_fewer_turns(seconds, turns):
    """Two minutes for each of eight. A turn is 16 looks at the clock; 33 are over before the third, 50 the fourth."""
    looks = itertools.count()
    rows = prefill.contest(tiny.model(), tiny.tokens(1, 24), 4, lambda: seconds * next(looks))
    assert {row["pairs"] for row in rows} == {turns}


def test_scoring_is_the_same_with_types_and_without():
    """`uncomp` adds types to `snapkv` and nothing else: window, kernel, pooling and budget agree."""
    scored, typed = (prefill.method(name) for name in ("snapkv", "uncomp"))
    for name in ("window", "kernel", "pooling", "budget"):
        assert getattr(scored, name) == getattr(typed, name)


def test_the_command_writes_lengths_and_a_rerun_replaces_its_own(tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    arguments = ["--device", "cpu", "--models", "tiny", "--pairs", "1", "--out", str(out), "--lengths"]
    prefill.main([*arguments, "24", "32"])
    prefill.main([*arguments, "32"])
    printed = capsys.readouterr()
    assert printed.err == "" and "tiny, float32, 24 tokens" in printed.out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["24"] * 13 + ["32"] * 13
    command = "python -m kvlib.lab.speed.prefill --device cpu --models tiny --pairs 1 --lengths "
    assert [row["command"] for row in rows] == [command + "24 32"] * 13 + [command + "32"] * 13


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
        (["--lengths", "64", str(WINDOW + 1)], f"--lengths {WINDOW + 1}: a prompt has 2 tokens or more, and"),
        (["--lengths", "1"], "--lengths 1: a prompt has 2 tokens or more"),
        (["--models", "gpt"], "argument --models: invalid choice: 'gpt'"),
        (["--pairs", "0"], "--pairs is a whole number >= 1"),
    ],
)
def test_arguments_that_cannot_work(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(prefill, "build", None)  # nothing is built before all arguments are known to work
    with pytest.raises(SystemExit):
        prefill.main(["--models", "tiny", "--out", str(tmp_path / "speed.csv"), *arguments])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_window_is_that_of_the_models():
    assert build("tiny", "cpu", "float32").config.max_position_embeddings == WINDOW


def test_what_is_measured_by_itself():
    """1k to 8k tokens on a CPU, up to 32k on a GPU."""
    assert prefill.LENGTHS["cpu"] == [1024, 2048, 4096, 8192]
    assert prefill.LENGTHS["cuda"] == [*prefill.LENGTHS["cpu"], 16_384, 32_768]


def measured(tokens: int) -> pd.DataFrame:
    """Rows of a length, made up: stock and the methods take 1, 1.1, 1.32, 1.43, .66, 1.65, .825 and .792 s."""
    rows, ms = [], dict(zip(ORDER, (1000.0, 1100.0, 1320.0, 1430.0, 660.0, 1650.0, 825.0, 792.0)))
    for method in ORDER[1:]:
        for baseline in dict.fromkeys((STOCK, prefill.BEFORE[method])):
            ratio = ms[method] / ms[baseline]
            row = {"method": method, "baseline": baseline, "ms": ms[method], "baseline_ms": ms[baseline], "pairs": 5}
            rows.append(row | {"ratio": ratio, "ratio_min": ratio - 0.01, "ratio_max": ratio + 0.02})
    shared = {"model": "M", "device": "D", "dtype": "float32", "threads": 2, "torch": "2", "transformers": "5"}
    return pd.DataFrame(rows).assign(tokens=tokens, date="2026-01-02", **shared)


def test_the_summary_s_numbers_are_those_of_the_rows():
    made = summary.reading(pd.concat([measured(16_384), measured(2048)])).split("\n")
    assert made[2:10] == [
        "| M | D | 2048 | 5 | stock | 1000 | 1.00 | |",
        "| M | D | 2048 | 5 | full | 1100 | 1.10 (1.09-1.12) | kvlib's cache +10.0 (+9.0 to +12.0) |",
        "| M | D | 2048 | 5 | snapkv | 1320 | 1.32 (1.31-1.34) | scoring +20.0 (+19.0 to +22.0) |",
        "| M | D | 2048 | 5 | h2o | 1430 | 1.43 (1.42-1.45) | sums +30.0 (+29.0 to +32.0) |",
        "| M | D | 2048 | 5 | stages | 660 | 0.66 (0.65-0.68) | stages -50.0 (-51.0 to -48.0) |",
        "| M | D | 2048 | 5 | uncomp | 1650 | 1.65 (1.64-1.67) | typing +25.0 (+24.0 to +27.0) |",
        "| M | D | 2048 | 5 | uncomp_stage | 825 | 0.82 (0.81-0.84) | stages -50.0 (-51.0 to -48.0) |",
        "| M | D | 2048 | 5 | participation | 792 | 0.79 (0.78-0.81) | typing +20.0 (+19.0 to +22.0) |",
    ]
    without = measured(2048).query("method != 'h2o'")  # as tables are that were written before it was measured
    assert summary.reading(without).split("\n")[2:9] == [line for line in made[2:10] if "h2o" not in line]
    assert made[10].startswith("| M | D | 16384 | 5 | stock |") and made[18] == ""  # lengths in order, not as words
    once = "in brackets. M on D: float32, batch 1, threads: 2, torch 2, transformers 5, 2026-01-02."
    assert made[19].endswith(once)  # for both lengths


def test_of_column_sums_the_fastest_kernel_of_each_work_is_shown():
    """In the order of the works, of which one did not run on the second machine; lengths as numbers."""
    works = [("forward", "flash", 4.0), ("forward", "cudnn", 2.0), ("sums", "kvlib", 3.0), ("both", "kvlib", 5.0)]
    rows = [
        {"model": "M", "device": device, "context": tokens, "work": work, "kernel": kernel, "ms": ms, "ratio": ms / 2}
        | {"ratio_q1": ms / 2 - 0.01, "ratio_q3": ms / 2 + 0.02, "extra_mib": 1.5, "torch": torch}
        for device, torch, tokens in (("D", "2", 16_384), ("D", "2", 8192), ("E", "3", 8192))
        for work, kernel, ms in works
        if (device, work) != ("E", "sums")
    ]
    facts = {"dtype": "bfloat16", "triton": "3", "date": "2026-01-02"}
    made = summary.column_sums(pd.DataFrame(rows).assign(**facts)).split("\n")
    assert made[2:5] == [
        "| M | D | 8192 | forward | cudnn | 2 | 1 (0.99-1.02) | 1.5 |",
        "| M | D | 8192 | sums | kvlib | 3 | 1.5 (1.49-1.52) | 1.5 |",
        "| M | D | 8192 | both | kvlib | 5 | 2.5 (2.49-2.52) | 1.5 |",
    ]
    assert made[5].startswith("| M | D | 16384 | forward | cudnn |") and made[10] == ""
    assert [line.split(" | ")[1:4] for line in made[8:10]] == [["E", "8192", "forward"], ["E", "8192", "both"]]
    one, two = (f"{name}: bfloat16, batch 1, torch {n}, triton 3, 2026-01-02" for name, n in (("D", 2), ("E", 3)))
    assert made[11] == f"Medians of turns, quartiles in brackets. {one}; {two}."


def test_a_case_of_captured_steps_is_a_line():
    """Methods in the order of their time; without stock there is nothing to compare with."""
    case = {"model": "M", "batch": 8, "context": 32_768, "fused": False}
    rows = [
        case | {"method": method, "budget": budget, "ms": ms, "speed_up": speed_up}
        for method, budget, ms, speed_up in (
            (STOCK, 1.0, 12.0, 1.0),
            (NOTHING, 1.0, 4.0, 3.0),
            ("full", 1.0, 15.0, 0.8),
            ("h2o", 0.2, 6.0, 1.9),  # in another run, in which stock took 11.4
        )
    ]
    rows.append(case | {"batch": 99, "method": "snapkv", "budget": 384.0, "ms": 60.0, "fused": True})
    facts = {"device": "D", "blocks": 5, "dtype": "bfloat16", "torch": "2", "transformers": "5", "date": "2026-01-02"}
    made = summary.steps(pd.DataFrame(rows).assign(**facts)).split("\n")
    assert made[2:] == [
        "| M | D | 8 x 32768 |  | 12 (4) | h2o 0.2: 6 (1.90), full: 15 (0.80) |",
        "| M | D | 99 x 32768 | yes |  | snapkv 384: 60 |",
        "",
        "Medians of 5 blocks of tokens. D: bfloat16, torch 2, transformers 5, 2026-01-02.",
    ]


def test_a_file_that_is_missing_says_so_and_one_that_is_there_is_shown(tmp_path):
    readme = (paths.ROOT / "README.md").read_text()
    for name in ("captured_speed.csv", "decoding_speed.csv", "sums_speed.csv"):
        (tmp_path / name).write_bytes((paths.RESULTS / name).read_bytes())
    empty = summary.written(readme, tmp_path)
    assert "<!-- prefill speed -->\nNot measured yet.\n<!-- end of prefill speed -->\n" in empty
    measured(2048).to_csv(tmp_path / "prefill_speed.csv", index=False)
    table = summary.reading(pd.read_csv(tmp_path / "prefill_speed.csv"))
    assert summary.written(empty, tmp_path) == empty.replace("Not measured yet.", table)
    assert summary.written(summary.written(empty, tmp_path), tmp_path) == summary.written(empty, tmp_path)
