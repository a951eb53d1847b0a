"""What `make bench` measures and writes, on a tiny model and on clocks that are told what to show; no timings."""

import csv
from dataclasses import replace

import pytest
import torch

import kvlib
from kvlib.lab.speed import decoding
from kvlib.lab.speed.decoding import IDENTITY, Captured, main, measure
from kvlib.lab.speed.rows import write
from kvlib.lab.speed.settings import (
    ANCHORED,
    ARGUMENTS,
    CAPTURED,
    FULL,
    RAGGED,
    SAME,
    SETTINGS,
    STOCK,
    WANTED,
    build,
    method,
)
from kvlib.lab.speed.turns import Contestant, compared, take_turns

TINY = SETTINGS["tiny"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return build("tiny", "cpu", "float32")


class Clock:
    """Shows what it is told; every look at it takes a second."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


class Scripted:
    """Blocks of a contestant that take `cost` seconds, times a drift that grows from turn to turn."""

    def __init__(self, name, cost, clock, log):
        self.name, self.cost, self.clock, self.log = name, cost, clock, log

    def __call__(self) -> float:
        seconds = self.cost * 4 ** self.log.count(self.name)
        self.log.append(self.name)
        self.clock.seconds += seconds
        return seconds


def rows_of(file) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_pairs_are_interleaved_and_ratios_paired():
    """A drift by 4 from turn to turn moves neither the median nor the extremes of the ratios."""
    clock, log = Clock(), []
    blocks = {name: Scripted(name, cost, clock, log) for name, cost in (("stock", 2.0), ("h2o", 3.0))}
    turns = take_turns(blocks, 3, clock, limit=1e9)
    assert log == ["stock", "h2o"] * 3
    assert turns == [{"stock": 2.0 * 4**i, "h2o": 3.0 * 4**i} for i in range(3)]
    found = compared("h2o", "stock", turns, "ms_per_token")
    assert (found["ratio_min"], found["ratio"], found["ratio_max"], found["pairs"]) == (1.5, 1.5, 1.5, 3)
    assert (found["ms_per_token_min"], found["ms_per_token"], found["ms_per_token_max"]) == (3e3, 12e3, 48e3)
    assert found["baseline_ms"] == 8e3


def test_the_median_is_that_of_ratios():
    found = compared("a", "b", [{"a": a, "b": b} for a, b in ((1.0, 1.0), (2.0, 8.0), (9.0, 3.0))], "ms")
    assert (found["ratio_min"], found["ratio"], found["ratio_max"]) == (0.25, 1.0, 3.0)  # 2 / 3 from the two medians


def test_time_runs_out_after_two_turns_at_the_earliest():
    clock, log = Clock(), []
    assert len(take_turns({"a": Scripted("a", 1.0, clock, log)}, 9, clock, limit=0.0)) == 2 == len(log)


def test_a_block_times_all_but_its_first_token(model):
    ids, passes, seen = torch.ones(2, 10, dtype=torch.int64), [], []
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0].shape)))
    contestant = Contestant(model, ids, lambda: seen.append(len(passes)) or 10.0 * len(passes))
    try:
        assert (contestant.read(), contestant.decode(4), contestant.decode(4)) == (10.0, 10.0, 10.0)
    finally:
        hook.remove()
    assert passes == [(2, 10)] + [(2, 1)] * 10
    assert seen == [0, 1, 2, 6, 7, 11]
    assert contestant.length == 20


@pytest.mark.parametrize("name", [None, "full", "h2o", "snapkv"])
def test_blocks_decode_what_one_block_would(model, name):
    """Taking turns on a model changes nothing: the tokens are those of decoding without a break."""
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0))
    method = None if name is None else kvlib.method(name, budget=1.0 if name == FULL else 0.5)
    broken, whole, other = (
        Contestant(model, ids, Clock(), m) for m in (method, method, kvlib.method("tova", budget=0.3))
    )
    for contestant in (broken, whole, other):
        contestant.read()
    for _ in range(3):
        broken.decode(3)
        other.decode(3)
    whole.decode(11)
    assert torch.equal(broken.next, whole.next)
    assert broken.length == whole.length == {None: 52, "full": 52, "h2o": 20, "snapkv": 32}[name]
    assert model.config._attn_implementation == "sdpa"


def test_all_have_decoded_as_much_and_the_short_cache_is_as_long_as_the_compressed(model, monkeypatch):
    made = []
    monkeypatch.setattr(decoding, "Contestant", lambda *a: made.append(Contestant(*a)) or made[-1])
    rows = decoding.contest(replace(TINY, pairs=4), model, ("full", "h2o", "snapkv"), Clock())
    stock, full, h2o, snapkv, *short = made
    steps = 5 * 3  # a block that is not counted and four that are, of two tokens and one that is not timed
    assert [c.seen - c.ids.shape[1] for c in made] == [steps] * 6
    assert [c.ids.shape[1] for c in short] == [32 - 9, 32]  # 9 decoded halfway through the four blocks
    assert (stock.length, full.length, h2o.length, snapkv.length) == (64 + steps, 64 + steps, 32, 32 + steps)
    assert [(row["method"], row["baseline"]) for row in rows] == [
        ("full", STOCK),
        *((method, baseline) for method in ("h2o", "snapkv") for baseline in (STOCK, FULL, SAME)),
    ]


READ = {  # bytes of one prompt: each token is of 2 layers, 2 KV heads and 4 query heads, 8 channels in float32
    "full": 2 * 2 * 76 * 64,  # 64 tokens of the prompt, and four blocks of one and two
    "h2o": 2 * 2 * 32 * 64,
    "snapkv": 2 * 2 * (32 + 12) * 64,
    "tidaldecode, group": 2 * 76 * 64 + 2 * 32 * 64,  # layer 0 reads everything and chooses
    "quest, page 16": 2 * 2 * 76 * 64,  # its first two layers are dense
    "loki, rank 0.25": 2 * (4 * 32 * 64 + 2 * 76 * 2 * 4),  # two directions of all keys
    "tokenselect, no vote stands": 2 * (2 * 32 * 64 + 2 * (76 - 1 - 6) * 8 * 4),  # keys between 1 first and 6 newest
}


def test_bytes_read_are_those_of_the_last_step(model, monkeypatch):
    """Counted by hand; what is not read sparsely is what is stored, and all rows of the batch count."""
    monkeypatch.setitem(ARGUMENTS, "tidaldecode, group", {"selection_layers": (0,), "heads": "group"})
    rows = decoding.contest(replace(TINY, batch=3), model, tuple(READ), Clock())
    for row in rows:
        assert row["read_bytes"] == 3 * READ[row["method"]], row["method"]
        assert row["full_bytes"] == 3 * READ["full"]
        assert row["stored_bytes"] == 3 * READ[row["method"] if row["method"] in ("h2o", "snapkv") else "full"]
    assert {row["method"] for row in rows} == {*READ}


def test_a_contestant_s_arguments_reach_its_method():
    found = method("tidaldecode, all", 0.1)
    assert found == kvlib.method("tidaldecode", budget=0.1, selection_layers=(2, 14), heads="all")
    assert method("tidaldecode, all" + CAPTURED, 0.1) == found


def test_rows_of_before_have_no_bytes_read(tmp_path):
    """A column that a table lacks stays empty where nothing was measured anew."""
    out, known = tmp_path / "speed.csv", {"setting": "a", "device": "x", "budget": 0.5, "baseline": STOCK}
    write([known | {"method": name, "stored_bytes": 7} for name in ("h2o", "tova")], out, IDENTITY)
    write([known | {"method": "tova", "stored_bytes": 7, "read_bytes": 5}], out, IDENTITY)
    assert [(row["method"], row["stored_bytes"], row["read_bytes"]) for row in rows_of(out)] == [
        ("h2o", "7", ""),
        ("tova", "7", "5"),
    ]


def test_rows_of_a_fake_clock():
    """A look a second: two tokens take one, whoever decodes them, and so does a prompt."""
    rows = measure("tiny", replace(TINY, methods=("full", "tova"), together=1), Clock(), command="none")
    assert [(row["method"], row["baseline"]) for row in rows] == [("full", STOCK), ("tova", STOCK), ("tova", SAME)]
    for row in rows:
        assert (row["ms_per_token"], row["ratio_min"], row["ratio_max"], row["pairs"]) == (500, 1, 1, 3)
        assert (row["prefill_ms"], row["prefill_ratio"], row["budget"]) == (
            1000,
            1,
            1 if row["method"] == "full" else 0.5,
        )
        assert row["stored_bytes"] <= row["full_bytes"] and row["threads"] == 1


def test_the_tiny_profile_writes_its_table_and_nothing_on_the_error_stream(tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    main(["--tiny", "--methods", "full", "vatp", "pyramidkv", "--pairs", "1", "--out", str(out)])
    printed, rows = capsys.readouterr(), rows_of(out)
    assert printed.err == ""
    assert "≤ 1.05" in printed.out and STOCK in printed.out
    assert [(row["method"], row["baseline"]) for row in rows] == [
        ("full", STOCK),
        *((method, baseline) for method in ("pyramidkv", "vatp") for baseline in (FULL, STOCK, SAME)),
    ]
    assert {row["command"] for row in rows} == {
        "python -m kvlib.lab.speed.decoding --tiny --methods full vatp pyramidkv --pairs 1"
    }
    assert all(len(row[key].strip("0").replace(".", "")) <= 8 for row in rows for key in ("ratio", "ms_per_token"))


def test_a_rerun_replaces_its_rows_and_nothing_else(tmp_path):
    out, known = tmp_path / "speed.csv", {"budget": 0.5, "baseline": STOCK}

    def row(setting, device, method, ms, **more):
        return {"setting": setting, "device": device, "method": method, **known, "ms_per_token": ms, **more}

    write(
        [row("b", "x", "h2o", 1.0), row("b", "x", "h2o", 2.0, baseline=SAME), row("a", "y", "tova", 3.250)],
        out,
        IDENTITY,
    )
    write([row("b", "z", "h2o", 4.0), row("b", "x", "full", 5.0)], out, IDENTITY)
    before = out.read_text().splitlines()
    write([row("b", "x", "h2o", 6.0)], out, IDENTITY)
    after = out.read_text().splitlines()
    assert [line for line in before if line not in after] == ["b,x,h2o,0.5,stock,1.0", f"b,x,h2o,0.5,{SAME},2.0"]
    assert [line for line in after if line not in before] == ["b,x,h2o,0.5,stock,6.0"]
    assert [tuple(r.values())[:3] for r in rows_of(out)] == [
        ("a", "y", "tova"),
        ("b", "x", "full"),
        ("b", "x", "h2o"),
        ("b", "z", "h2o"),
    ]


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--tokens", "-1"], ["--methods", "h3o"], ["--settings", "x"]])
def test_arguments_that_cannot_work(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--tiny", "--out", str(tmp_path / "speed.csv"), *arguments])
    assert not list(tmp_path.iterdir())


def test_targets_are_those_of_methods_that_are_measured():
    methods = {name for setting in SETTINGS.values() for name in setting.methods}
    assert {method for method, _, _ in WANTED} <= methods
    assert {name.removesuffix(CAPTURED) for name in methods - {*RAGGED, *ARGUMENTS, *ANCHORED}} <= {*kvlib.METHODS}


def test_prompts_in_lines_are_for_methods_that_forget_lines(monkeypatch):
    """One of the two layers is full; the other one holds the first token, anchors, and the decoded line."""
    monkeypatch.setitem(ANCHORED, "anchorcoder, per 2", {"anchor": 1, "per": 2, "forced": False})
    setting = replace(TINY, methods=("anchorcoder, per 2",), prompt=60, lined=True, together=1)
    (against_stock, against_short) = measure("tiny", setting, Clock())
    entry, decoded = 2 * 2 * 8 * 4, (1 + setting.pairs) * (setting.tokens + 1)
    assert against_stock["full_bytes"] == 2 * (60 + decoded) * entry and against_stock["budget"] is None
    # a decoded token may be an anchor by chance; no more than all that was decoded is there
    least, most = ((60 + decoded) + (1 + 6 + some) for some in (0, decoded))
    assert least * entry <= against_stock["stored_bytes"] <= most * entry
    assert against_short["baseline"] == "stock at the same length"


def test_captured_steps_decode_the_same():
    """A contestant whose steps are captured goes through the same tokens as one whose steps are not."""
    torch.manual_seed(0)
    model, ids = build("tiny", "cpu", "float32"), torch.randint(64, (1, 64))
    for name in ("full", "h2o", "snapkv"):
        method = kvlib.method(name, budget=1.0 if name == FULL else 0.5)
        ends = []
        for cls, steps in ((Contestant, 1 + 8), (Captured, 4 + 5)):
            contestant = cls(model, ids, Clock(), method)
            contestant.read()
            contestant.decode(steps - (1 if cls is Contestant else 4))
            ends.append((contestant.seen, contestant.next.tolist(), contestant.run.stored_bytes()))
        assert ends[0] == ends[1]
