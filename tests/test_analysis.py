"""What the lessons compute: attention maps against stock transformers, removals against the formula, tables by hand."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import tiny
import torch

import kvlib
from kvlib.lab import analysis, checks
from kvlib.paths import RESULTS, ROOT


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama-gqa")


@pytest.fixture(scope="module")
def snapshot(model):
    return kvlib.snapshot(model, tiny.tokens(1, 20))


# Attention


def test_maps_are_those_of_eager_attention(snapshot):
    eager = tiny.build("llama-gqa")
    eager.set_attn_implementation("eager")
    expected = eager(tiny.tokens(1, 20), output_attentions=True).attentions
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(analysis.attention_map(snapshot, layer), weights[0], atol=1e-6, rtol=1e-6)


def test_attention_received_is_the_mean_of_the_maps(snapshot):
    received = analysis.attention_received(snapshot)
    assert received.shape == (2, 4, 20)
    torch.testing.assert_close(received.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(received[1], analysis.attention_map(snapshot, 1).mean(1))


def test_errors_are_those_of_removing_tokens(snapshot):
    """By the formula, averaged over two queries, against the softmax over the others."""
    attention, errors, size = analysis.eviction_errors(snapshot, layer=1, last=2)
    query, key, value, scaling = analysis.expanded(snapshot, 1)
    for head in range(4):
        last = analysis.remove_each(query[head, -1], key[head], value[head], scaling).norm(dim=-1)
        before = analysis.remove_each(query[head, -2], key[head, :-1], value[head, :-1], scaling).norm(dim=-1)
        expected = (last + torch.cat([before, torch.zeros(1)])) / 2  # the last token did not exist for that query
        torch.testing.assert_close(errors[head], expected)
    torch.testing.assert_close(attention, analysis.attention_map(snapshot, 1)[:, -2:].mean(1))
    outputs = analysis.attention_map(snapshot, 1)[:, -2:] @ value
    torch.testing.assert_close(size[:, 0], outputs.norm(dim=-1).mean(1))


def test_best_kept_counts_the_overlap():
    errors = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert analysis.best_kept(errors, errors, 0.4).item() == 1
    assert analysis.best_kept(-errors, errors, 0.4).item() == 0
    assert analysis.best_kept(torch.tensor([[1.0, 9.0, 9.5, 0.0, 0.0]]), errors, 0.4).item() == 0.5


def test_heads_are_drawn_with_their_numbers():
    figure, axes = plt.subplots()
    analysis.show_heads(axes, torch.tensor([[0.5, 0.011, 0.25]]))
    assert [text.get_text() for text in axes.texts] == ["50", "1", "25"]
    plt.close(figure)


def test_held_out_files_have_names():
    assert analysis.heldout_code("jinja2/tests.py").count("def test_") > 10
    with pytest.raises(ValueError, match="no held-out file 'jinja2/nothing.py'; there are: attr/"):
        analysis.heldout_code("jinja2/nothing.py")


# What methods keep


def test_kept_masks_count_what_is_stored(model):
    with kvlib.method("snapkv", budget=0.5, window=4)(model) as run:
        model(tiny.tokens(1, 20))
    mask = analysis.kept_mask(run)
    assert mask.shape == (2, 2, 20) and mask.sum(-1).eq(10).all()
    assert mask[1, 0].nonzero()[:, 0].tolist() == run.kept(1)[0, 0].tolist()


def test_looking_heads(snapshot):
    """The heaviest query head of a group speaks for its KV head."""
    found = analysis.looking_heads(snapshot, [3, 4], count=4)
    looks = {
        (layer, head): analysis.attention_map(snapshot, layer)[2 * head : 2 * head + 2, -1][:, [3, 4]]
        for layer in range(2)
        for head in range(2)
    }
    best = {place: group[group.sum(1).argmax()] for place, group in looks.items()}
    assert [(layer, head) for layer, head, _ in found] == sorted(best, key=lambda place: -best[place].sum())
    assert all(torch.equal(on, best[layer, head]) for layer, head, on in found)


def test_answers_are_what_generate_writes():
    """On the shipped model: the same tokens as `generate` inside a block, and right ones with the full cache."""
    model, tokenizer = kvlib.load()
    methods = {"all": kvlib.method("full"), "some": kvlib.method("h2o", budget=0.3)}
    written = analysis.answers(model, tokenizer, "needle", 256, [3], methods)
    assert list(written.columns) == ["answer", "all", "some"]
    assert written["all"].tolist() == written["answer"].tolist()
    task = analysis.tasks.sample("needle", 256, 3, tokenizer=tokenizer)
    inputs = tokenizer(task.prompt, return_tensors="pt")
    with methods["some"](model):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0, task.length :]) == written.loc[3, "some"]


# Result tables


@pytest.fixture
def table() -> pd.DataFrame:
    """Two tasks, ten samples: the full cache is always right, snapkv in eight, its variant always."""
    cells = {("full", "{}", 1.0): 10, ("snapkv", "{}", 0.2): 8, ("snapkv", '{"kernel": 15}', 0.2): 10}
    return pd.DataFrame(
        [
            {"task": task, "method": method, "arguments": arguments, "budget": budget, "sample": sample}
            | {"value": float(sample < right), "stored_bytes": int(1000 * budget), "full_bytes": 1000}
            for task in ("needle", "dict_lookup")
            for (method, arguments, budget), right in cells.items()
            for sample in range(10)
        ]
    )


def test_configurations_have_readable_names(table):
    assert list(analysis.named(table)["configuration"].unique()) == ["full", "snapkv", "snapkv (kernel=15)"]


def test_accuracy_and_percentages(table):
    summary = analysis.accuracy(table)
    row = summary[(summary["task"] == "needle") & (summary["configuration"] == "snapkv")].iloc[0]
    assert (row["stored"], row["accuracy"], row["samples"]) == (0.2, 0.8, 10)
    assert 0.4 < row["low"] < 0.8 < row["high"] <= 1
    wide = analysis.percentages(summary)
    assert wide.columns.tolist() == [(task, kept) for task in ("needle", "dict_lookup") for kept in ("20%", "100%")]
    assert wide.loc["snapkv"].tolist() == ["80.0", "", "80.0", ""]


def test_differences_are_paired(table):
    pairs = [(("snapkv", 0.2), ("full", 1.0)), (("snapkv (kernel=15)", 0.2), ("full", 1.0))]
    rows = analysis.differences(table, pairs)
    assert rows.index.tolist() == ["snapkv 20% − full 100%", "snapkv (kernel=15) 20% − full 100%"]
    assert re.fullmatch(r"-20\.0 \[-\d+\.0, \d+\.0\]", rows.loc[rows.index[0], "needle"])
    assert rows.iloc[1].tolist() == ["+0.0 [-30.0, 30.0]"] * 2 + [0]  # ten samples that agree prove little
    assert rows["samples that differ"].tolist() == [4, 0]
    nearly = table.assign(value=table["value"].where(table["method"] == "full", 0.99999))
    assert analysis.differences(nearly, pairs).iloc[0, 0] == "+0.0 [0.0, 0.0]"  # and not -0.0
    with pytest.raises(ValueError, match=r"no rows for needle, h2o at 0.2; configurations: full, snapkv, snapkv"):
        analysis.differences(table, [(("h2o", 0.2), ("full", 1.0))])


# README


def test_readme_opens_with_what_the_table_says():
    readme = (ROOT / "README.md").read_text()
    finding = analysis.finding(pd.read_parquet(RESULTS / "00_kv_cache.parquet"))
    assert finding in " ".join(readme.split()), f"README should say: {finding}"


def test_readme_code_runs(monkeypatch, capsys):
    """The two blocks that need no download, one after the other, as written."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kvlib.registry, "METHODS", dict(kvlib.METHODS))
    monkeypatch.setattr(kvlib, "METHODS", kvlib.registry.METHODS)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        if "Qwen" not in block:
            exec(compile(block, "README.md", "exec"), names)
    assert names["run"].stored_bytes() < 0.25 * names["run"].full_bytes()
    checks.check_method("mine")


def test_readme_shows_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / name).exists(), name
