"""Drift along the full cache's own text, against runs of the stock model and of a masked one."""

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tidaldecode import Oracle
from transformers import AutoTokenizer, DynamicCache

from kvlib import paths
from kvlib.lab import tasks
from kvlib.lab.evaluation import drift
from kvlib.lab.evaluation.configuration import Configuration

TASK, LENGTH = "summary", 512
FULL = Configuration("full", 1.0)
TIDAL = Configuration("tidaldecode", 40, '{"selection_layers": [1]}')
CONFIGURATIONS = [FULL, TIDAL, Configuration("h2o", 0.3), Configuration("snapkv", 0.3)]
WINDOWS = {"steps 1-4": (1, 4), "steps 5-12": (5, 12), "steps 12-12": (12, 12)}


def random_model():
    return tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=3)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, window in WINDOWS.items():
        monkeypatch.setitem(drift.PROTOCOLS, name, window)


def prompt(number: int, tokenizer) -> torch.Tensor:
    """Ids `(1, tokens)`."""
    drawn = tasks.sample(TASK, LENGTH, number, tokenizer=tokenizer)
    return torch.tensor([[token for part in drawn.ids(tokenizer) for token in part]])


def stock_text(ids: torch.Tensor, steps: int, ends=()) -> tuple[list[int], torch.Tensor]:
    """What the stock model writes without these ids, and its log-probabilities `(steps, vocabulary)`."""
    model, cache, made, found = random_model(), DynamicCache(), [], []
    for _ in range(steps):
        fed = torch.tensor([made[-1:]]) if made else ids
        found.append(model(fed, past_key_values=cache).logits[0, -1].log_softmax(-1))
        made.append(next(token for token in found[-1].argsort(descending=True).tolist() if token not in ends))
    return made, torch.stack(found)


def along(configuration: Configuration, ids: torch.Tensor, text: list[int]) -> torch.Tensor:
    """A method's log-probabilities `(steps, vocabulary)`: prompt but for its last token, then a token a call."""
    model, method = random_model(), configuration.make()
    fed = torch.tensor([[int(ids[0, -1]), *text[:-1]]])
    if configuration.method == "tidaldecode":
        call = Oracle(model, method, method.budget)
        return decoded(call, ids[:, :-1], fed)
    with method(model) as run:
        return decoded(lambda new: model(new, past_key_values=run.cache).logits[:, -1], ids[:, :-1], fed)


def decoded(call, first: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
    call(first)
    return torch.cat([call(token) for token in fed.split(1, dim=1)]).log_softmax(-1)


@pytest.mark.parametrize(("protocol", "forbidden"), list(zip(WINDOWS, (True, False, False))))
def test_rows_are_means_over_the_steps_of_a_window(tokenizer, protocol, forbidden):
    """In company, and of the oracles alone."""
    model, ends = random_model(), []
    if forbidden:  # what the first text would have at two steps
        text, _ = stock_text(prompt(0, tokenizer), 12)
        ends = text[2:4]
        model.generation_config.eos_token_id = ends
    table = drift.evaluate(
        model, tokenizer, CONFIGURATIONS, TASK, LENGTH, range(3), name="", protocol=protocol, block=3
    ).set_index(["method", "sample"])
    first, last = WINDOWS[protocol]
    lengths = set()
    for number in range(3):
        ids = prompt(number, tokenizer)
        text, expected = stock_text(ids, last, ends)
        assert not {*text} & {*ends}
        for configuration in CONFIGURATIONS:
            found, row = along(configuration, ids, text), table.loc[configuration.method, number]
            pairs = [(expected[step - 1], found[step - 1]) for step in range(first, last + 1)]
            nats = [sum(p.exp() * (p - q)).item() for p, q in pairs]
            same = [int(p.argmax()) == int(q.argmax()) for p, q in pairs]
            assert row["value"] == pytest.approx(sum(same) / len(same))
            assert row["divergence"] == pytest.approx(sum(nats) / len(nats), rel=1e-9, abs=1e-12)
        lengths.add(ids.shape[1])
    assert len(lengths) > 1, "padding"
    assert (table.loc["full", "value"] == 1).all() and table.loc["full", "divergence"].abs().max() < 1e-12
    others = table.drop("full", level="method")
    assert (others["divergence"] > 1e-3).all() and 0 < others["value"].mean() < 1


def test_no_more_steps_than_a_window_needs(tokenizer):
    fed, model = [], random_model()
    model.register_forward_hook(lambda *call: fed.append(call[-1].logits.shape[1]))
    for protocol, (_, last) in WINDOWS.items():
        fed.clear()
        drift.evaluate(model, tokenizer, [FULL], TASK, LENGTH, [0], name="", protocol=protocol)
        assert len(fed) == 1 + 2 * last  # the prompt; written, and read


def test_the_windows_follow_each_other():
    names = [name for name in drift.PROTOCOLS if name not in WINDOWS]
    assert names == ["steps 1-64", "steps 65-128", "steps 129-256", "steps 257-512"]
    assert [f"steps {first}-{last}" for first, last in map(drift.PROTOCOLS.get, names)] == names


def test_company_changes_nothing(tokenizer):
    model = random_model()
    tables = [
        drift.evaluate(
            model, tokenizer, CONFIGURATIONS, TASK, LENGTH, range(3), name="", protocol="steps 5-12", block=block
        )
        for block in (1, 3)
    ]
    alone, together = (t.sort_values(["method", "sample"], ignore_index=True) for t in tables)
    pd.testing.assert_frame_equal(alone, together, rtol=1e-9, atol=1e-12)


def test_reads_are_those_of_the_first_step(tokenizer):
    model = random_model()
    table = drift.evaluate(model, tokenizer, [FULL, TIDAL], TASK, LENGTH, [0], name="", protocol="steps 5-12")
    ids, method = prompt(0, tokenizer), TIDAL.make()
    with method(model) as run, torch.no_grad():
        run.read(input_ids=ids[:, :-1])
        model(ids[:, -1:], past_key_values=run.cache)
        assert table["read_bytes"].tolist() == [table["full_bytes"][0], run.read_bytes()]
    assert table["full_bytes"][0] == 3 * 2 * 2 * 8 * 8 * (ids.shape[1] - 1)


def test_what_cannot_be_asked(tokenizer):
    model = random_model()
    with pytest.raises(ValueError, match="protocol='asked': steps 1-64 or steps 65-128"):
        drift.evaluate(model, tokenizer, [FULL], TASK, LENGTH, [0], name="", protocol="asked")
    with pytest.raises(ValueError, match="length=1025: the model's window is 1024"):
        drift.evaluate(model, tokenizer, [FULL], TASK, 513, [0], name="", protocol="steps 257-512")


# Loops


def looping(ids: list[int]) -> bool:
    """By the definition, token by token: two periods or more, of `LOOP` tokens or more together."""
    for period in range(1, len(ids)):
        run = period
        while run < len(ids) and ids[len(ids) - 1 - run] == ids[len(ids) - 1 - run + period]:
            run += 1
        if run >= 2 * period and run >= drift.LOOP:
            return True
    return False


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(1, 20))
def test_loops_by_their_definition(before, period, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "LOOP", 8)
        ids = before + (period * count)[:20]
        assert drift.repeats(ids) == looping(ids)


@pytest.mark.parametrize("period", [1, 5, 31, 32, 33, 100])
def test_a_loop_is_two_periods_and_64_tokens(period):
    span = max(2 * period, 64)
    text = [i % period for i in range(span)]
    assert drift.repeats([*range(500, 520), *text])
    assert not drift.repeats([*range(500, 520), *text[1:]])
    assert not drift.repeats([*text, 999])


def test_the_table_says_whose_text_loops(tokenizer, monkeypatch):
    """The text up to the last step of the window, for all configurations alike."""
    texts = []
    monkeypatch.setattr(drift, "repeats", lambda ids: texts.append(ids) or ids == expected[1])
    expected = [stock_text(prompt(number, tokenizer), 12)[0] for number in range(3)]
    table = drift.evaluate(
        random_model(), tokenizer, CONFIGURATIONS[:2], TASK, LENGTH, range(3), name="", protocol="steps 5-12", block=3
    )
    assert texts == expected * 2
    assert table.sort_values("sample")["agreement"].tolist() == [0, 0, 1, 1, 0, 0]
