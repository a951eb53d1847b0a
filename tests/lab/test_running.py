"""Perplexity of a decoded text, against runs of the stock model and of a masked one."""

import math

import pandas as pd
import pytest
import tiny
import torch
from test_tidaldecode import Oracle
from transformers import AutoTokenizer, DynamicCache

from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.evaluation import running
from kvlib.lab.evaluation.configuration import Configuration

TASK, LENGTH = "prose_bits", 512
FULL = Configuration("full", 1.0)
TIDAL = Configuration("tidaldecode", 6, '{"selection_layers": [1]}')
CONFIGURATIONS = [FULL, TIDAL, Configuration("h2o", 6)]
WINDOWS = {"tokens 2-2": (2, 2), "tokens 2-7": (2, 7), "tokens 8-24": (8, 24)}


def random_model(**changes):
    return tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=3, **changes)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, window in WINDOWS.items():
        monkeypatch.setitem(running.PROTOCOLS, name, window)


def beginning(number: int, tokens: int, tokenizer) -> torch.Tensor:
    """Ids `(1, tokens)` of the prompt's text."""
    text = tasks.sample(TASK, LENGTH, number, tokenizer=tokenizer)
    return torch.tensor([[token for part in text.ids(tokenizer) for token in part][:tokens]])


def bits(configuration: Configuration, ids: torch.Tensor) -> list[float]:
    """Of the second token and all behind it, each decoded."""
    model = random_model()
    if configuration.method == "full":
        cache = DynamicCache()
        call = lambda token: model(token, past_key_values=cache).logits[:, -1]  # noqa: E731
        return read(call, ids)
    method = configuration.make()
    if configuration.method == "tidaldecode":
        return read(Oracle(model, method, method.budget), ids)
    with method(model) as run:
        return read(lambda token: model(token, past_key_values=run.cache).logits[:, -1], ids)


def read(call, ids: torch.Tensor) -> list[float]:
    found = []
    for token, following in zip(ids.split(1, dim=1), ids[0, 1:].tolist()):
        found.append(-call(token)[0].log_softmax(-1)[following].item() / math.log(2))
    return found


@pytest.mark.parametrize("protocol", WINDOWS)
def test_rows_are_means_over_the_tokens_of_a_window(tokenizer, protocol):
    first, last = WINDOWS[protocol]
    table = running.evaluate(
        random_model(), tokenizer, CONFIGURATIONS, TASK, LENGTH, range(3), name="", protocol=protocol, block=2
    ).set_index(["method", "sample"])
    for configuration in CONFIGURATIONS:
        for number in range(3):
            expected = bits(configuration, beginning(number, last, tokenizer))[first - 2 :]
            assert len(expected) == last - first + 1
            found = table.loc[(configuration.method, number), "value"]
            assert found == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    values = table["value"].unstack(0)
    differ = (values["full"] - values["tidaldecode"]).abs() > 1e-6
    assert differ.any() == (last > 7), "all is read up to six tokens"


def test_bytes_are_those_of_the_last_step(tokenizer):
    model, (_, last) = random_model(), WINDOWS["tokens 8-24"]
    table = running.evaluate(
        model, tokenizer, CONFIGURATIONS, TASK, LENGTH, [0], name="", protocol="tokens 8-24"
    ).set_index("method")
    ids, row = beginning(0, last, tokenizer), 2 * 8 * 8  # a key and a value of one KV head
    fed, (layers, kv_heads, groups) = last - 1, (3, 2, 2)  # the last token is foretold and not fed
    assert (table["full_bytes"] == layers * kv_heads * row * fed).all()
    assert table.loc[["full", "tidaldecode"], "stored_bytes"].eq(table["full_bytes"].iloc[0]).all()
    assert table.loc["full", "read_bytes"] == table.loc["full", "full_bytes"]
    assert table.loc["tidaldecode", "read_bytes"] == kv_heads * row * (2 * fed + groups * 6)
    assert table.loc["h2o", "stored_bytes"] == layers * kv_heads * row * 6
    with CONFIGURATIONS[2].make()(model) as run, torch.no_grad():
        for token in ids[:, :-1].split(1, dim=1):
            model(token, past_key_values=run.cache)
        assert table.loc["h2o", ["stored_bytes", "read_bytes"]].tolist() == [run.stored_bytes(), run.read_bytes()]


def test_company_changes_nothing(tokenizer):
    tables = [
        running.evaluate(
            random_model(), tokenizer, CONFIGURATIONS, TASK, LENGTH, range(3),
            name="", protocol="tokens 2-7", block=block,
        )
        for block in (1, 3)
    ]  # fmt: skip
    alone, together = (t.sort_values(["method", "sample"], ignore_index=True) for t in tables)
    pd.testing.assert_frame_equal(alone, together, rtol=1e-9, atol=1e-12)


def test_the_windows_follow_each_other():
    names = [name for name in running.PROTOCOLS if name not in WINDOWS]
    ranges = [running.PROTOCOLS[name] for name in names]
    assert [f"tokens {first}-{last}" for first, last in ranges] == names
    assert [first for first, _ in ranges[1:]] == [last + 1 for _, last in ranges[:-1]]


def test_what_cannot_be_asked(tokenizer):
    def ask(*configurations, length=LENGTH, protocol="tokens 2-7"):
        running.evaluate(random_model(), tokenizer, configurations, TASK, length, [0], name="", protocol=protocol)

    with pytest.raises(ValueError, match="protocol='asked': tokens 65-256 or"):
        ask(FULL, protocol="asked")
    with pytest.raises(ValueError, match="tidaldecode, budget=0.1: here in tokens, not a share"):
        ask(FULL, Configuration("tidaldecode", 0.1))
    with pytest.raises(ValueError, match="length=2048: the model's window is 1024"):
        ask(FULL, length=2048)
    with pytest.raises(ValueError, match="a prompt of [34][0-9]+ tokens: 1024 are read one by one"):
        ask(FULL, protocol="tokens 513-1024")
