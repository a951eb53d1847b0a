"""Verdicts on somebody's own model, from a checkpoint in a folder to a page."""

import shutil

import pandas as pd
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from kvlib import paths
from kvlib.lab.claims import registered, verdicts
from kvlib.lab.evaluation import evaluate
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results import keys, tables
from kvlib.lab.results.study import Study

FULL, SNAPKV = Configuration("full", 1.0), Configuration("snapkv", 0.5)
OTHERS = (Configuration("h2o", 0.2), Configuration("random", 0.2))
STUDIES = {
    "answers": Study(("number", "cargoes", "year"), 640, (FULL, *OTHERS), {"smollm2": 9}, fewer=(SNAPKV,)),
    "sinks": Study(("number",), 640, (FULL,), {"smollm2": 9}, measure="sinks"),
}
CLAIM = {
    "paper": "Paper", "evidence": "abstract", "registered": pd.Timestamp("2026-11-29").date(), "models": ["smollm2"],
    "length": 640, "protocol": "asked",
}  # fmt: skip
CLAIMS = [
    CLAIM | {
        "id": "loss", "claim": "SnapKV loses nothing.", "table": "answers", "tasks": ["number", "cargoes"],
        "compare": {"first": {"method": "snapkv", "budget": 0.5}, "second": {"method": "full", "budget": 1.0}},
        "statistic": "mean_difference", "rule": {"above": -0.5}, "samples": 5,
    },
    CLAIM | {
        "id": "sinks", "claim": "Sinks are small.", "table": "sinks", "tasks": ["number"], "samples": 3,
        "value": {"method": "full", "budget": 1.0}, "statistic": "mean", "rule": {"below": 0.5},
    },
    CLAIM | {
        "id": "other", "claim": "Of another model.", "table": "answers", "tasks": ["number"], "models": ["minilm"],
        "value": {"method": "h2o", "budget": 0.2}, "statistic": "mean", "rule": {"below": 0.5}, "samples": 9,
    },
]  # fmt: skip


def checkpoint(folder, seed: int = 0, **changes) -> str:
    """A random model in a folder, with a small vocabulary."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes | changes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.MODELS / "minilm" / file, folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where things are, with claims and studies of their own."""
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": CLAIMS}))
    monkeypatch.setattr(verdicts, "CLAIMS", tmp_path / "claims.yaml")
    monkeypatch.setattr(verdicts, "STUDIES", STUDIES)
    monkeypatch.setattr(registered, "STUDIES", STUDIES)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "BUILD", tmp_path / "build" / "results")
    return tmp_path


def test_a_column_of_verdicts(place, capsys, monkeypatch):
    """The rows that the claims need and no others; what was made is not made again."""
    asked, plain = [], evaluate.evaluate

    def counting(*arguments, **options):
        asked.append(arguments[3:6])
        return plain(*arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate", counting)
    model = checkpoint(place / "Own-8B")
    verdicts.main([model, "--block", "2"])
    folder = place / "build" / "verdicts" / model.strip("/").replace("/", "-")
    answers, sinks = (pd.read_parquet(folder / f"{name}.parquet") for name in STUDIES)
    settings = ["task", "method", "budget", "protocol", "length", "model"]
    assert set(answers.groupby(settings)["sample"].apply(list).map(tuple)) == {(0, 1, 2, 3, 4)}
    found = set(answers[settings].itertuples(index=False, name=None))
    assert found == {
        (t, c.method, c.budget, "asked", 640, model) for t in ("number", "cargoes") for c in (FULL, SNAPKV)
    }
    assert sinks["sample"].tolist() == [0, 1, 2] and sinks["value"].isna().all()  # random weights have none
    assert len(asked) == 6 and len(set(asked)) == 6

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["table", "rows", "rows/s", "hours"]
    left = {line.split()[0]: int(line.split()[1]) for line in lines[1:4]}
    assert left == {"answers": 20 - 3 * 4, "sinks": 3 - 2, "together": 9}  # without the blocks that were timed
    assert "reproduced here" in next(line for line in lines if line.endswith("SnapKV loses nothing. [loss]"))
    assert any(line.startswith("not testable here (the table has rows without a value)") for line in lines)
    page = (folder / "VERDICTS.md").read_text()
    assert "SnapKV loses nothing." in page and model in page and "Of another model" not in page

    asked.clear()
    monkeypatch.setattr(evaluate, "evaluate", counting)
    verdicts.main([model, "--block", "2"])
    assert asked == [] and "together                0             0.00" in capsys.readouterr().out
    next((folder / "shards" / "answers").glob("*number-00002-2-*")).unlink()
    (folder / "answers.parquet").unlink()
    verdicts.main([model, "--block", "2"])
    assert asked == [("number", 640, (2, 3))]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "answers.parquet"), answers)


def test_what_cannot_work_is_said_before(place):
    with pytest.raises(SystemExit, match="kvlib: length=640: the model's window is 256 tokens"):
        verdicts.main([checkpoint(place / "short", max_position_embeddings=256)])
    with pytest.raises(SystemExit, match="kvlib: cannot load 'nowhere'"):
        verdicts.main(["nowhere"])
    assert not (place / "build" / "verdicts").exists()


def test_rows_of_another_checkpoint_are_made_again(place):
    """A folder is told by what is in it."""
    model = checkpoint(place / "one")
    first, again = keys.checkpoint(model), checkpoint(place / "same")
    assert keys.checkpoint(checkpoint(place / "other-weights", seed=1)) != first
    assert keys.checkpoint(again) == first
    (place / "same" / "README.md").write_text("of no consequence")
    keys.of_folder.cache_clear()
    assert keys.checkpoint(again) == first
    (place / "same" / "tokenizer.json").write_text("{}")
    keys.of_folder.cache_clear()
    assert keys.checkpoint(again) != first


def test_a_hub_id_is_told_by_its_commit(monkeypatch):
    class Config:
        _commit_hash = "5d1e"

    monkeypatch.setattr(keys.AutoConfig, "from_pretrained", lambda name: Config)
    assert keys.checkpoint("somebody/model-8B") == "5d1e"
    keys.commit.cache_clear()
    Config._commit_hash = None
    with pytest.raises(ValueError, match="does not say which commit"):
        keys.checkpoint("somebody/model-8B")
