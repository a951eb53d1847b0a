"""What times decode attention: what it reads, what it compares, what it leaves out; no timings."""

import csv
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kvlib.core.layout import starts
from kvlib.kernels import decode
from kvlib.lab.speed import attention
from kvlib.lab.speed.attention import FULL, KERNEL, SMALL, Case, captured, exact, listed, main, ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READS = ["whole", "a fifth", "whole, logits", "whole, 8 bits", "ragged"]
READS += [f"{n} {of}" for n in (64, "5 %") for of in ("slots, kv head", "slots, query head", "in pages")]


@pytest.fixture
def case():
    made = Case(SMALL, "tiny", 1, 320, DEVICE)
    made.fill()
    return made


def rows_of(file) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_command_measures_once_and_leaves_out_what_is_wrong(tmp_path, monkeypatch, capsys):
    right = decode.attend

    def attend(*arguments, scoring=False, **more):
        found = right(*arguments, scoring=scoring, **more)
        return found._replace(output=found.output * 1.1) if scoring else found

    monkeypatch.setattr(decode, "attend", attend)
    file = tmp_path / "attention.csv"
    main(["--small", "--out", str(file)])
    assert "whole, logits, decode is WRONG: relative error 0.1" in capsys.readouterr().out
    rows = rows_of(file)
    assert {row["read"] for row in rows if row["kernel"] == KERNEL} == set(READS) - {"whole, logits"}
    assert {row["read"] for row in rows if row["kernel"] != KERNEL} == {"whole", "a fifth"}
    entry, total = 2 * 16 * 4, 2 * 320 * 2 * 16 * 4
    if DEVICE == "cuda":
        entry, total = entry // 2, total // 2
    read = {row["read"]: int(row["read_bytes"]) for row in rows}
    assert (read["whole"], read["a fifth"]) == (total, total // 5)
    assert read["whole, 8 bits"] == total * (16 + 2) // (16 * (entry // 32))
    assert (read["64 slots, kv head"], read["5 % in pages"]) == (2 * 64 * entry, 4 * 16 * entry)
    for row in rows:
        assert float(row["error"]) < 0.01 and float(row["us_q1"]) <= float(row["us"]) <= float(row["us_q3"])
        if row["read"] != "whole, 8 bits":
            assert float(row["budget"]) == pytest.approx(int(row["read_bytes"]) / total, rel=1e-3)
        assert bool(row["block"]) == (row["kernel"] == KERNEL)
        assert row["baseline"] in {row["kernel"] for row in rows if row["kernel"] != KERNEL}
        assert row["command"] == "python -m kvlib.lab.speed.attention --small" and row["triton"] and row["date"]
    before = file.read_text()
    main(["--small", "--out", str(file)])
    assert "tiny, batch 1, 320 tokens: in the table" in capsys.readouterr().out and file.read_text() == before


class Library:
    """What `Paged` uses of FlashInfer, by its documentation: sequences are lists of pages."""

    __version__ = "of the tests"

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert workspace.dtype == torch.uint8 and layout == "NHD"

        def plan(self, indptr, indices, last_page_len, heads, kv_heads, dim, page_size, q_data_type, kv_data_type):
            assert (kv_heads, page_size) == (1, 1) and last_page_len.tolist() == [1] * (len(indptr) - 1)
            assert indptr.dtype == indices.dtype == torch.int32 and indptr[-1] == len(indices)
            self.ends, self._paged_kv_indices_buf, self.heads = indptr.tolist(), indices, heads

        def run(self, query, stored):
            assert query.shape[:2] == (len(self.ends) - 1, self.heads)
            output = torch.empty_like(query)
            for i, (begin, end) in enumerate(zip(self.ends, self.ends[1:])):
                pages = self._paged_kv_indices_buf[begin:end].long()
                key, value = (x[pages, 0, 0].float() for x in stored)
                weights = (query[i].float() @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
                output[i] = (weights @ value).to(query.dtype)
            return output


def test_a_library_reads_what_the_kernel_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "flashinfer", Library)
    monkeypatch.setattr(attention, "SMALL", replace(SMALL, batches=(2,), calls=(3, 3)))
    file = tmp_path / "attention.csv"
    main(["--small", "--out", str(file)])
    rows = rows_of(file)
    for kernel in ("flashinfer", "flashinfer, tensor cores"):
        found = {row["read"]: row for row in rows if row["kernel"] == kernel}
        assert set(found) == set(READS) - {"whole, logits", "whole, 8 bits"}
        assert all(float(row["error"]) < 0.01 and row["flashinfer"] == "of the tests" for row in found.values())
    assert not {row["baseline"] for row in rows} & {"decode", "flashinfer", "flashinfer, tensor cores"}


def test_each_call_has_lists_of_its_own(monkeypatch):
    monkeypatch.setattr(attention, "flashinfer", Library)
    made = Case(replace(SMALL, calls=(3, 3)), "tiny", 2, 320, DEVICE)
    made.fill()
    kernels = [x for x in attention.own(made) if type(x) is attention.Kernel and not x.scoring]
    for kernel in kernels:
        paged = attention.Paged(kernel, tensor_cores=False)
        for call in range(3):
            torch.testing.assert_close(paged(call).view_as(kernel(call)), kernel(call), rtol=0.02, atol=0.01)


def test_a_graph_of_many_calls_has_a_place_for_each():
    plan = replace(SMALL, graph=2**19, calls=(2, 40))
    made = Case(plan, "tiny", 1, 320, DEVICE)
    made.fill()
    contestants = [x for x in attention.own(made) if x.read in ("whole", "whole, 8 bits", "64 slots, kv head")]
    calls = {x.read: made.calls(x.read_bytes) for x in contestants}
    assert calls["whole, 8 bits"] > calls["whole"] > 2
    for contestant in contestants:
        if isinstance(contestant, attention.Kernel):
            assert len(contestant.begins) == calls[contestant.read]
            contestant(calls[contestant.read] - 1)


def test_without_a_gpu_there_is_the_small_run_only(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "none.csv")])


def test_calls_read_one_place_after_the_other():
    made = Case(replace(SMALL, graph=2**21, storage=2**19, calls=(2, 10)), "tiny", 1, 320, DEVICE)
    made.fill()
    tokens = made.tokens // 5
    places = [made.place(call, tokens) for call in range(100)]
    assert places[:3] == [0, tokens, 2 * tokens] and max(places) + tokens <= len(made.key) < max(places) + 3 * tokens
    assert made.storage_bytes == made.key.nbytes + made.value.nbytes >= 2**19
    assert [made.calls(x) for x in (2**18, 2**25, 1)] == [8, 2, 10]


def test_ragged_lengths_are_a_quarter_on_average():
    for model in FULL.models:
        made = Case(FULL, model, 8, 8192, DEVICE)
        lengths = ragged(made)
        assert lengths.shape == (8, made.kv_heads) and int(lengths.min()) >= 1 and int(lengths.max()) <= 8192
        assert float(lengths.double().mean()) / 8192 == pytest.approx(0.25, rel=0.02)
        assert int(lengths.max()) > 2 * float(lengths.double().mean()) or made.kv_heads == 3


def test_lists_name_no_slot_twice_and_pages_are_whole(case):
    slots = listed(case, 4, 64, 16)
    assert slots.shape == (1, 4, 64) and int(slots.min()) >= 0 and int(slots.max()) < 320
    assert all(len(set(row.tolist())) == 64 for row in slots[0])
    pages = slots.view(1, 4, 4, 16)
    assert (pages.diff() == 1).all() and (pages[..., 0] % 16 == 0).all()


def test_the_reference_knows_whose_list_and_which_segment(case):
    """A value of 1 in the only slot that is read gives an output of 1, and everything else is 0."""
    lengths = torch.tensor([[3, 5]])
    case.value.zero_()
    case.value[3 + 4] = 1
    slots = torch.tensor([[[0], [2], [4], [1]]], device=DEVICE)  # of query heads, the last two of the second KV head
    assert exact(case, starts(lengths), lengths, slots)[0].mean(-1).tolist() == [0, 0, 1, 0]
    assert exact(case, starts(lengths), lengths)[0].mean(-1).gt(0).tolist() == [False, False, True, True]


def test_a_block_runs_every_call(case):
    made = []

    def call(i):
        made.append(i)
        return torch.ones(1, device=DEVICE)

    block, output = captured(call, 3)
    if DEVICE == "cpu":
        made.clear()
        block()
    assert made[-3:] == [0, 1, 2] and output == 1


def test_tilings_are_tried_and_the_fastest_is_taken(case, monkeypatch):
    plan = replace(SMALL, programs=(8, 16), tiles=((32, 4, 4), (128, 8, 3)))
    monkeypatch.setattr(case, "plan", plan)
    seconds = {(64, 8): 5.0, (64, 16): 3.0, (32, 16): 2.0}
    contestant = attention.Kernel(case, "whole", torch.full((1, 2), 320))

    def fake(call, count):
        if contestant.tiling.block == 128:
            raise attention.OutOfResources(1, 0, "shared memory")
        tiling = contestant.tiling
        return lambda: seconds[tiling.block, tiling.programs], None

    monkeypatch.setattr(attention, "captured", fake)
    contestant.tune()
    assert contestant.tiling == decode.Tiling(32, 16, 4, 4)
