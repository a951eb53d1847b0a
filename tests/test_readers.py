"""Quest, Loki and TokenSelect against a masked dense model that chooses with loops, and what their parts promise."""

import ast
import contextlib
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import tiny
import torch
from dense import Masked
from safetensors import safe_open

import kvlib
from kvlib.calibration import key_directions
from kvlib.methods.loki import principal
from kvlib.methods.quest import by_sign, greatest
from kvlib.paths import DATA

ENTRY = 2 * 8  # bytes of a channel of a key and a value in float64
SETTINGS = [
    ("quest", {"page": 4, "dense": 0}),
    ("quest", {"page": 3, "dense": 1}),
    ("quest", {"page": 1, "dense": 0}),
    ("loki", {"rank": 3}),
    ("loki", {"rank": 0.5}),
    ("tokenselect", {"similarity": 1.0}),
    ("tokenselect", {"similarity": 0.1}),
    ("tokenselect", {"sinks": 2, "recent": 3, "similarity": 0.1}),
]
settings = pytest.mark.parametrize(
    "name, setting", SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
THREE = {"num_hidden_layers": 3}


def tokens_of(budget, prompt):
    return budget if isinstance(budget, int) else max(1, int(budget * prompt))


# Choices with loops, in float64, and what they read: `read` has the bytes of each layer, `stood` when votes stood


class Choice:
    def __init__(self, method):
        self.method, self.read, self.stood = method, {}, []

    def __call__(self, layer, query, key, scaling):
        """Sets of positions of each query head for one query, None for all of several."""
        if query.shape[1] > 1:
            self.prompt(layer, query, key)
            return None
        heads, _, size = key.shape
        self.group = len(query) // heads
        sets, choosing = self.choose(layer, query[:, 0].tolist(), key.tolist(), self.budget)
        rows = sum(map(len, sets)) if self.per_query_head(layer) else heads * len(sets[0])
        self.read[layer] = rows * size * ENTRY + choosing
        return sets

    def prompt(self, layer, query, key):
        self.budget = tokens_of(self.method.budget, key.shape[1])

    def per_query_head(self, layer):
        return True


class QuestChoice(Choice):
    def per_query_head(self, layer):
        return layer >= self.method.dense

    def choose(self, layer, query, key, budget):
        n, page, size = len(key[0]), self.method.page, len(key[0][0])
        if layer < self.method.dense:
            return [{*range(n)}] * len(query), 0
        pages = [range(start, min(start + page, n)) for start in range(0, n, page)]
        count, sets = max(3, budget // page), []
        for head, q in enumerate(query):
            keys, bounds = key[head // self.group], []
            for place in pages[:-1]:
                ends = [[f(keys[i][c] for i in place) for f in (min, max)] for c in range(size)]
                bounds.append(sum(max(q[c] * low, q[c] * high) for c, (low, high) in enumerate(ends)))
            best = sorted(range(len(bounds)), key=lambda i, bounds=bounds: (-bounds[i], i))[: count - 1]
            sets.append({i for at in [*best, -1] for i in pages[at]})
        return sets, len(key) * (len(pages) - 1) * size * ENTRY if len(pages) > count else 0


class LokiChoice(Choice):
    def __init__(self, method):
        super().__init__(method)
        self.directions = {}

    def prompt(self, layer, query, key):
        super().prompt(layer, query, key)
        size = key.shape[-1]
        rank = self.method.rank if isinstance(self.method.rank, int) else int(self.method.rank * size)
        centred = key.numpy() - key.numpy().mean(1, keepdims=True)
        self.directions[layer] = [np.linalg.svd(head, full_matrices=False)[2][:rank] for head in centred]

    def choose(self, layer, query, key, budget):
        n, sets = len(key[0]), []
        for head, q in enumerate(query):
            directions = self.directions[layer][head // self.group]
            narrow = [directions @ np.array(k) for k in key[head // self.group]]
            logits = [float(directions @ np.array(q) @ k) for k in narrow]
            order = sorted(range(n - 1), key=lambda i, logits=logits: (-logits[i], i))
            sets.append({n - 1, *order[: budget - 1]})
        return sets, len(key) * n * len(directions) * 8


class TokenSelectChoice(Choice):
    def __init__(self, method):
        super().__init__(method)
        self.last = {}

    def per_query_head(self, layer):
        return False

    def prompt(self, layer, query, key):
        super().prompt(layer, query, key)
        self.last.pop(layer, None)

    def choose(self, layer, query, key, budget):
        n, asked = len(key[0]), [x for q in query for x in q]
        if n <= budget:
            return [{*range(n)}] * len(query), 0
        sinks, recent = self.method.sinks, self.method.recent
        recent = min(max(1, budget * 512 // 2688) if recent is None else recent, budget)
        sinks = min(budget * 128 // 2688 if sinks is None else sinks, budget - recent)
        between, before = range(sinks, n - recent), self.last.get(layer)
        stands = before is not None and cosine(asked, before[0]) >= self.method.similarity
        self.stood.append(stands)
        if not stands:
            votes = dict.fromkeys(between, 0.0)
            for head, q in enumerate(query):
                logits = {i: sum(a * b for a, b in zip(q, key[head // self.group][i])) for i in between}
                top = max(logits.values())
                total = sum(math.exp(x - top) for x in logits.values())
                for i in between:
                    votes[i] += math.exp(logits[i] - top) / total
            best = sorted(between, key=lambda i: (-votes[i], i))[: budget - sinks - recent]
            self.last[layer] = before = asked, {*best}
        chosen = before[1] | {*range(sinks)} | {*range(n - recent, n)}
        return [chosen] * len(query), 0 if stands else len(key) * len(between) * len(key[0][0]) * 8


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


CHOICES = {"quest": QuestChoice, "loki": LokiChoice, "tokenselect": TokenSelectChoice}


@contextlib.contextmanager
def watched(method, model):
    """A run of the method, and the slots `[step][layer] -> (batch, heads, k)` that it selects, None for all."""
    steps = []

    class Watched(kvlib.METHODS[method.name]):
        def select(self, view):
            if len(steps) < view.step.index:
                steps.append({})
            steps[-1][view.layer_idx] = super().select(view)
            return steps[-1][view.layer_idx]

    with Watched(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})(model) as run:
        yield run, steps


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "qwen3"])
@pytest.mark.parametrize("budget", [1, 5, 0.4, 33])
@settings
def test_every_step_is_that_of_a_masked_dense_model(architecture, name, setting, budget):
    """Logits, sets and bytes; and again in a second turn."""
    model, method = tiny.model(architecture, **THREE), kvlib.method(name, budget=budget, **setting)
    choice = CHOICES[name](method)
    oracle = Masked(tiny.build(architecture, **THREE), choice)
    with watched(method, model) as (run, steps):
        for turn, length in enumerate((30, 7)):
            ids = tiny.tokens(1, length, seed=turn)
            ours, theirs = model(ids, past_key_values=run.cache if turn else None).logits[:, -1], oracle(ids)
            steps.clear()
            for step in range(6):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                token = ours.argmax(-1)[:, None]
                ours, theirs = model(token, past_key_values=run.cache).logits[:, -1], oracle(token)
                for layer, sets in oracle.sets.items():
                    found = steps[step][layer]
                    found = torch.arange(len(sets[0])).expand(1, len(sets), -1) if found is None else found
                    each = [{*head} - {-1} for head in found[0].tolist()]
                    assert [each[head * len(each) // len(sets)] for head in range(len(sets))] == sets
                assert run.read_bytes() == sum(choice.read.values())
        assert run.stored_bytes() == run.full_bytes()


def test_votes_stand_and_fall():
    """Both happen in what the test above compares."""
    model = tiny.build("llama-gqa", **THREE)
    choice = TokenSelectChoice(kvlib.method("tokenselect", budget=5, similarity=0.1))
    oracle, token = Masked(model, choice), tiny.tokens(1, 30)
    for _ in range(7):
        token = oracle(token).argmax(-1)[:, None]
    assert 4 <= sum(choice.stood) <= 14 and len(choice.stood) == 18


@pytest.mark.parametrize("budget", [0.3, 7])
@settings
def test_the_new_token_is_read_once_and_nothing_twice(name, setting, budget):
    """Rows have budgets of their own; one is shorter than a budget in tokens."""
    model, method = tiny.model("llama-gqa", **THREE), kvlib.method(name, budget=budget, **setting)
    with watched(method, model) as (run, steps):
        tiny.generate(model, run, [tiny.tokens(25), tiny.tokens(4, seed=1)], new=6)
    for step, layers in enumerate(steps):
        for layer, slots in layers.items():
            if slots is None:
                assert name == "quest" and layer < method.dense
                continue
            for row, prompt in enumerate((25, 4)):
                n, read = prompt + step + 1, tokens_of(budget, prompt)
                if name == "quest":
                    others = min((n - 1) // method.page, max(3, read // method.page) - 1)
                    read = others * method.page + (n - 1) % method.page + 1
                for head in slots[row].tolist():
                    used = [slot for slot in head if slot >= 0]
                    assert len(used) == len(set(used)) == min(read, n)
                    assert n - 1 in used and max(used) < n  # rows are stored without their padding
    assert len(steps) == 5


@settings
def test_reading_all_is_full_attention(name, setting):
    model, ids = tiny.model("llama-gqa", **THREE), tiny.tokens(1, 20)
    full = tiny.generate(model, None, [ids[0]], new=8)
    turn = tiny.once(model, kvlib.method(name, budget=100, **setting), [ids[0]], new=8)
    assert torch.equal(turn.tokens, full.tokens)
    torch.testing.assert_close(turn.logits, full.logits, rtol=1e-9, atol=1e-9)


@settings
def test_nothing_else_is_touched(name, setting):
    """Values not chosen are NaN; so are keys, for Quest and where votes stand all the time, else from the choice on."""
    model, method = tiny.model("llama-gqa", **THREE), kvlib.method(name, budget=6, **setting)
    with watched(method, model) as (run, steps):
        clean, seen = tiny.generate(model, run, [tiny.tokens(40)], new=5), []

    class Poisoned(kvlib.METHODS[name]):
        def attend(self, view):
            slots = steps[view.step.index - 1][view.layer_idx] if view.step.decoding else None
            if slots is None:
                return super().attend(view)
            chosen = torch.zeros(view.key.shape[:3], dtype=torch.bool)
            for head, row in enumerate(slots[0]):
                chosen[0, head * view.key.shape[1] // len(slots[0]), row[row >= 0]] = True
            before = {name: x.clone() for name, x in view.layer.tail.fields.items()}

            def poison(rectangle):  # it lies in the cache itself
                rectangle.masked_fill_(~chosen[..., None], torch.nan)

            stands = name == "tokenselect" and torch.cosine_similarity(
                view.query.flatten(1), view.layer.rows["query"]
            ) >= getattr(self, "similarity", 2)
            self.__dict__["poison"] = poison
            poison(view.value)
            if name == "quest" or stands:
                poison(view.key)
            seen.append((bool(stands), bool(view.key.isnan().any())))
            output = super().attend(view)
            assert view.layer.tail.fields["key"].isnan().any()
            for field, x in before.items():
                view.layer.tail.fields[field].copy_(x)
            return output

        def select(self, view):
            slots = super().select(view)
            if slots is not None:
                self.poison(view.key)
            return slots

    turn = tiny.once(model, Poisoned(budget=6, **setting), [tiny.tokens(40)], new=5)
    assert torch.equal(turn.logits, clean.logits)
    assert len(seen) == 4 * (3 - setting.get("dense", 0))
    if setting.get("similarity") == 0.1:
        assert {stands for stands, _ in seen} == {True, False}


@settings
def test_rows_that_are_reordered_take_what_was_learned_with_them(name, setting):
    """Between two decoded tokens, as beams do."""
    model, method = tiny.model("llama-gqa", **THREE), kvlib.method(name, budget=6, **setting)
    rows, text = [tiny.tokens(25), tiny.tokens(18, seed=1)], tiny.tokens(2, 6, seed=2)

    def decode(run, tokens):
        return [model(token[:, None], past_key_values=run.cache).logits[:, -1] for token in tokens.T]

    alone = []
    for row, tokens in zip(rows, text):
        with method(model) as run:
            model(row[None])
            alone.append(torch.cat(decode(run, tokens[None])))
    with method(model) as run:
        ids, mask = tiny.pad(rows)
        model(ids, attention_mask=mask)
        decode(run, text[:, :3])
        order = torch.tensor([1, 0, 1])
        run.cache.reorder_cache(order)
        together = torch.stack(decode(run, text[order, 3:]), dim=1)
    for row, logits in zip(order, together):
        torch.testing.assert_close(logits, alone[row][3:], rtol=1e-9, atol=1e-9)


@settings
def test_what_was_learned_stays_where_it_is_while_steps_are_captured(name, setting):
    """A CUDA graph reads and writes the memory that it was captured with."""
    model, method = tiny.model("llama-gqa", **THREE), kvlib.method(name, budget=6, **setting)
    with method(model) as run, torch.no_grad():
        token, places = model(tiny.tokens(1, 30)).logits[:, -1:].argmax(-1), []
        with run.capture(10) as step:
            for _ in range(10):
                token = step(token).argmax(-1, keepdim=True)
                places.append([x.data_ptr() for layer in run.cache.layers for x in layer.rows.values()])
    assert places[1:] == places[:1] * 9 and places[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@settings
def test_half_precision(name, setting, dtype):
    """No NaN, and keys too large to be squared in float16 change no choice: powers of two change no digit."""
    model, chosen = tiny.build("llama-gqa", dtype, **THREE), []
    rows = [tiny.tokens(30), tiny.tokens(1, seed=1)]
    for _ in range(2):
        with watched(kvlib.method(name, budget=0.3, **setting), model) as (run, steps):
            turn = tiny.generate(model, run, rows, new=4)
        assert turn.logits.isfinite().all()
        chosen.append([None if x is None else x.sort(-1).values.tolist() for step in steps for x in step.values()])
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 128
            layer.self_attn.q_proj.weight /= 128
    tail = run.cache.layers[0].tail
    keys = tail.rectangle(tail.fields["key"])[tail.position_rectangle() >= 0]
    assert keys.norm(dim=-1, dtype=torch.float32).max() > 256
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("name", CHOICES)
def test_each_takes_at_most_40_lines(name):
    (node,) = ast.parse(inspect.getsource(kvlib.METHODS[name])).body
    body = [x for x in ast.walk(node) if isinstance(x, ast.stmt)]
    documented = {
        n for x in body if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
        for n in range(x.lineno, x.end_lineno + 1)
    }  # fmt: skip
    blocks = ast.ClassDef | ast.FunctionDef
    lines = {n for x in body if not isinstance(x, blocks) for n in range(x.lineno, x.end_lineno + 1)}
    assert len((lines | {x.lineno for x in body if isinstance(x, blocks)}) - documented) <= 40


# Quest


def check_bounds(run, page):
    """Bounds are those of the stored keys, page by page."""
    for layer in run.cache.layers:
        keys = layer.tail.rectangle(layer.tail.fields["key"])
        for row, n in enumerate(run.cache.tokens.tolist()):
            for start in range(0, n, page):
                part = keys[row, :, start : min(start + page, n)]
                assert torch.equal(layer.rows["low"][row, :, start // page], part.amin(1))
                assert torch.equal(layer.rows["high"][row, :, start // page], part.amax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bounds_as_two_products_are_the_bounds_channel_by_channel(dtype):
    """Of 16-bit numbers in float32; a page without a token, whose bounds say nothing, changes no other one's."""
    query = torch.randn(2, 3, 5, 16, generator=torch.manual_seed(0)).to(dtype)
    low, high = torch.randn(2, 2, 3, 7, 16).to(dtype).sort(dim=0).values
    low[:, :, -1], high[:, :, -1] = torch.inf, -torch.inf
    exact = torch.promote_types(dtype, torch.float32)
    wanted = greatest(query, low, high)
    found = by_sign(*(x.to(exact) for x in (query, low, high)))
    assert found.dtype == wanted.dtype == exact and found.shape == wanted.shape == (2, 3, 5, 7)
    torch.testing.assert_close(found[..., :-1], wanted[..., :-1])
    keys = low[..., :-1, :] + (high - low)[..., :-1, :] * torch.rand(2, 3, 6, 16).to(dtype)  # of the page, maybe
    assert (query.to(exact) @ keys.to(exact).mT <= wanted[..., :-1] + 1e-2).all()
    by_hand = sum(max(q * a, q * b) for q, a, b in zip(*(x[0, 1, 2].tolist() for x in (query, low, high))))
    assert wanted[0, 1, 2, 2].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("page", [1, 4, 7])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_bounds_are_those_of_the_stored_keys(page, chunk):
    model = tiny.model("llama-gqa")
    with kvlib.method("quest", budget=8, page=page, dense=0)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(21), tiny.tokens(6, seed=1)], new=6, extra=3, chunk=chunk)
        check_bounds(run, page)
        tiny.generate(model, run, [tiny.tokens(5), tiny.tokens(5, seed=1)], new=9, before=turn, chunk=chunk)
        check_bounds(run, page)


def test_bounds_are_right_after_every_pass():
    model = tiny.model("llama-gqa")
    with kvlib.method("quest", budget=8, page=4, dense=0)(model) as run:
        for turn, new in enumerate((7, 2, 6, 1, 1, 9, 5)):
            model(tiny.tokens(1, new, seed=turn), past_key_values=run.cache if turn else None)
            check_bounds(run, 4)


@pytest.mark.parametrize("forgotten", [1, 3, 9])
def test_bounds_are_right_after_tokens_were_forgotten_and_others_read(forgotten):
    model = tiny.model("llama-gqa")
    with kvlib.method("quest", budget=8, page=4, dense=0)(model) as run:
        tiny.generate(model, run, [tiny.tokens(21), tiny.tokens(13, seed=1)], new=12)
        cache = run.cache
        for layer in cache.layers:
            layer.tail.truncate(layer.lengths - forgotten)
        cache.seen, cache.tokens, cache.ends = cache.seen - forgotten, cache.tokens - forgotten, cache.ends - forgotten
        for ids in tiny.tokens(2, forgotten, seed=5).split(2, dim=1):
            model(ids, past_key_values=cache)
        assert cache.tokens.tolist() == [32, 24]
        check_bounds(run, 4)


def test_a_budget_of_less_than_three_pages_is_noted():
    model, ids = tiny.model("llama-gqa", **THREE), tiny.tokens(60)
    for budget, noted in ((12, {}), (11, {"pages": [3]})):
        with kvlib.method("quest", budget=budget, page=4)(model) as run:
            tiny.generate(model, run, [ids], new=2)
            assert {name: x.tolist() for name, x in run.clamped.items()} == noted
            entry = 8 * ENTRY
            sparse = 4 * 9 * entry + 2 * 15 * entry  # two pages and a token per query head; bounds of fifteen pages
            assert run.read_bytes() == 2 * 2 * 61 * entry + sparse


# Loki


def test_loki_chooses_by_the_first_directions_only():
    """What keys have in others may change: the choice stays."""
    model, method = tiny.model("llama-gqa", **THREE), kvlib.method("loki", budget=6, rank=3)
    clean = tiny.once(model, method, [tiny.tokens(40)], new=2)
    noise = torch.randn(1, 2, 41, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Blurred(kvlib.METHODS["loki"]):
        def select(self, view):
            directions = view.layer.rows["directions"]
            outside = noise - noise @ directions @ directions.mT
            return super().select(view.replaced(key=view.key + 10 * outside))

    assert torch.equal(tiny.once(model, Blurred(budget=6, rank=3), [tiny.tokens(40)], new=2).logits, clean.logits)


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_directions_without_variance_are_zero(tokens):
    """Else rounding would choose for short prompts, and padding could change it."""
    key = 1 + torch.randn(2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = principal(key, torch.ones(2, tokens, dtype=torch.bool))
    some = min(tokens - 1, 8)
    assert torch.equal(found[..., some:], torch.zeros(2, 8, 8 - some, dtype=torch.float64))
    torch.testing.assert_close(found.mT[:, :some] @ found[..., :some], torch.eye(some).double().expand(2, -1, -1))


def plain(**changes):
    """A model as transformers makes it: the others here have keys that grow with the position."""
    return tiny.build("llama-gqa", torch.float32, **THREE, **changes)


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, **arguments):
        return type("Encoded", (), {"input_ids": torch.tensor([[1 + ord(letter) % 63 for letter in text]])})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(key_directions, "TOKENS", 100)


@pytest.mark.parametrize("rotated", [False, True])
def test_directions_are_the_principal_components_of_the_keys(short, rotated):
    """Those of SVD, of keys caught at the projection or in the cache."""
    model, caught = plain(), []
    windows = key_directions.windows(Letters())
    assert [x.shape for x in windows] == [(1, 100)] * 4 and not torch.equal(windows[0], windows[2])
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: caught.append(out[0]))
        for layer in model.model.layers
    ]
    with kvlib.method("full")(model) as run:
        for ids in windows:
            model(ids)
            if rotated:
                caught[-3:] = [layer.tail.fields["key"].view(2, 100, 8).transpose(0, 1) for layer in run.cache.layers]
    for hook in hooks:
        hook.remove()
    found = key_directions.components(model, windows, rotated)
    for layer in range(3):
        keys = torch.cat(caught[layer::3]).reshape(-1, 2, 8).double()
        for head in range(2):
            centred = keys[:, head] - keys[:, head].mean(0)
            wanted = torch.linalg.svd(centred, full_matrices=False).Vh.T
            assert (found[layer, head].double() * wanted).sum(0).abs().min() > 0.999


def test_a_calibration_chooses_and_is_of_one_model(short, tmp_path):
    model = plain()
    file = key_directions.write(tmp_path / "cal", model, "tiny", Letters(), rotated=True)
    with safe_open(file, "pt") as stored:
        assert stored.get_tensor("directions").shape == (3, 2, 8, 4)
        assert stored.metadata()["keys"] == "after rotary embedding" and stored.metadata()["tokens"] == "400"
    method = kvlib.method("loki", budget=6, rank=2, calibration=tmp_path / "cal")
    with method(model) as run:
        tiny.generate(model, run, [tiny.tokens(40), tiny.tokens(20, seed=1)], new=2)
        for layer, directions in zip(run.cache.layers, key_directions.components(
            model, key_directions.windows(Letters()), True)):  # fmt: skip
            assert torch.equal(layer.rows["directions"], directions[..., :2].half().float().expand(2, -1, -1, -1))
    with (
        pytest.raises(ValueError, match=r"rank=5: 5 directions, but there are 4"),
        kvlib.method("loki", budget=6, rank=5, calibration=str(tmp_path / "cal"))(model),
    ):
        model(tiny.tokens(1, 9))
    other = plain()
    other.model.layers[1].self_attn.k_proj.weight.mul_(1.1)
    for stranger in (other, plain(hidden_size=64), tiny.model("llama-mha", **THREE)):
        with pytest.raises(ValueError, match="is the calibration of another model"), method(stranger):
            pass
    with method(plain().to(torch.bfloat16)):  # the same one, rounded
        pass


@pytest.mark.parametrize("where", ["nowhere", "minilm"])
def test_a_calibration_that_is_not_there(where):
    message = rf"no loki.safetensors for '{where}': a folder that has it, or one of smollm2"
    with pytest.raises(ValueError, match=message), kvlib.method("loki", budget=5, calibration=where)(tiny.model()):
        pass


def test_more_directions_than_channels():
    model = tiny.model("llama-gqa")
    with (
        pytest.raises(ValueError, match="rank=9: 9 directions, but there are 8"),
        kvlib.method("loki", budget=5, rank=9)(model),
    ):
        model(tiny.tokens(1, 9))


def test_the_shipped_calibration():
    with safe_open(DATA / "calibration" / "smollm2" / "loki.safetensors", "pt") as stored:
        directions, said = stored.get_tensor("directions").float(), stored.metadata()
    assert directions.shape == (30, 3, 64, 32)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(32).expand(30, 3, 32, 32), rtol=0, atol=2e-3)
    assert json.loads(said["fingerprint"])["layers"] == 30 and said["model"] == "smollm2"
    method, message = kvlib.method("loki", budget=5, calibration="smollm2"), "is the calibration of another model"
    with pytest.raises(ValueError, match=message), method(tiny.model()):
        pass


# Arguments


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quest", {"page": 0}, "page=0: a number of tokens >= 1"),
        ("quest", {"page": 2.0}, r"page=2\.0: "),
        ("quest", {"dense": -1}, "dense=-1: a number of layers >= 0"),
        ("quest", {"dense": True}, "dense=True: "),
        ("loki", {"rank": 0}, r"rank=0: a share of head_dim in \(0, 1\] or directions >= 1"),
        ("loki", {"rank": 1.5}, r"rank=1\.5: "),
        ("loki", {"rank": 0.0}, r"rank=0\.0: "),
        ("loki", {"rank": True}, "rank=True: "),
        ("loki", {"calibration": 3}, "calibration=3: the name of a model, a folder, or None"),
        ("tokenselect", {"sinks": -1}, "sinks=-1: a number of tokens >= 0, or None"),
        ("tokenselect", {"sinks": 0.5}, r"sinks=0\.5: "),
        ("tokenselect", {"recent": 0}, "recent=0: a number of tokens >= 1, or None"),
        ("tokenselect", {"similarity": 0}, r"similarity=0: a cosine in \(0, 1\]"),
        ("tokenselect", {"similarity": 1.5}, r"similarity=1\.5: "),
        ("tokenselect", {"similarity": True}, "similarity=True: "),
        ("tokenselect", {"similarity": "0.9"}, "similarity='0.9': "),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method(name, **arguments)


def test_sinks_and_recent_tokens_share_the_budget():
    """What does not fit gives way, newest tokens last, and is noted."""
    model = tiny.model("llama-gqa")
    for sinks, recent, noted, chosen in [
        (3, 4, {}, {0, 1, 2, 17, 18, 19, 20}),
        (9, 4, {"sinks": [2]}, {0, 1, 17, 18, 19, 20}),
        (3, 9, {"recent": [6], "sinks": [0]}, {15, 16, 17, 18, 19, 20}),
    ]:
        budget = 7 if not noted else 6
        method = kvlib.method("tokenselect", budget=budget, sinks=sinks, recent=recent)
        with watched(method, model) as (run, steps):
            tiny.generate(model, run, [tiny.tokens(20)], new=2)
            assert {name: x.tolist() for name, x in run.clamped.items()} == noted
        assert {*steps[0][0][0, 0].tolist()} == chosen
