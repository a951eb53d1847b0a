"""What times captured steps: caches that are made up, rows, what is left out; no timings."""

import copy
import csv
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.lab.speed import captured
from kvlib.lab.speed.captured import NOTHING, SMALL, compared, fill, filled, made_up, main, weight_bytes
from kvlib.lab.speed.settings import STOCK, build

IDS = torch.tensor([[5], [9]])


@pytest.fixture(autouse=True)
def nothing_to_collect(monkeypatch):
    """Looking through all objects of a test run takes longer than the runs here."""
    monkeypatch.setattr(captured, "collect", lambda: None)


@pytest.fixture(scope="module")
def model():
    return build("tiny", "cpu", "float32")


def rows_of(file) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_command_measures_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "captured.csv"
    main(["--small", "--out", str(file)])
    rows = rows_of(file)
    one, two = ([row["method"] for row in rows if row["batch"] == batch] for batch in "12")
    assert sorted(one) == ["full", "quest", STOCK, NOTHING, "tidaldecode"]
    assert sorted(two) == ["adakv", "full", STOCK, NOTHING]
    for row in rows:
        base = next(x for x in rows if x["method"] == STOCK and x["context"] == row["context"])
        assert float(row["speed_up"]) == pytest.approx(float(base["ms"]) / float(row["ms"]), rel=2e-3)
        total, total_base = (int(x["read_bytes"]) + int(x["weight_bytes"]) for x in (row, base))
        assert float(row["of_bytes"]) == pytest.approx(float(row["speed_up"]) * total / total_base, rel=2e-3)
        assert float(row["error"] or 0) < 1e-5 and row["fused"] == "False"
        assert (row["backend"] == "math") == (row["method"] in (STOCK, NOTHING)) == (not row["error"])
        assert row["command"] == "python -m kvlib.lab.speed.captured --small" and row["torch"] and row["date"]
    read = {(row["method"], row["batch"]): int(row["read_bytes"]) for row in rows}
    entry = 2 * 2 * 2 * 8 * 4  # layers, KV heads, keys and values, head_dim, float32
    assert (read[STOCK, "1"], read[NOTHING, "1"]) == (96 * entry, 16 * entry)
    more = 4 + SMALL[1].tokens * SMALL[1].blocks
    assert (read["full", "2"], read["adakv", "2"]) == (2 * (64 + more) * entry, 2 * (32 + more) * entry)
    spread = next(row for row in rows if row["method"] == "adakv")
    assert int(spread["least"]) < 32 < int(spread["most"])

    monkeypatch.setattr(captured, "build", None)
    before = file.read_text()
    capsys.readouterr()
    main(["--small", "--out", str(file)])
    assert capsys.readouterr().out.count("in the table") == len(SMALL) and file.read_text() == before


def test_what_does_not_run_has_no_row(tmp_path, monkeypatch, capsys):
    def fails(model, method, *more):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(captured, "measure", fails)
    monkeypatch.setattr(captured, "SMALL", SMALL[1:])
    main(["--small", "--out", str(tmp_path / "captured.csv")])
    assert "  adakv does not run: out of memory\n" in capsys.readouterr().out
    assert {row["method"] for row in rows_of(tmp_path / "captured.csv")} == {STOCK, NOTHING}


def test_fused_cases_are_rows_of_their_own_and_backends_are_compared(tmp_path, monkeypatch, capsys):
    """With two names of one backend, of which the clock says that the second one is slow."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    case = replace(SMALL[1], methods=SMALL[1].methods[:1])
    monkeypatch.setattr(captured, "SMALL", (case, replace(case, fused=True)))
    monkeypatch.setitem(captured.TRIED, "cpu", ("math", "twin"))
    monkeypatch.setitem(captured.BACKENDS, "twin", captured.BACKENDS["math"])
    main(["--small", "--out", str(tmp_path / "captured.csv")])
    rows = rows_of(tmp_path / "captured.csv")
    assert sorted((row["fused"], row["method"]) for row in rows) == [
        (fused, method) for fused in ("False", "True") for method in ("full", STOCK, NOTHING)
    ]
    stock = [row for row in rows if row["method"] == STOCK]
    assert all(row["error"] == "0.0" and row["backend"] in ("math", "twin") for row in stock)
    assert capsys.readouterr().out.count("  ms by backend: math ") == 4


def test_without_a_baseline_there_is_no_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(captured.TRIED, "cpu", ("cudnn",))  # which no CPU has
    with pytest.raises(RuntimeError, match="none of SDPA's backends runs stock on 96 tokens"):
        main(["--small", "--out", str(tmp_path / "captured.csv")])
    assert "  cudnn does not run: No viable backend" in capsys.readouterr().out
    assert not (tmp_path / "captured.csv").exists()


def test_without_a_gpu_there_is_the_small_run_only(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "none.csv")])


@torch.no_grad()
def test_contexts_are_those_of_a_cache_that_was_filled_by_hand(model):
    """A stock cache of fixed length holds one token less before a step; kvlib's holds all."""
    for length, step in ((23, filled(model, 2, 24)), (24, None)):
        cache = DynamicCache(config=model.config)
        for layer, (_, key, value, _) in enumerate(made_up(model, 2, 24)):
            cache.update(key[:, :, :length], value[:, :, :length], layer)
        wanted = model(IDS, past_key_values=cache).logits
        if step is not None:
            found = model(IDS, past_key_values=step).logits
        else:
            with kvlib.method("full")(model) as run:
                fill(run, 2, 24)
                found = model(IDS, past_key_values=run.cache).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_heads_of_a_group_as_queries_of_one_head(model):
    """Stock's attention is that of transformers, and sees no mask: also where one is made, as in a captured graph."""
    with captured.stock(model, 2, 24, "math") as step:
        found = step(IDS)  # on a CPU it decodes token 1, whatever it is given
    wanted = model(torch.ones_like(IDS), past_key_values=filled(model, 2, 24)).logits[:, -1]
    assert model.config._attn_implementation == "sdpa" and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    parts = torch.randn(3, 2, 4, 24, 8)  # query, key, value: queries of one token, two heads share keys
    output, _ = captured.packed(None, parts[0][:, :, :1], *parts[1:, :, :2], torch.zeros(24), 0.3)
    shared = (each.repeat_interleave(2, dim=1) for each in parts[1:, :, :2])
    exact = torch.nn.functional.scaled_dot_product_attention(parts[0][:, :, :1], *shared, scale=0.3)
    torch.testing.assert_close(output, exact.transpose(1, 2))


def test_a_few_tokens_say_enough_of_what_is_slow(monkeypatch):
    """Four tokens make ready; the clock shows how many there were. From 1 a token on they are not slow."""
    for most, blocks in ((0.5, [1.0]), (1.0, [1.0] * SMALL[0].blocks)):
        steps = []
        monkeypatch.setattr(captured, "now", lambda steps=steps: float(len(steps)))
        step = lambda ids, steps=steps: steps.append(ids) or torch.zeros(1, 64)  # noqa: E731
        assert captured.timed(step, SMALL[0], "cpu", most) == blocks
        assert len(steps) == 4 + (len(blocks) * SMALL[0].tokens if most == 1.0 else 0)


@torch.no_grad()
def test_fused_is_the_same_model(monkeypatch):
    """Norms, MLPs and rotation are what is compiled, here by a compiler that leaves all as it is."""
    compiled, compile = [], torch.compile

    def eager(function, **options):
        compiled.append(getattr(function, "__self__", function))
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda x, **options: setattr(x, "forward", eager(x.forward, **options))
    )
    model, before = build("tiny", "cpu", "float32"), captured.llama.apply_rotary_pos_emb
    with captured.stock(model, 2, 24, "math") as step:
        wanted = step(IDS)
    with captured.fused(model), captured.stock(model, 2, 24, "math") as step:
        torch.testing.assert_close(step(IDS), wanted, rtol=1e-5, atol=1e-6)
        assert captured.llama.apply_rotary_pos_emb is not before
    assert captured.llama.apply_rotary_pos_emb is before and before in compiled
    names = [type(x).__name__ for x in compiled]
    assert (names.count("LlamaRMSNorm"), names.count("LlamaMLP"), len(names)) == (5, 2, 8)


def test_weights_that_are_read(model):
    total = sum(x.numel() for x in model.parameters()) * 4
    assert weight_bytes(model) == total  # logits are made by the embeddings
    apart = copy.deepcopy(model)
    apart.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert weight_bytes(apart) == total  # and here by others of as many


def test_bytes_and_attention_alone():
    row, bare, base = ({"ms": ms, "read_bytes": read} for ms, read in ((3.0, 40), (1.0, 0), (9.0, 240)))
    found = compared(row, [bare, base], 1e6, 60)
    assert found["speed_up"] == 3 and found["of_bytes"] == 1 and found["attention_speed_up"] == 4
    assert found["ideal_ms"] == pytest.approx(0.1)
    assert compared(bare, [bare, base], 1e6, 60)["attention_speed_up"] is None
    assert compared(base, [None, base], 1e6, 60)["speed_up"] == 1  # stock, before stock without a context
    alone = compared(row, None, 1e6, 60)
    assert alone["ideal_ms"] == found["ideal_ms"] and alone["speed_up"] is alone["of_bytes"] is None


def test_a_case_without_stock(tmp_path, monkeypatch):
    """As many bytes of a cache as there would be of any context that leaves as much."""
    case = replace(SMALL[1], methods=(kvlib.method("snapkv", budget=16, window=4),))
    for name, alone in (("short", replace(case, context=40, alone=True)), ("long", case)):
        monkeypatch.setattr(captured, "SMALL", (alone,))
        main(["--small", "--out", str(tmp_path / f"{name}.csv")])
    short, long = rows_of(tmp_path / "short.csv"), rows_of(tmp_path / "long.csv")
    assert [row["method"] for row in short] == ["snapkv"] and not short[0]["speed_up"] and short[0]["ideal_ms"]
    assert short[0]["read_bytes"] == next(row["read_bytes"] for row in long if row["method"] == "snapkv")
