"""What times column sums: what it does, what it compares, what it leaves out; no timings."""

import csv

import pytest
import torch

pytest.importorskip("triton")

from kvlib.core import attention
from kvlib.kernels import column_sums as kernel
from kvlib.lab.speed import sums
from kvlib.lab.speed.sums import FULL, KERNEL, SMALL, Case, Contestant, main, tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(file) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_command_measures_once_and_leaves_out_what_is_wrong(tmp_path, monkeypatch, capsys):
    right = kernel.column_sums

    def column_sums(query, *more, **named):
        return right(query, *more, **named) * (1.01 if query.shape[2] == SMALL.window else 1)

    monkeypatch.setattr(kernel, "column_sums", column_sums)
    monkeypatch.setattr(sums, "TRIES", 1)
    file = tmp_path / "sums.csv"
    main(["--small", "--out", str(file)])
    printed = capsys.readouterr().out
    assert "window, kvlib is WRONG: error 0.00" in printed and "window, lse, kvlib is WRONG" in printed
    rows = rows_of(file)
    works = {row["work"]: row for row in rows if row["kernel"] == KERNEL}
    assert list(works) == sorted(["log-sum-exps", "sums", "sums, lse", "sums, positions"])
    assert {row["work"] for row in rows if row["kernel"] != KERNEL} == {"forward", "forward, lse"}
    for name, row in works.items():
        assert bool(row["block"]) == (name in ("log-sum-exps", "sums, lse"))
    for row in rows:
        assert bool(row["error"]) == (row["work"] != "forward") and float(row["error"] or 0) < 1e-4
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert row["baseline"] in {row["kernel"] for row in rows if row["work"] == "forward"}
        assert row["command"] == "python -m kvlib.lab.speed.sums --small" and row["triton"] and row["date"]
        products = 1 if row["work"] in ("log-sum-exps", "sums, lse") else 2
        flops = 2 * 16 * products * 2 * 40 * 41 / 2
        assert float(row["tflops"]) == pytest.approx(flops / float(row["ms"]) / 1e9, rel=2e-3)
    before = file.read_text()
    main(["--small", "--out", str(file)])
    assert "tiny, 40 tokens: in the table" in capsys.readouterr().out and file.read_text() == before


def test_without_a_gpu_there_is_the_small_run_only(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "none.csv")])


def test_logits_of_the_last_queries_are_counted():
    case = Case(SMALL, "tiny", 40, DEVICE)
    assert case.logits(40) == 2 * 40 * 41 // 2 and case.logits(1) == 2 * 40
    assert case.logits(3) == 2 * (38 + 39 + 40)


def test_log_sum_exps_are_those_of_whole_rows():
    case = Case(SMALL, "tiny", 40, DEVICE)
    logits = case.query.float() @ case.key.float().mT / 4
    future = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1)
    torch.testing.assert_close(case.norms, logits.masked_fill(future, -torch.inf).logsumexp(-1))
    weights = attention.column_sums(case.query.float(), case.key.float())
    torch.testing.assert_close(case.sums(case.query), weights)


def test_tilings_are_tried_and_the_fastest_is_taken(monkeypatch):
    case, tried = Case(SMALL, "tiny", 40, DEVICE), []
    monkeypatch.setattr(case, "plan", FULL)

    def call(tilings):
        tried.append(tilings["sums"])
        if tilings["sums"].warps == 8:
            raise sums.OutOfResources(1, 0, "shared memory")

    def fake(call, count):
        call(0)
        at = len(tried)
        return lambda: abs(at - 3) + 1.0, None

    monkeypatch.setattr(sums, "captured", fake)
    tune(case, Contestant("sums, lse", KERNEL, call, 40, 1, tuned="sums"))
    assert tried == list(FULL.tilings) and case.tilings == {"sums": FULL.tilings[2]}
