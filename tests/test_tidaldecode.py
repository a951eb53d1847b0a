"""TidalDecode against a masked dense model that selects with loops, and what its parts promise."""

import contextlib
import dataclasses

import pytest
import tiny
import torch
from dense import Masked

import kvlib

SIX = {"num_hidden_layers": 6}
ARCHITECTURES = ["llama-mha", "llama-gqa", "qwen3"]
SETTINGS = [
    {"selection_layers": (2, 4)},
    {"selection_layers": (0,)},
    {"selection_layers": (1, 3), "heads": "group"},
    {"selection_layers": (2,), "heads": "all"},
    {"selection_layers": (2, 3), "heads": "all", "sinks": 3, "recent": 0.25},
    {"selection_layers": (2, 4), "sinks": 2, "recent": 0.5},
]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def tidal(budget, **arguments):
    return kvlib.method("tidaldecode", budget=budget, **arguments)


def oracle_choice(attention, k, heads, sinks, recent):
    """Sets `[query head] -> positions`, from the logits `(kv_heads, group, tokens)` of one query."""
    kv_heads, group, n = attention.shape
    k = min(k, n)
    newest = max(1, int(recent * k))
    always = {*range(n - newest, n)} | {*range(min(sinks, k - newest))}

    def best(order):
        return always | set([j for j in order if j not in always][: k - len(always)])

    flat = attention.flatten(0, 1)
    orders = [sorted(range(n), key=lambda j, row=row: (-row[j], j)) for row in flat.tolist()]
    if heads == "query":
        return [best(order) for order in orders]
    if heads == "group":
        summed = attention.softmax(-1).sum(1).tolist()
        each = [best(sorted(range(n), key=lambda j, row=row: (-row[j], j))) for row in summed]
        return [each[head // group] for head in range(kv_heads * group)]
    union = list(dict.fromkeys(j for choices in zip(*orders) for j in choices))
    return [best(union)] * len(orders)


class Oracle(Masked):
    """A masked dense model; `chosen` maps selection layers to what the layers behind them read."""

    def __init__(self, model, method, k):
        super().__init__(model, self.select)
        self.method, self.k, self.chosen = method, k, {}

    def select(self, layer, query, key, scaling):
        layers = self.method.selection_layers
        if query.shape[1] > 1 or layer < layers[0]:
            return None
        if layer in layers:
            logits = torch.einsum("hgd,hkd->hgk", query[:, 0].unflatten(0, (len(key), -1)), key) * scaling
            arguments = (self.k, self.method.heads, self.method.sinks, self.method.recent)
            self.chosen[layer] = oracle_choice(logits, *arguments)
            return None
        return self.chosen[max(x for x in layers if x < layer)]


@contextlib.contextmanager
def watched(method, model):
    """A run of the method, and the sets `[step][layer] -> positions (batch, heads, k)` that it chooses."""
    steps = []

    class Watched(kvlib.METHODS["tidaldecode"]):
        def choose(self, view):
            slots = super().choose(view)
            if len(steps) < view.step.index:
                steps.append({})
            steps[-1][view.layer_idx] = slots
            return slots

    with Watched(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})(model) as run:
        yield run, steps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("k", [1, 5, 12])
@settings
def test_every_step_is_that_of_a_masked_dense_model(architecture, setting, k):
    model, method, ids = tiny.model(architecture, **SIX), tidal(k, **setting), tiny.tokens(1, 30)
    oracle = Oracle(tiny.build(architecture, **SIX), method, k)
    with watched(method, model) as (run, steps):
        ours, theirs = model(ids).logits[:, -1], oracle(ids)
        for step in range(6):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            token = ours.argmax(-1)[:, None]
            ours, theirs = model(token, past_key_values=run.cache).logits[:, -1], oracle(token)
            for layer, slots in steps[step].items():
                heads = [{*map(int, head)} - {-1} for head in slots[0]]
                wanted = oracle.chosen[layer]
                heads = [heads[head * len(heads) // len(wanted)] for head in range(len(wanted))]
                assert heads == wanted
            assert steps[step].keys() == set(method.selection_layers)


@settings
def test_reading_all_is_full_attention(setting):
    model, ids = tiny.model("llama-gqa", **SIX), tiny.tokens(1, 20)
    full = tiny.generate(model, None, [ids[0]], new=8)
    turn = tiny.once(model, tidal(100, **setting), [ids[0]], new=8)
    assert torch.equal(turn.tokens, full.tokens)
    torch.testing.assert_close(turn.logits, full.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", ["query", "group", "all"])
def test_the_new_token_is_read_once_and_nothing_twice(heads):
    model = tiny.model("llama-gqa", **SIX)
    with watched(tidal(7, selection_layers=(1, 3), heads=heads), model) as (run, steps):
        tiny.generate(model, run, [tiny.tokens(25), tiny.tokens(4, seed=1)], new=6)
        width = run.kept(0).shape[-1]
    for step, chosen in enumerate(steps):
        for slots in chosen.values():
            for row, tokens in enumerate((25 + step + 1, 4 + step + 1)):
                for head in slots[row].tolist():
                    used = [slot for slot in head if slot >= 0]
                    assert len(used) == len(set(used)) == min(7, tokens)
                    assert tokens - 1 in used and max(used) < tokens  # rows are stored without their padding
    assert len(steps) == 5 and width == 30


def test_sparse_layers_touch_nothing_else(monkeypatch):
    """What was not chosen is NaN while a sparse layer attends, and may be."""
    model, method = tiny.model("llama-gqa", **SIX), tidal(6, selection_layers=(2, 4))
    clean = tiny.once(model, method, [tiny.tokens(40)], new=5)
    poisoned = []

    class Poisoned(kvlib.METHODS["tidaldecode"]):
        def attend(self, view):
            slots = view.step.shared.get("slots")
            if not view.step.decoding or slots is None or view.layer_idx in view.run.prepared:
                return super().attend(view)
            chosen = torch.zeros(1, view.key.shape[1], view.key.shape[2], dtype=torch.bool)
            for head, row in enumerate(slots[0]):
                chosen[0, head // view.groups, row] = True
            before = {name: x.clone() for name, x in view.layer.tail.fields.items()}
            for rectangle in (view.key, view.value):  # they lie in the cache itself
                rectangle.masked_fill_(~chosen[..., None], torch.nan)
            assert view.layer.tail.fields["key"].isnan().any()
            poisoned.append(view.layer_idx)
            output = super().attend(view)
            for name, x in before.items():
                view.layer.tail.fields[name].copy_(x)
            return output

    turn = tiny.once(model, Poisoned(budget=6, selection_layers=(2, 4)), [tiny.tokens(40)], new=5)
    assert torch.equal(turn.logits, clean.logits)
    assert poisoned == [3, 5] * 4


@pytest.mark.parametrize("heads", ["query", "group", "all"])
def test_bytes_read_are_those_of_the_gathers(heads):
    model = tiny.model("llama-gqa", **SIX)
    with tidal(5, selection_layers=(1, 3), heads=heads)(model) as run:
        tiny.generate(model, run, [tiny.tokens(40), tiny.tokens(3, seed=1)], new=2)
        entry = 2 * 8 * 8  # key and value of one token and KV head: 8 numbers of 8 bytes
        dense, chosen = 41 + 4, 5 + 4
        readers = 4 if heads == "query" else 2
        assert run.read_bytes() == entry * (3 * 2 * dense + 3 * readers * chosen)
        assert run.stored_bytes() == run.full_bytes() == entry * 6 * 2 * dense


def test_layers_up_to_the_first_sparse_one_stay_exact():
    """Their keys and values are those of a dense pass over the same tokens; those behind are not."""
    model, method = tiny.model("llama-gqa", **SIX), tidal(4, selection_layers=(1, 3))
    with method(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(30)], new=7)
        sparse = [layer.tail.rectangle(layer.tail.fields["key"]).clone() for layer in run.cache.layers]
    dense = kvlib.snapshot(model, turn.ids[:, :-1])
    apart = [(mine - layer[1]).abs().max().item() for mine, layer in zip(sparse, dense.layers, strict=True)]
    assert max(apart[:3]) < 1e-9 and min(apart[3:]) > 1e-3
    assert all(torch.allclose(mine[:, :, :30], layer[1][:, :, :30]) for mine, layer in zip(sparse, dense.layers))


def test_every_step_chooses_anew():
    model, method = tiny.model("llama-gqa", **SIX), tidal(4, selection_layers=(2,))
    with watched(method, model) as (run, steps):
        tiny.generate(model, run, [tiny.tokens(30)], new=4)
    assert [set(step) for step in steps] == [{2}] * 3
    sets = [step[2].sort(-1).values for step in steps]
    assert not torch.equal(sets[0][..., :-1], sets[1][..., :-1])  # beside the newest token, which always changes


def test_equal_queries_in_a_group_choose_like_the_group():
    model = tiny.build("llama-gqa", **SIX)
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.view(2, 2, 8, -1)
        weight[:, 1] = weight[:, 0]
    query, group = (
        tiny.once(model, tidal(5, selection_layers=(1,), heads=heads), [tiny.tokens(30)], new=6)
        for heads in ("query", "group")
    )
    torch.testing.assert_close(query.logits, group.logits, rtol=1e-9, atol=1e-9)


def test_without_groups_each_head_is_its_group():
    model = tiny.model("llama-mha", **SIX)
    query, group = (
        tiny.once(model, tidal(5, selection_layers=(1,), heads=heads), [tiny.tokens(30)], new=6)
        for heads in ("query", "group")
    )
    torch.testing.assert_close(query.logits, group.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [(2, (0,)), (3, (1,)), (6, (2,)), (8, (2,)), (16, (2, 6)), (30, (2, 12)), (32, (2, 13)), (1, (0,))],
)
def test_default_layers_are_the_papers_at_the_same_depth(layers, wanted):
    assert tidal(0.5).prepare(tiny.model("llama-gqa", num_hidden_layers=layers)) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection_layers": ()}, "selection_layers=\\(\\): numbers of layers from 0 on, ascending, at least one"),
        ({"selection_layers": (4, 2)}, "selection_layers=\\(4, 2\\): "),
        ({"selection_layers": (2, 2)}, "selection_layers=\\(2, 2\\): "),
        ({"selection_layers": (-1, 2)}, "selection_layers=\\(-1, 2\\): "),
        ({"selection_layers": (1.5,)}, "selection_layers=\\(1.5,\\): "),
        ({"selection_layers": ("2",)}, "selection_layers=\\('2',\\): "),
        ({"heads": "kv"}, "heads='kv': 'query' or 'group' or 'all'"),
        ({"sinks": -1}, "sinks=-1: a number of tokens >= 0"),
        ({"recent": 1.5}, "recent=1.5: a share of the budget in \\[0, 1\\]"),
        ({"recent": True}, "recent=True: "),
        ({"budget": 0}, "budget=0: "),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("tidaldecode", **arguments)


@pytest.mark.parametrize("layers", [(6,), (2, 6), (5,)])
def test_layers_that_the_model_does_not_have(layers):
    model, allowed = tiny.model("llama-gqa", **SIX), "a model of 6 layers has them from 0 to 5, and one has to follow"
    with pytest.raises(ValueError, match=allowed), tidal(5, selection_layers=layers)(model):
        pass
    with tidal(5, selection_layers=(4, 5))(model):
        pass
