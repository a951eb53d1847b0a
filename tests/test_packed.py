"""Decoding with the kernel against decoding without it: in Triton's interpreter where there is no GPU."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import throwaway
import tiny
import torch

import kvlib
from kvlib import kernels
from kvlib.core import packed

pytest.importorskip("triton")

from kvlib.kernels import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EQUAL, PADDED = (22, 22), (22, 13)  # tokens of each row
NARROW = {"window": 4, "kernel": 3}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tidal(heads, budget=0.4):
    return kvlib.method("tidaldecode", budget=budget, selection_layers=(0,), heads=heads)


METHODS = [  # one of each: uneven heads; weights that score, of padded rows; weights before attention; lists of a head
    ("llama-gqa", kvlib.method("adakv", budget=0.4, **NARROW), EQUAL),
    ("llama-mha", kvlib.method("h2o", budget=0.4), PADDED),
    ("mistral", tidal("group"), PADDED),
    ("qwen3", kvlib.method("quest", budget=0.4, page=4, dense=0), EQUAL),
]
MORE = [
    ("llama-gqa", method, lengths)
    for lengths in (EQUAL, PADDED)
    for method in (
        *(kvlib.method(name, budget=0.4, **NARROW) for name in ("uncomp", "uncomp_continuous", "pyramidkv", "adakv")),
        *(kvlib.method(name, budget=0.4) for name in ("uncomp_h2o", "streaming_llm", "loki", "tokenselect")),
        *(kvlib.method(name, budget=9) for name in ("tova", "knorm", "scissorhands", "h2o")),
        *(tidal(heads, 9) for heads in ("query", "group", "all")),
        kvlib.method("vatp", budget=0.4, host="h2o", sinks=2),
        kvlib.method("quest", budget=0.4, page=4, dense=0),
        kvlib.method("full"),
        kvlib.method("int8"),
    )
]


def label(x):
    return "-".join(str(getattr(x, name)) for name in ("name", "heads") if hasattr(x, name)) or str(x)


def on(cases):
    ids = [f"{label(method)}-{architecture}-{lengths}" for architecture, method, lengths in cases]
    return pytest.mark.parametrize("architecture, method, lengths", cases, ids=ids)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel is asked from now on, beside its tensors; it serves wherever it can."""
    made, right = [], decode.attend

    def noting(*tensors, **more):
        made.append(more)
        return right(*tensors, **more)

    monkeypatch.setattr(decode, "attend", noting)
    monkeypatch.setattr(kernels, "decoding", True)
    return made


def rows(lengths):
    return [tiny.tokens(length, seed=seed).to(DEVICE) for seed, length in enumerate(lengths)]


def talk(model, method, lengths):
    """Two turns, the first prompt in chunks: what they leave, and bytes read and stored."""
    with method(model) as run:
        first = tiny.generate(model, run, rows(lengths), new=2, extra=1, chunk=8)
        read = run.read_bytes()
        second = tiny.generate(model, run, list(tiny.tokens(len(lengths), 5, seed=9).to(DEVICE)), new=2, before=first)
        return (first, second), (read, run.read_bytes(), run.stored_bytes())


def compare(architecture, method, lengths, monkeypatch):
    model = tiny.build(architecture, torch.float32).to(DEVICE)
    found = talk(model, method, lengths)
    monkeypatch.setattr(kernels, "decoding", False)
    expected = talk(model, method, lengths)
    for turn, wanted in zip(found[0], expected[0]):
        assert turn.tokens.tolist() == wanted.tokens.tolist() and turn.kept == wanted.kept
        torch.testing.assert_close(turn.logits, wanted.logits, **CLOSE)
    assert found[1] == expected[1]


@on(METHODS)
def test_a_conversation_with_the_kernel(architecture, method, lengths, calls, monkeypatch):
    compare(architecture, method, lengths, monkeypatch)
    assert len(calls) == 4  # once for each turn's decoded token and layer: weights cost no second pass


def test_equal_segments_without_gaps_where_that_is_decided(calls, monkeypatch):
    monkeypatch.setattr(packed, "UNIFORM", True)
    compare("llama-gqa", kvlib.method("full"), (9,), monkeypatch)
    assert len(calls) == 4


@pytest.mark.deep
@on(MORE)
def test_any_conversation_with_the_kernel(architecture, method, lengths, calls, monkeypatch):
    compare(architecture, method, lengths, monkeypatch)


@torch.no_grad()
def decoded(model, method, lengths, steps, captured):
    ids, mask = (x.to(DEVICE) for x in tiny.pad(rows(lengths)))
    with method(model) as run:
        token, made = model(ids, attention_mask=mask).logits[:, -1:].argmax(-1), []
        with run.capture(steps) if captured else nullcontext() as step:
            for _ in range(steps):
                logits = step(token) if captured else model(token, past_key_values=run.cache).logits[:, -1]
                made.append(logits.clone())
                token = logits.argmax(-1, keepdim=True)
        return torch.stack(made), tiny.kept(run), run.read_bytes()


@pytest.mark.parametrize(
    "method, lengths",
    [
        (kvlib.method("adakv", budget=0.4, **NARROW), EQUAL),
        (tidal("query"), PADDED),
        *(pytest.param(method, lengths, marks=pytest.mark.deep) for _, method, lengths in [*METHODS, *MORE]),
    ],
    ids=label,
)
def test_captured_steps_with_the_kernel(method, lengths, calls, monkeypatch):
    model = tiny.build("llama-gqa", torch.float32).to(DEVICE)
    logits, kept, read = decoded(model, method, lengths, 2, captured=True)
    monkeypatch.setattr(kernels, "decoding", False)
    expected, kept_then, read_then = decoded(model, method, lengths, 2, captured=False)
    assert (kept, read) == (kept_then, read_then)
    torch.testing.assert_close(logits, expected, **CLOSE)


# Whom it serves


@dataclass(frozen=True)
class Lower(kvlib.Evictor):
    """Layer 1 reads what layer 0 stores, after a token of that has gone."""

    own_prefill = evicts_in_decode = True

    def score(self, view):
        return view.protect(torch.linalg.vector_norm(view.key, dim=-1), first=1)

    def attend(self, view):
        return super().attend(view.other(0) if view.layer_idx else view)


def test_a_hole_is_not_read(calls, monkeypatch):
    compare("llama-gqa", Lower(6), (9,), monkeypatch)
    assert len(calls) == 2 and all(more["positions"] is not None for more in calls)  # layer 0 has no gaps


@dataclass(frozen=True)
class Heaviest(kvlib.Reader):
    """Of all tokens the three that the heads of a group attend to most."""

    budget: int = 3

    def select(self, view):
        return view.weights.sum(2).topk(self.budget).indices


def test_what_was_said_of_a_view_is_not_said_of_another(calls, monkeypatch):
    model, answers = tiny.build("llama-gqa", torch.float32).to(DEVICE), []
    for decoding in (True, False):
        monkeypatch.setattr(kernels, "decoding", decoding)
        answers.append(decoded(model, Heaviest(), PADDED, 1, captured=False)[0])
    torch.testing.assert_close(*answers, **CLOSE)
    assert ["slots" in more and more["slots"] is not None for more in calls] == [False, True] * 2


@dataclass(frozen=True)
class Louder(kvlib.Method):
    """Queries are not those of the model."""

    def attend(self, view):
        return super().attend(view.replaced(query=2 * view.query))


@dataclass(frozen=True)
class Twice(kvlib.Reader):
    """Reads a list of a list."""

    budget: float = 0.5

    def select(self, view):
        return torch.zeros(*view.lengths.shape, 1, dtype=torch.long, device=view.device)

    def attend(self, view):
        return super().attend(view.gathered(self.select(view)) if view.step.decoding else view)


NONE, SECOND, BOTH = [False, False], [False, True], [True, True]  # of two layers
CASES = {
    "padded rows": (kvlib.method("full"), PADDED, {}, BOTH),
    "equal rows": (kvlib.method("streaming_llm", budget=0.4), EQUAL, {}, NONE),
    "weights of equal rows": (kvlib.method("h2o", budget=0.4), EQUAL, {}, BOTH),
    "weights of all tokens": (kvlib.method("h2o", budget=100), EQUAL, {}, NONE),
    "a list": (tidal("query"), EQUAL, {}, SECOND),
    "codes of equal rows": (kvlib.method("int8"), EQUAL, {}, BOTH),
    "codes of padded rows": (kvlib.method("int8"), PADDED, {}, BOTH),
    "codes, float64": (kvlib.method("int8"), EQUAL, {"dtype": torch.float64}, NONE),
    "codes, float16": (kvlib.method("int8"), EQUAL, {"dtype": torch.float16}, NONE),
    "codes, bfloat16": (kvlib.method("int8"), EQUAL, {"dtype": torch.bfloat16}, BOTH),
    "codes of wide heads": (kvlib.method("int8"), EQUAL, {"head_dim": 128}, NONE),
    "float64": (kvlib.method("full"), PADDED, {"dtype": torch.float64}, NONE),
    "bfloat16": (kvlib.method("full"), PADDED, {"dtype": torch.bfloat16}, BOTH),
    "wide heads": (kvlib.method("full"), PADDED, {"head_dim": 256}, NONE),
    "dropout": (kvlib.method("full"), PADDED, {"attention_dropout": 0.5}, NONE),
    "keys moved where they were copied": (kvlib.method("streaming_llm", budget=0.4), PADDED, {}, NONE),
    "a list by keys that were copied": (kvlib.method("loki", budget=0.4), PADDED, {}, NONE),
    "a list by keys in place": (kvlib.method("loki", budget=0.4), EQUAL, {}, BOTH),
    "other codes": (throwaway.Int8(), PADDED, {}, NONE),
    "other queries": (Louder(), PADDED, {}, NONE),
    "a list of a list": (Twice(), EQUAL, {}, NONE),
    "keys of another layer": (throwaway.Borrowed(), PADDED, {}, NONE),
    "another layer's as they are": (Lower(1.0), PADDED, {}, BOTH),
    "two parts": (throwaway.TwoBits(4), PADDED, {}, NONE),
}


@pytest.fixture
def served(monkeypatch):
    """(is it a decoded token's?, does the kernel serve?) of every view from now on; torch does the work."""
    found, right = [], packed.serves

    def noting(view):
        found.append((view.step.decoding, right(view)))
        return False

    monkeypatch.setattr(packed, "serves", noting)
    monkeypatch.setattr(kernels, "decoding", True)
    return found


@pytest.mark.parametrize("method, lengths, changes, expected", CASES.values(), ids=CASES)
def test_whom_the_kernel_serves(method, lengths, changes, expected, served):
    model = tiny.build("llama-gqa", **({"dtype": torch.float32} | changes)).to(DEVICE)
    model.train("attention_dropout" in changes)
    ids, mask = tiny.pad(rows(lengths))
    with method(model):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert not any(serves for decoding, serves in served if not decoding)
    assert [serves for decoding, serves in served if decoding][:2] == expected


@pytest.mark.parametrize("learning", [True, False])
def test_gradients_are_not_the_kernels(learning, served):
    model = tiny.build("llama-gqa", torch.float32).to(DEVICE).requires_grad_(learning)
    ids, mask = tiny.pad(rows(PADDED))
    with kvlib.method("full")(model):
        cache = model(ids, attention_mask=mask).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert [serves for decoding, serves in served if decoding] == ([False] * 2 if learning else [True] * 2)


def test_by_itself_it_serves_gpus_alone(monkeypatch):
    cpu, gpu = map(torch.device, ("cpu", "cuda:1"))
    assert kernels.decoding is None
    assert (kernels.decodes(cpu), kernels.decodes(gpu)) == (False, True)
    monkeypatch.setattr(kernels, "TRITON", False)
    assert not kernels.decodes(gpu)
    for answer in (True, False):
        monkeypatch.setattr(kernels, "decoding", answer)
        assert (kernels.decodes(cpu), kernels.decodes(gpu)) == (answer, answer)


# Gathering


@pytest.mark.parametrize("lengths", [EQUAL, PADDED])
@pytest.mark.parametrize("heads", [2, 4])
def test_what_is_gathered_is_copied_when_it_is_looked_at(heads, lengths):
    found = []

    class Looking(kvlib.Method):
        def attend(self, view):
            if view.step.decoding:
                slots = torch.arange(4 * heads, device=view.device).view(1, heads, 4).flip(-1).repeat(2, 1, 1) % 9
                slots[:, 1, 2] = slots[1, 0, : 1 + view.layer_idx] = -1
                found.append((view, view.gathered(slots)))
                assert view.layer.reads.tolist() == [(4 * heads - 1) * 64, (4 * heads - 2 - view.layer_idx) * 64]
            return super().attend(view)

    model = tiny.build("llama-gqa", torch.float32).to(DEVICE)
    with Looking()(model) as run:
        tiny.generate(model, run, rows(lengths), new=2)
    assert len(found) == 2
    for view, listed in found:
        assert not {"key", "value", "positions", "_decoded"} & set(vars(listed)) and listed.groups == 4 // heads
        for row, head, i in ((r, h, i) for r in range(2) for h in range(heads) for i in range(4)):
            slot, of = int(listed.slots[row, head, i]), head * 2 // heads
            if slot < 0:
                assert listed.positions[row, head, i] == -1
            else:
                for name in ("key", "value", "positions"):
                    assert torch.equal(getattr(listed, name)[row, head, i], getattr(view, name)[row, of, slot])
        assert listed.other(0).slots is None and listed.other(0).key.shape == view.key.shape
        assert not listed.as_stored and not listed.uniform
