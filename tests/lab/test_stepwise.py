"""Questions token by token, against one prompt at a time: the stock model, a masked one, and plain loops of calls."""

import pytest
import tiny
import torch
from test_tidaldecode import Oracle
from transformers import AutoTokenizer, DynamicCache

import kvlib
from kvlib import paths
from kvlib.core.method import METHODS
from kvlib.lab import tasks
from kvlib.lab.evaluation import stepwise
from kvlib.lab.evaluation.blockwise import divided
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.methods.baselines import Full, SnapKV

LENGTH = 640
TIDAL = Configuration("tidaldecode", 40, '{"selection_layers": [1]}')
EVICTING = [Configuration("snapkv", 0.3), Configuration("h2o", 0.3), Configuration("streaming_llm", 60)]
CONFIGURATIONS = [Configuration("full", 1.0), *EVICTING, TIDAL]


def random_model():
    return tiny.build("llama-gqa", vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=3)


@pytest.fixture(scope="module")
def small():
    """What writes nonsense, in float64."""
    return random_model(), AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


@pytest.fixture
def registered(monkeypatch):
    """`registered(cls)` makes a class reachable by its name for one test."""
    return lambda cls: monkeypatch.setitem(METHODS, cls.__name__, cls)


def parts(drawn, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read first, and the 64 tokens that come one by one, `(1, tokens)` each."""
    ids = torch.tensor([[token for part in drawn.ids(tokenizer) for token in part]])
    return ids[:, :-64], ids[:, -64:]


def greedily(call, first, last, new: int) -> list[int]:
    """What is written after a token a call: `call(ids)` gives logits `(1, vocabulary)`."""
    call(first)
    for token in last.split(1, dim=1):
        logits = call(token)
    made = []
    for _ in range(new):
        made.append(int(logits.argmax()))
        logits = call(torch.tensor([made[-1:]]))
    return made


def oracle(configuration: Configuration, first, last, new: int) -> list[int]:
    """The same without the evaluator; without kvlib, too, where nothing is evicted."""
    model, method = random_model(), configuration.make()
    if configuration.method == "full":
        cache = DynamicCache()
        return greedily(lambda ids: model(ids, past_key_values=cache).logits[:, -1], first, last, new)
    if configuration.method == "tidaldecode":
        return greedily(Oracle(model, method, method.budget), first, last, new)
    with method(model) as run:

        def call(ids):
            return model(ids, past_key_values=run.cache).logits[:, -1]

        return greedily(call, first, last, new)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.method)
def test_what_is_written_is_that_of_single_calls(small, monkeypatch, configuration):
    """Where several answers are asked for; in company, and of the oracle alone."""
    model, tokenizer = small
    seen, lengths = [], set()
    monkeypatch.setattr(tasks, "score", lambda prompt, text: seen.append(text) or float(len(seen)))
    monkeypatch.setattr(tasks, "new_tokens", lambda prompt, _: 6 + prompt.seed)
    table = stepwise.evaluate(model, tokenizer, [configuration], "all_numbers", LENGTH, range(3), name="", block=3)
    for number, found in enumerate(seen):
        first, last = parts(tasks.sample("all_numbers", LENGTH, number, tokenizer=tokenizer), tokenizer)
        made = oracle(configuration, first, last, 6 + number)
        assert found == tokenizer.decode(made, skip_special_tokens=True)
        lengths.add(first.shape[1])
    assert table["value"].tolist() == [1, 2, 3] and len(lengths) > 1, "padding"
    assert table[["divergence", "agreement"]].isna().all(axis=None)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.method)
def test_choices_are_those_of_single_calls(small, monkeypatch, configuration):
    """Along the right answer, which is here what the method itself writes."""
    model, tokenizer = small
    drawn = [tasks.sample("number", LENGTH, number, tokenizer=tokenizer) for number in range(3)]
    written = [oracle(configuration, *parts(prompt, tokenizer), 5 - prompt.seed) for prompt in drawn]
    seen = []
    monkeypatch.setattr(tasks.Prompt, "answer_ids", lambda prompt, _: written[prompt.seed][:-1])
    monkeypatch.setattr(tasks, "judge", lambda prompt, chosen, _: seen.append(chosen) or float(len(seen)))
    table = stepwise.evaluate(model, tokenizer, [configuration], "number", LENGTH, range(3), name="", block=3)
    assert [chosen[: len(made)] for chosen, made in zip(seen, written)] == written
    assert table["value"].tolist() == [1, 2, 3]


def test_every_prompt_ends_with_64_single_tokens(small, registered):
    """Whatever its question's length, and the compression comes before them."""
    model, tokenizer = small
    passes, compressed = [], []

    class Spy(SnapKV):
        def observe(self, view):
            if view.layer_idx == 0:
                passes.append((view.step.index, view.query.shape[2]))

        def compress(self, view):
            if view.layer_idx == 0:
                compressed.append((view.step.index, view.tokens.tolist()))
            super().compress(view)

    registered(Spy)
    stepwise.evaluate(model, tokenizer, [Configuration("Spy", 0.2)], "number", LENGTH, range(3), name="", block=3)
    read = [parts(tasks.sample("number", LENGTH, n, tokenizer=tokenizer), tokenizer)[0].shape[1] for n in range(3)]
    assert compressed[0] == (0, read)
    assert passes[:65] == [(0, max(read)), *((step, 1) for step in range(1, 65))]


def test_costs_are_those_of_the_first_token_of_the_question(small, registered):
    class Sparse(Full):
        def attend(self, view):
            if view.step.decoding:
                view.note_read(100 * view.step.index * view.tokens)
                view.clamp("read", view.tokens, high=int(view.tokens.max()) - 1)
            return super().attend(view)

    registered(Sparse)
    table = stepwise.evaluate(*small, [Configuration("Sparse", 1.0)], "number", LENGTH, range(3), name="", block=3)
    read = [parts(tasks.sample("number", LENGTH, n, tokenizer=small[1]), small[1])[0].shape[1] for n in range(3)]
    assert table["read_bytes"].tolist() == [3 * 100 * (tokens + 1) for tokens in read]  # three layers
    assert table["stored_bytes"].tolist() == [3 * 2 * 2 * 8 * 8 * tokens for tokens in read]
    assert table["clamped"].tolist() == [tokens == max(read) for tokens in read]


def test_what_cannot_be_asked(small):
    full = [Configuration("full", 1.0)]
    for task, protocol, length, said in (
        ("number", "later", LENGTH, "protocol='later': later-stepwise"),
        ("number", "later-stepwise", 1025, "window is 1024"),
        ("prose_bits", "later-stepwise", 512, "prose_bits is judged by 'bits', not by 'exact' or 'share'"),
    ):
        with pytest.raises(ValueError, match=said):
            stepwise.evaluate(*small, full, task, length, [0], name="", protocol=protocol)
    drawn = [tasks.sample("needle", 140, 0, tokenizer=small[1])]
    tokens = sum(map(len, drawn[0].ids(small[1])))
    with pytest.raises(ValueError, match=f"a prompt of {tokens} tokens: the last {tokens} are fed one by one"):
        divided(*small, drawn, tokens)


def prompts_in_a_window(task: str, small, monkeypatch) -> tuple[list, list[int]]:
    """Four prompts of different lengths, the longest of which leaves room for one token; and the room of each."""
    model, tokenizer = small
    drawn = [tasks.sample(task, LENGTH, number, tokenizer=tokenizer) for number in range(4)]
    counts = [sum(map(len, prompt.ids(tokenizer))) for prompt in drawn]
    assert len({*counts}) > 1
    monkeypatch.setattr(model.config, "max_position_embeddings", max(counts) + 1)
    return drawn, [max(counts) + 1 - count for count in counts]


def test_what_is_written_ends_with_the_window(small, monkeypatch):
    """Of every row for itself."""
    drawn, room = prompts_in_a_window("all_numbers", small, monkeypatch)
    limits, plain = [], stepwise.write
    monkeypatch.setattr(stepwise, "write", lambda *given: limits.append(given[5]) or plain(*given))
    monkeypatch.setattr(tasks, "new_tokens", lambda *_: 4)
    stepwise.score(kvlib.method("full"), *divided(*small, drawn, 64), drawn, small[1])
    assert limits == [[min(4, n + 1) for n in room]]
    assert 4 > min(limits[0]) == 2


def test_answers_that_fill_the_window(small, monkeypatch):
    """What fills up the shorter ones must not count as text beyond it."""
    drawn, room = prompts_in_a_window("number", small, monkeypatch)
    monkeypatch.setattr(tasks.Prompt, "answer_ids", lambda prompt, _: [5] * room[prompt.seed])
    monkeypatch.setattr(tasks, "judge", lambda prompt, chosen, _: float(len(chosen)))
    found = stepwise.score(kvlib.method("full"), *divided(*small, drawn, 64), drawn, small[1])
    assert found["value"] == [max(room) + 1] * 4
