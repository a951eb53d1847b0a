"""The baselines against their executable specification (`reference.py`), and the laws that each of them obeys."""

import ast
import inspect
import io
import re
import tokenize
from functools import cache

import numpy as np
import properties
import pytest
import tiny
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from reference import HOSTS, POLICIES, VOCABULARY, simulate, tiny_llama

import kvlib
from kvlib.methods import baselines

# Examples are small as they are: shrinking one would run the slow reference for minutes.
few = settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
llama = cache(tiny_llama)
HALVES = ("h2o", "scissorhands")  # the budget is twice a whole number of tokens
NAMES = [name for name, method in kvlib.METHODS.items() if method.__module__ == "kvlib.methods.baselines"]


def batch(prompts):
    """Prompts of different lengths as one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@torch.no_grad()
def decode(method, model, prompts, steps):
    """Greedy decoding: per step the logits `(rows, vocabulary)` and what each layer keeps, then the run."""
    ids, mask = batch(prompts)
    logits, kept = [], []
    with method(model) as run:
        for _ in range(steps + 1):
            output = model(ids, attention_mask=mask, past_key_values=run.cache if kept else None)
            logits.append(output.logits[:, -1])
            kept.append([run.kept(layer) for layer in range(len(run.cache.layers))])
            ids = logits[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return logits, kept, run


def lists(kept, row):
    """Keep-sets of one row as the reference writes them: per step, layer and head a list of positions."""
    return [[[[at for at in head if at >= 0] for head in layer[row].tolist()] for layer in step] for step in kept]


def prompt(length, seed=0):
    """Different tokens (the norms of equal ones differ by nothing but rounding), none of them the padding, 0."""
    return (1 + torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(seed))[:length]).tolist()


# The specification

SNAPKV = {
    "window": st.integers(1, 12),
    "kernel": st.sampled_from([1, 3, 5, 7]),
    "pooling": st.sampled_from(["max", "avg"]),
}
ARGUMENTS = {
    "random": st.fixed_dictionaries({"seed": st.integers(0, 2**19 - 1)}),
    "streaming_llm": st.fixed_dictionaries({"sinks": st.integers(0, 6), "renumber": st.booleans()}),
    "h2o": st.just({}),
    "scissorhands": st.just({}),
    "snapkv": st.fixed_dictionaries(SNAPKV),
    "pyramidkv": st.fixed_dictionaries({**SNAPKV, "beta": st.integers(1, 25)}),
    "tova": st.just({}),
    "knorm": st.fixed_dictionaries(
        {"skip_layers": st.sampled_from([(), (0,), (1,), (0, 1)]), "recent": st.integers(0, 12)}
    ),
}
BUDGETS = st.floats(0.01, 0.99) | st.integers(2, 60)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=2)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_reference(name, kv_heads):
    model = llama(kv_heads)

    # A budget of one token per part, and one that the prompt does not reach but decoding does
    @few
    @example({}, 0.01, [13, 30], 3, 0)
    @example({}, 9, [1, 6], 5, 1)
    @example({}, 20, [40], 4, 2)
    @given(ARGUMENTS[name], BUDGETS, LENGTHS, st.integers(0, 5), st.integers(0, 99))
    def check(arguments, budget, lengths, steps, seed):
        prompts = [prompt(length, seed + row) for row, length in enumerate(lengths)]
        logits, kept, _ = decode(kvlib.method(name, budget=budget, **arguments), model, prompts, steps)
        for row, ids in enumerate(prompts):
            expected = simulate(model, ids, steps, POLICIES[name](budget, **arguments))
            assert lists(kept, row) == expected.kept
            assert torch.stack(logits)[:, row].argmax(-1).tolist() == expected.ids
            np.testing.assert_allclose(torch.stack(logits)[:, row], expected.logits, rtol=0, atol=1e-9)

    check()


@pytest.mark.parametrize("name", POLICIES)
def test_equals_reference_at_budgets_from_tiny_to_all_but_one(name):
    model, ids = llama(2, layers=3), prompt(60)
    for budget in (2, 3, 7, 31, 59, 0.05, 0.35, 0.7, 59.5 / 60):
        expected = simulate(model, ids, 2, POLICIES[name](budget))
        logits, kept, _ = decode(kvlib.method(name, budget=budget), model, [ids], 2)
        assert lists(kept, 0) == expected.kept, budget
        np.testing.assert_allclose(torch.cat(logits), expected.logits, rtol=0, atol=1e-9)


def test_reference_is_the_stock_model_while_nothing_is_evicted():
    model, ids = llama(2), prompt(30)
    trace = simulate(model, ids, 5)
    stock = model(torch.tensor([ids + trace.ids[:-1]])).logits[0, -6:]
    np.testing.assert_allclose(stock, trace.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_generate_follows_the_reference(name):
    model, ids = llama(2), prompt(24)
    with kvlib.method(name, budget=0.4)(model) as run:
        output = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)
    expected = simulate(model, ids, 6, POLICIES[name](0.4))
    assert output[0, len(ids) :].tolist() == expected.ids
    assert lists([[run.kept(0), run.kept(1)]], 0) == expected.kept[-1:]


def test_full_keeps_everything_and_takes_no_budget():
    logits, kept, _ = decode(kvlib.method("full"), llama(4), [prompt(9)], 3)
    assert kept[3][1][0].tolist() == [list(range(12))] * 4
    np.testing.assert_allclose(torch.cat(logits), simulate(llama(4), prompt(9), 3).logits, rtol=0, atol=1e-9)
    for budget in (0.5, 1, 100):
        with pytest.raises(ValueError, match=f"budget={budget}"):
            kvlib.method("full", budget=budget)


# What all of them share


@pytest.mark.parametrize("name", POLICIES)
def test_eviction_starts_after_the_prompt(name):
    """The prompt is read in full: its logits, and so the first new token, are those of the full cache (T2)."""
    method, model, ids = kvlib.method(name, budget=0.2), llama(2), [prompt(30), prompt(17, seed=1)]
    stock = decode(kvlib.method("full"), model, ids, 1)[0]
    logits = decode(method, model, ids, 1)[0]
    assert torch.equal(logits[0], stock[0])
    assert not torch.allclose(logits[1], stock[1], atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_comes_back(name):
    """What is stored after a step was stored before it or is new (T10); methods evict in decoding or only grow."""
    _, kept, _ = decode(kvlib.method(name, budget=0.3), llama(2), [prompt(30)], 8)
    steps = lists(kept, 0)
    for step in range(1, 9):
        for layer in range(2):
            for before, after in zip(steps[step - 1][layer], steps[step][layer], strict=True):
                assert set(after) <= {*before, 29 + step}
                if not POLICIES[name].evicts_in_decode:
                    assert after == [*before, 29 + step]


def finds_no_trace(method):
    """T15: one run, three prompts, the first and the last equal."""
    model, outputs = llama(2), []
    with method(model) as run:
        for ids in (prompt(30), prompt(21, seed=5), prompt(30)):
            generated = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
            outputs.append((generated[0].tolist(), run.kept(0).tolist(), run.kept(1).tolist(), run.clamped))
    assert str(outputs[0]) == str(outputs[2])
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize("name", POLICIES)
def test_a_second_prompt_finds_no_trace_of_the_first(name):
    finds_no_trace(kvlib.method(name, budget=0.3))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_the_shortest_prompts_work(name, length):
    """T11: whatever the fraction, at least one token stays (of two halves one each), and it is flagged."""
    logits, kept, run = decode(kvlib.method(name, budget=0.01), llama(2), [prompt(length)], 3)
    least = 2 if name in HALVES else 1
    grows = 0 if POLICIES[name].evicts_in_decode else 1
    for step in range(4):
        stored = min(least, length) + grows * step if grows else min(least, length + step)
        assert [len(head) for head in lists(kept, 0)[step][1]] == [stored] * 2
    assert torch.stack(logits).isfinite().all()
    assert run.clamped["budget"].tolist() == [1]


@pytest.mark.parametrize(("share", "length", "tokens"), [(0.3, 30, 9), (0.5, 31, 15), (0.99, 30, 29), (0.29, 50, 14)])
def test_fractions_round_down(share, length, tokens):
    for name in POLICIES:
        expected = 2 * int(share / 2 * length) if name in HALVES else tokens
        _, kept, _ = decode(kvlib.method(name, budget=share), llama(2), [prompt(length)], 0)
        assert [layer.shape[:2] for layer in kept[0]] == [(1, 2)] * 2, name
        assert sum(layer.shape[2] for layer in kept[0]) == 2 * expected, name  # PyramidKV has that on average


@pytest.mark.parametrize("name", NAMES)
def test_twenty_lines_are_enough(name):
    """Lines that hold code, docstring and comments apart, the decorator included."""
    source = inspect.getsource(kvlib.METHODS[name])
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in ignored]
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings
    assert 3 <= len(lines) <= 20, sorted(lines)


def test_every_baseline_has_a_reference():
    """`full` needs none: nothing is evicted."""
    assert {*NAMES} == {*POLICIES, "full"}


# Ties


def test_equal_scores_keep_the_earlier_token(monkeypatch):
    monkeypatch.setattr(baselines.KNorm, "score", lambda self, view: torch.zeros(view.positions.shape))
    _, kept, _ = decode(kvlib.method("knorm", budget=5), llama(2), [prompt(30), prompt(12)], 0)
    assert kept[0][0].tolist() == [[[0, 1, 2, 3, 4]] * 2] * 2


# Random


def test_random_is_a_fair_lottery():
    """Over layers, heads and seeds each position survives equally often, and two heads agree by chance only."""
    model, ids, draws = llama(4, layers=3), prompt(20), []
    for seed in range(40):
        _, kept, _ = decode(kvlib.method("random", budget=0.5, seed=seed), model, [ids], 0)
        draws += [set(head) for layer in lists(kept, 0)[0] for head in layer]
    rates = [sum(at in draw for draw in draws) / len(draws) for at in range(20)]
    deviation = 0.5 / len(draws) ** 0.5
    assert max(abs(rate - 0.5) for rate in rates) < 4 * deviation
    # Two halves of 20 share 5 tokens on average, with a deviation of 10 · 10 · 10 · 10 / (20² · 19) = 1.15²
    for apart in (1, 4, 12):  # heads, layers, seeds
        shared = [len(a & b) for a, b in zip(draws, draws[apart:], strict=False)]
        assert abs(sum(shared) / len(shared) - 5) < 4 * 1.15 / len(shared) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**19])
def test_random_takes_the_seeds_that_its_hash_has_room_for(seed):
    with pytest.raises(ValueError, match=f"seed={seed}"):
        kvlib.method("random", seed=seed)


# StreamingLLM


@pytest.mark.parametrize("renumber", [True, False])
def test_streaming_keeps_sinks_and_the_recent_past(renumber):
    _, kept, run = decode(kvlib.method("streaming_llm", budget=10, renumber=renumber), llama(2), [prompt(30)], 5)
    for step in range(6):
        expected = [0, 1, 2, 3, *range(24 + step, 30 + step)]  # original indices in both cases
        assert lists(kept, 0)[step] == [[expected] * 2] * 2
    assert run.clamped == {}


def test_renumbering_is_blind_to_how_far_the_stream_has_come():
    """With the same tokens in the cache, only their ranks count; with original positions the distance counts too.

    One layer: there keys and values depend on the token alone. The prompts differ in what is evicted.
    """
    model = llama(2, layers=1)
    sinks, recent, middle = prompt(40)[:4], prompt(40)[4:12], prompt(40)[12:]
    short, long = [*sinks, *middle[:5], *recent], [*sinks, *middle, *recent]
    for renumber in (True, False):
        method = kvlib.method("streaming_llm", budget=12, renumber=renumber)
        with torch.no_grad(), method(model) as run:
            first, second = (
                (model(torch.tensor([ids])), model(torch.tensor([[7]]), past_key_values=run.cache).logits)[1]
                for ids in (short, long)
            )
        assert torch.allclose(first, second, rtol=0, atol=1e-9) == renumber


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [1, 2, 9])
def test_streaming_moves_its_sinks_and_nothing_else(budget, first):
    """Against rotation of everything to its rank, also where sinks have to give way and slots are used anew."""
    model, method = tiny.model("llama-gqa"), kvlib.method("streaming_llm", budget=budget, sinks=4)
    passes = [tiny.tokens(1, length, seed=i) for i, length in enumerate((first, 1, 1, 1, 1, 3, 1, 1))]
    logits, visible = properties.teacher_forced(model, method, passes)
    ranked = properties.masked_logits(model, torch.cat(passes, dim=1), visible, properties.frequencies(model, method))
    torch.testing.assert_close(logits, ranked, rtol=0, atol=1e-10)


def test_streaming_keeps_a_recent_token_whatever_the_sinks():
    _, kept, run = decode(kvlib.method("streaming_llm", budget=3, sinks=9), llama(2), [prompt(20)], 2)
    assert lists(kept, 0)[2] == [[[0, 1, 21]] * 2] * 2
    assert run.clamped["sinks"].tolist() == [2]


# H2O


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("name", "divisor"), [("h2o", 1), ("scissorhands", 400)])
def test_every_query_counts_once_per_head(name, divisor, kv_heads):
    """T3: while nothing is evicted, the scores of a head add up to queries x query heads of its group.

    In Scissorhands, however short the prompt, a decoded query weighs as much as 400 of the prompt's.
    """
    lengths = [23, 11]
    with torch.no_grad(), kvlib.method(name, budget=100)(llama(kv_heads)) as run:
        ids, mask = batch([prompt(length) for length in lengths])
        for step in range(4):
            run.model(ids, attention_mask=mask, past_key_values=run.cache)
            ids, mask = torch.tensor([[5], [6]]), torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            for layer in run.cache.layers:
                sums = tiny.remembered(layer, "attention").flatten(0, 1)
                segments = [row[:length] for row, length in zip(sums, layer.lengths.flatten().tolist())]
                expected = [(length / divisor + step) * (4 // kv_heads) for length in lengths for _ in range(kv_heads)]
                np.testing.assert_allclose([part.sum() for part in segments], expected, rtol=1e-12)


@pytest.mark.parametrize(("budget", "heavy", "recent"), [(0.4, 6, 6), (13, 7, 6), (2, 1, 1)])
def test_h2o_sees_heavy_recent_and_itself(budget, heavy, recent):
    """T9: H + R + 1 keys at every step after the prompt, of which H + R stay, the last R of them in one piece."""
    seen = []

    class Watched(baselines.H2O):
        def attend(self, view):
            seen.append(view.lengths.unique().tolist())
            return super().attend(view)

    _, kept, _ = decode(Watched(budget), llama(2), [prompt(30)], 6)
    assert seen == [[30]] * 2 + [[heavy + recent + 1]] * 12
    for step, layers in enumerate(lists(kept, 0)):
        for head in [head for layer in layers for head in layer]:
            assert len(head) == heavy + recent
            assert head[-recent:] == list(range(30 + step - recent, 30 + step))


def test_h2o_needs_room_for_two():
    with pytest.raises(ValueError, match="budget=1: "):
        kvlib.method("h2o", budget=1)


# Scissorhands


@pytest.mark.parametrize(
    ("budget", "heavy", "recent"), [(0.8, 14, 10), (20, 10, 10), (12, 2, 10), (11, 1, 10), (10, 1, 9), (2, 1, 1)]
)
def test_scissorhands_sees_heavy_recent_and_itself(budget, heavy, recent):
    seen = []

    class Watched(baselines.Scissorhands):
        def attend(self, view):
            seen.append(view.lengths.unique().tolist())
            return super().attend(view)

    _, kept, run = decode(Watched(budget), llama(2), [prompt(30)], 6)
    assert seen == [[30]] * 2 + [[heavy + recent + 1]] * 12
    assert run.clamped == ({"recent": recent} if recent < 10 else {})
    for step, layers in enumerate(lists(kept, 0)):
        for head in [head for layer in layers for head in layer]:
            assert len(head) == heavy + recent
            assert head[-recent:] == list(range(30 + step - recent, 30 + step))


def test_scissorhands_looks_at_the_last_400_queries():
    """And at no others: with these alone, the scores after a longer prompt are the same."""
    taken = []

    class Watched(baselines.Scissorhands):
        def score(self, view):
            taken.append((view.state["attention"], view.column_sums(last=400).sum(2), view.column_sums().sum(2)))
            return super().score(view)

    model = tiny.model("llama-gqa", max_position_embeddings=512)
    with torch.no_grad(), Watched(0.5)(model):
        model(tiny.tokens(1, 450))
    for scores, last, everything in taken:
        torch.testing.assert_close(scores * 400, last)
        assert last.sum().item() == pytest.approx(400 * 4) and everything.sum().item() == pytest.approx(450 * 4)


# What a host protects


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("budget", [0.5, 12, 3])
def test_hosts_protect_the_recent_tokens_that_they_name(name, budget):
    """Even if all attention goes to the first tokens."""
    named = []

    class Blind(kvlib.METHODS[name]):
        def score(self, view):
            named.append(self.recent(view).view(2, -1)[:, 0].tolist())
            return super().score(view)

        def importance(self, view, last=None):
            return (1.0 + view.positions.clamp(min=0))[:, :, None].reciprocal()

    _, kept, _ = decode(Blind(budget), llama(2), [prompt(40), prompt(26)], 0)
    for row, length in enumerate((40, 26)):
        for layer in range(2):
            recent = named[layer][row]
            for head in lists(kept, row)[0][layer]:
                assert head == [*range(len(head) - recent), *range(length - recent, length)]


# SnapKV


def test_snapkv_window_takes_at_most_half_of_the_budget():
    """Rows of one batch get their own window."""
    _, kept, run = decode(kvlib.method("snapkv", budget=0.3), llama(2), [prompt(40), prompt(20)], 0)
    assert run.clamped["window"].tolist() == [6, 3]
    for head in kept[0][1][0].tolist():
        assert head[6:] == list(range(34, 40))
    for head in kept[0][1][1].tolist():
        assert head[3:6] == list(range(17, 20))


# PyramidKV


@pytest.mark.parametrize(
    ("budget", "length", "beta", "counts"),
    [
        # The window is 10, what is left of the budget comes on top of it.
        (20, 60, 20, [30, 23, 17, 10]),  # 10 on average, from 20 to 0 in steps of 20 / 3
        (20, 60, 2, [25, 21, 19, 15]),  # from 15 to 5
        (0.5, 60, 20, [49, 36, 24, 11]),  # from 39 to 1
        (20, 29, 20, [29, 23, 17, 11]),  # there are 19 tokens before the window: from 19 to 1
        (0.7, 60, 20, [42] * 4),  # twice 32 is more than the prompt
    ],
)
def test_pyramidkv_has_layers_of_different_size(budget, length, beta, counts):
    method = kvlib.method("pyramidkv", budget=budget, window=10, beta=beta)
    _, kept, _ = decode(method, llama(2, layers=4), [prompt(length)], 2)
    for step in range(3):
        assert [layer.shape[2] for layer in kept[step]] == [count + step for count in counts]


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_pyramidkv_stores_the_budget_on_average_and_never_more_above(layers):
    """Whatever gives way: the window, a pyramid that the prompt cannot fill, or all of it in a short prompt."""
    for length, window, beta in ((60, 10, 20), (60, 32, 3), (41, 1, 7), (23, 4, 1)):
        for budget in (2, 5, 13, 22, 0.17, 0.5, 0.83):
            tokens = budget if isinstance(budget, int) else int(budget * length)
            method = kvlib.method("pyramidkv", budget=budget, window=window, beta=beta)
            _, kept, _ = decode(method, llama(2, layers=layers), [prompt(length)], 0)
            counts = [layer.shape[2] for layer in kept[0]]
            assert sum(counts) == layers * tokens
            assert counts == sorted(counts, reverse=True)


# TOVA


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tova_keeps_the_same_tokens_in_all_heads_and_protects_none(kv_heads):
    newest, first = [], []
    for seed in range(4):
        _, kept, _ = decode(kvlib.method("tova", budget=12), llama(kv_heads), [prompt(40, seed), prompt(17, seed)], 6)
        for step in range(7):
            for row, length in enumerate((40, 17)):
                for heads in lists(kept, row)[step]:
                    assert len(heads[0]) == 12 and heads == [heads[0]] * kv_heads
                    newest.append(length - 1 + step in heads[0])
                    first.append(0 in heads[0])
    assert {*newest} == {*first} == {True, False}


# Key norms


def test_knorm_keeps_the_lowest_norms_of_every_layer():
    model = llama(2)
    with torch.no_grad(), kvlib.method("full")(model) as run:
        model(torch.tensor([prompt(30)]))
    norms = [layer.tail.fields["key"].view(2, 30, -1).norm(dim=-1) for layer in run.cache.layers]
    _, kept, _ = decode(kvlib.method("knorm", budget=8), model, [prompt(30)], 0)
    for layer in range(2):
        for head in range(2):
            inside = kept[0][layer][0, head]
            outside = [at for at in range(30) if at not in inside.tolist()]
            assert norms[layer][head, inside].max() < norms[layer][head, outside].min()


def test_knorm_leaves_layers_alone_and_recent_tokens():
    """A skipped layer is stored in full, and nothing makes up for it."""
    method = kvlib.method("knorm", budget=8, skip_layers=(1,), recent=5)
    _, kept, run = decode(method, llama(2), [prompt(30)], 2)
    assert [layer.shape[2] for layer in kept[0]] == [8, 30]
    assert (kept[0][0][0, :, 3:] == torch.arange(25, 30)).all()
    assert run.clamped == {}
    assert run.stored_bytes() == (10 + 32) * run.full_bytes() // (2 * 32)
    _, kept, run = decode(kvlib.method("knorm", budget=8, recent=9), llama(2), [prompt(30)], 0)
    assert (kept[0][0][0, :, 1:] == torch.arange(23, 30)).all()
    assert run.clamped["recent"].tolist() == [7]


def test_knorm_skips_layers_that_there_are():
    method = kvlib.method("knorm", skip_layers=(0, 2))
    with pytest.raises(ValueError, match=r"skip_layers=\(0, 2\): of 2 layers"), method(llama(2)):
        pass


# Budgets of numpy's


@pytest.mark.parametrize("number", [np.int64(9), np.uint8(9), np.float64(0.3), np.float32(0.25)], ids=repr)
def test_budgets_may_be_numbers_of_numpy(number):
    ours, theirs = kvlib.method("h2o", budget=number), kvlib.method("h2o", budget=number.item())
    assert ours == theirs and repr(ours) == repr(theirs)
    for budget in (np.int64(0), np.float64(1.5), np.bool_(True), np.array([3])):
        with pytest.raises(ValueError, match="budget="):
            kvlib.method("h2o", budget=budget)


# What a wrong argument gets


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("streaming_llm", {"sinks": -1}),
        ("knorm", {"recent": -1}),
        ("knorm", {"skip_layers": (-1,)}),
        ("knorm", {"skip_layers": 0}),
        ("snapkv", {"window": 0}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"kernel": -1}),
        ("snapkv", {"pooling": "sum"}),
        ("pyramidkv", {"beta": 0}),
        ("pyramidkv", {"window": 0}),
    ],
)
def test_impossible_arguments_are_named(name, arguments):
    ((argument, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}: ")):
        kvlib.method(name, **arguments)
