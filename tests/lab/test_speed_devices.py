"""What compares models on one and on several devices, and studies by one and by several processes: no timings."""

import csv

import accelerate
import pandas as pd
import pytest
import tiny
import torch

import kvlib
from kvlib.lab.results import making
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.speed import devices, shards

RUN = "cpu cpu --model minilm --prompt 1024 --tokens 2 --pairs 2 --methods full h2o --out".split()


def rows_of(file) -> dict[str, dict]:
    with file.open(newline="") as lines:
        return {row.get("method") or row["processes"]: row for row in csv.DictReader(lines)}


def test_the_same_sets_and_tokens_on_several_devices(tmp_path):
    devices.main([*RUN, str(tmp_path / "devices.csv")])
    rows = rows_of(tmp_path / "devices.csv")
    model = kvlib.load()[0]
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    for row in rows.values():
        assert int(row["sets"]) == int(row["equal_sets"]) == 2 * layers * heads
        assert row["blocks"] == row["blocks_equal"] == "3" and row["places"] == "cpu cpu"
        assert row["stored_bytes"] == row["last_device_bytes"] and float(row["ratio"]) > 0
    assert int(rows["h2o"]["stored_bytes"]) < 0.25 * int(rows["full"]["stored_bytes"])


def test_other_sets_are_counted(tmp_path, monkeypatch):
    def turned(model, places):
        with torch.no_grad():  # the last layer's keys are others
            model.model.layers[-1].self_attn.k_proj.weight.mul_(-1)
        return model

    monkeypatch.setattr(devices, "spread", turned)
    devices.main([*RUN, str(tmp_path / "devices.csv")])
    rows = rows_of(tmp_path / "devices.csv")
    assert rows["full"]["equal_sets"] == rows["full"]["sets"]
    assert 0 < int(rows["h2o"]["equal_sets"]) < int(rows["h2o"]["sets"]) and int(rows["h2o"]["blocks_equal"]) < 3


@pytest.mark.parametrize("build", [lambda: kvlib.load()[0], lambda: tiny.build("qwen3", torch.float32)])
def test_layers_are_dealt_out_in_order(build, monkeypatch):
    found = {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, where, **more: found.update(where, **more))
    model = build()
    devices.spread(model, ["cuda:0", "cuda:1"])
    assert found.pop("main_device") == "cuda:0" and found.pop("force_hooks")
    layers = [found[f"model.layers.{i}"] for i in range(model.config.num_hidden_layers)]
    assert layers == sorted(layers) and layers.count("cuda:0") == len(layers) / 2
    assert found["model.embed_tokens"] == "cuda:0" and found["model.norm"] == found["lm_head"] == "cuda:1"
    assert all(any(name.startswith(place) for place in found) for name, _ in model.named_parameters())


def test_the_cpu_comes_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        devices.main(["cuda:0", "cpu", "--out", str(tmp_path / "none.csv")])
    assert "name the CPU first" in capsys.readouterr().err


def test_tables_of_one_and_two_processes(tmp_path, monkeypatch):
    made, study = [], STUDIES["00_kv_cache"]
    table = pd.DataFrame(
        [dict.fromkeys([*shards.CELL, *shards.MEASURED], 0.5) | {"sample": sample} for sample in range(3)]
    ).assign(divergence=float("nan"))

    def make(name, asked, block, processes, folder):
        made.append((name, dict(asked.models), processes, folder.is_dir()))
        return table.assign(value=[0.5, 0.5, 0.5 + 1e-9 * (processes == 2)]).sample(frac=1, random_state=processes)

    monkeypatch.setattr(making, "make", make)
    shards.main(["00_kv_cache", "--samples", "1", "--most", "3", "--out", str(tmp_path / "shards.csv")])
    assert made == [("00_kv_cache", dict.fromkeys(study.models, 1), processes, True) for processes in (1, 2, 3)]
    rows = rows_of(tmp_path / "shards.csv")
    assert [rows[str(n)]["equal_rows"] for n in (1, 2, 3)] == ["3", "2", "3"] and rows["1"]["speed_up"] == "1.0"
