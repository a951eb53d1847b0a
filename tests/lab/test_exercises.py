"""The checks of the exercises accept right answers and name what is wrong with others, at least seven a check."""

import math
import re
from collections import Counter
from itertools import pairwise
from typing import ClassVar

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

import kvlib
from kvlib.calibration import attention_mass
from kvlib.lab import checks, statistics
from kvlib.lab.lessons import excerpts, needles, scoring, value_norms
from kvlib.lab.lessons.exercises import (
    lesson_00a,
    lesson_00b,
    lesson_01,
    lesson_01b,
    lesson_02,
    lesson_02b,
    lesson_02c,
    lesson_04,
    lesson_04b,
    lesson_91,
)
from kvlib.lab.results import summaries
from kvlib.methods import vatp
from kvlib.methods.entropy import entropy


def refused(check, message: str, *arguments, **keywords) -> None:
    """The check says what is wrong."""
    with pytest.raises(AssertionError) as error:
        check(*arguments, **keywords)
    assert message in str(error.value)


# 00a_cache


def longest_prompt(memory, weights, layers, kv_heads, head_dim, width, budget):
    return max(0, math.floor((memory - weights) / (2 * layers * kv_heads * head_dim * width * budget)))


def change_of_output(weights, values, evicted):
    share = weights[evicted].sum()
    return share / (1 - share) * (weights @ values - weights[evicted] / share @ values[evicted])


class Layer(DynamicLayer):
    """Keys and values in a list of chunks."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.chunks = []

    def update(self, key, value, *args, **kwargs):
        self.chunks.append((key, value))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*self.chunks))

    def get_seq_length(self):
        return sum(key.shape[2] for key, _ in self.chunks)


def write(model, ids, cache, tokens):
    written = []
    for _ in range(tokens):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        written.append(ids.item())
    return written


def test_right_answers_pass(capsys):
    lesson_00a.check_longest_prompt(longest_prompt)
    lesson_00a.check_change_of_output(change_of_output)
    lesson_00a.check_cache(Layer, write)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["longest_prompt is right", "change_of_output is right"]
    assert lines[2] == "your cache and your loop are right: the same tokens, each read once"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "longest_prompt returned None: is there a `return`?"),
        (lambda *a: 2 * longest_prompt(*a), "twice too many: keys and values both need memory"),
        (lambda *a: longest_prompt(*a) + 1, "rounded up"),
        (lambda *a: longest_prompt(*a[:-1], 1.0), "with a budget of 0.25: 2129920 tokens fit"),
        (lambda m, w, *a: (m - w) // (2 * math.prod(a[:4]) * a[4]), "no prompt has a negative length"),
        (lambda m, w, *a: max(0, m - w) / (2 * math.prod(a[:4]) * a[4]), "a fraction of a token cannot be stored"),
        (lambda m, w, *a: longest_prompt(m, 0, *a), "Llama-3.1-8B geometry"),
        (lambda m, w, *a: longest_prompt(m, w, a[0], 32, *a[2:]), "Llama-3.1-8B geometry"),
        (lambda m, w, *a: longest_prompt(m, w, *a[:3], 2, a[4]), "1000 bytes, 32 bytes a token"),
    ],
)
def test_wrong_lengths(answer, message):
    refused(lesson_00a.check_longest_prompt, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, v, e: ..., "returned Ellipsis"),
        (lambda w, v, e: -change_of_output(w, v, e), "the sign is reversed"),
        (lambda w, v, e: -(w[e] @ v[e]), "the remaining weights have to sum to 1 again"),
        (lambda w, v, e: sum(change_of_output(w, v, [j]) for j in e), "that is the sum of the single errors"),
        (lambda w, v, e: change_of_output(w, v, e)[None], "shape (1, 4), expected (head_dim,) = (4,)"),
        (lambda w, v, e: change_of_output(w, v, e) + w @ v, "evicting [3]: expected"),
        (lambda w, v, e: w[e].sum() / (1 - w[e].sum()) * (w @ v - v[e].mean(0)), "evicting [0, 7]: expected"),
        (lambda w, v, e: w[e].sum() * (w @ v - w[e] / w[e].sum() @ v[e]), "evicting [3]: expected"),
        (lambda w, v, e: change_of_output(w, v, e[:1]), "evicting [0, 7]: expected"),
    ],
)
def test_wrong_changes(answer, message):
    refused(lesson_00a.check_change_of_output, message, answer)


class Forgetful(Layer):
    def update(self, key, value, *args, **kwargs):
        self.chunks = [(key, value)]
        return key, value


class Swapped(Layer):
    def update(self, key, value, *args, **kwargs):
        return super().update(key, value)[::-1]


class Backwards(Layer):
    def update(self, key, value, *args, **kwargs):
        self.chunks.insert(0, (key, value))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*self.chunks))


class Shared(Layer):
    everywhere: ClassVar = []

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.chunks = self.everywhere


class Twice(Layer):
    def update(self, key, value, *args, **kwargs):
        super().update(key, value)
        return super().update(key, value)


class Batched(Layer):
    def update(self, key, value, *args, **kwargs):
        self.chunks.append((key, value))
        return torch.stack([key] * len(self.chunks)), value


class KeysOnly(Layer):
    def update(self, key, value, *args, **kwargs):
        return super().update(key, value)[0]


class Empty(Layer):
    def get_seq_length(self):
        return 0


class ValuesLate(Layer):
    def update(self, key, value, *args, **kwargs):
        keys, values = super().update(key, value)
        return keys, values.flip(2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Forgetful, "after 2 calls keys have shape (2, 3, 1, 4), expected (2, 3, 4, 4); what came before is missing"),
        (Swapped, "update returned values, keys: the other way round"),
        (Backwards, "after 2 calls the keys are not those that came, in the order in which they came"),
        (Shared, "does every layer have its own?"),
        (Twice, "there is more than this layer was given"),
        (Batched, "tokens are the third dimension"),
        (KeysOnly, "update returned Tensor, not the pair keys, values"),
        (Empty, "after 3 tokens get_seq_length() says 0"),
        (ValuesLate, "after 1 calls the values are not those that came"),
    ],
)
def test_wrong_caches(layer, message):
    Shared.everywhere.clear()
    refused(lesson_00a.check_cache, message, layer, write)


def recomputing(model, ids, cache, tokens):
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


def last_one_twice(model, ids, cache, tokens):
    model(ids, past_key_values=cache)
    return write(model, ids[:, -1:], cache, tokens)


def always_the_prompts_end(model, ids, cache, tokens):
    logits = model(ids, past_key_values=cache).logits[0, -tokens:]
    return logits.argmax(-1).tolist()


def without_the_prompt(model, ids, cache, tokens):
    return write(model, ids[:, -1:], cache, tokens)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (lambda *a: None, "write returned NoneType, not a list of 8 ids"),
        (lambda *a: torch.tensor(write(*a)), "write returned Tensor, not a list"),
        (lambda *a: write(*a)[:-1], "write returned 7 ids, 8 are asked for"),
        (lambda model, ids, *a: [*ids[0].tolist(), *write(model, ids, *a)], "only the 8 new ids are asked for"),
        (recomputing, "after the prompt a pass read 27 tokens: with a cache each token is read once"),
        (last_one_twice, "is each id fed once, in its turn?"),
        (always_the_prompts_end, "is each id fed once, in its turn?"),
        (without_the_prompt, "the first pass reads the 20 tokens of the prompt, here it read 1"),
        (lambda *a: write(*a)[::-1], "is each id fed once, in its turn?"),
    ],
)
def test_wrong_loops(loop, message):
    refused(lesson_00a.check_cache, message, Layer, loop)


# 00b_eviction


def in_window(position, tokens, budget):
    return position < 4 or position >= tokens - (int(budget * tokens) - 4)


def keep(attention, count, kernel):
    mean = attention.mean((1, 2))
    window = attention.shape[2]
    mean[:, -window:] = 0
    pooled = F.max_pool1d(mean, kernel, stride=1, padding=kernel // 2)
    pooled[:, -window:] = torch.inf
    return pooled.topk(count).indices.sort().values


def evict(keys, values, kept):
    index = kept[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, index), values.gather(2, index)


def test_right_answers_of_00b_pass(capsys):
    lesson_00b.check_in_window(in_window)
    lesson_00b.check_by_hand(keep, evict)
    assert capsys.readouterr().out == "in_window is right\nkeep and evict are right: SnapKV by hand\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda p, n, b: None, "in_window returned None: is there a `return`?"),
        (lambda p, n, b: p >= n - int(b * n), "the first four tokens always stay, you evict [0, 1, 2, 3]"),
        (lambda p, n, b: p < 4 or p >= n - int(b * n), "90 tokens, budget 0.2: you keep 22 tokens, the budget is 18"),
        (lambda p, n, b: p < 4 or p > n - (int(b * n) - 4), "you keep 17 tokens, the budget is 18"),
        (lambda p, n, b: p < int(b * n), "the last token stays"),
        (lambda p, n, b: p < 4 or p >= n - (math.ceil(b * n) - 4), "97 tokens, budget 0.25: you keep 25 tokens"),
        (lambda p, n, b: p < 5 or p >= n - (int(b * n) - 5), "you keep [4] instead of [76]"),
        (lambda p, n, b: p / n < b or p == n - 1, "you keep 19 tokens, the budget is 18"),
        (lambda p, n, b: True, "you keep 90 tokens, the budget is 18"),
    ],
)
def test_wrong_windows(answer, message):
    refused(lesson_00b.check_in_window, message, answer)


def pooled_as(pool):
    def wrong(attention, count, kernel):
        window, mean = attention.shape[2], attention.mean((1, 2))
        mean[:, -window:] = 0
        score = pool(mean, kernel)
        score[:, -window:] = torch.inf
        return score.topk(count).indices.sort().values

    return wrong


def leaking(attention, count, kernel):
    window = attention.shape[2]
    attention = attention.clone()
    attention[..., -window:] += 1
    pooled = F.max_pool1d(attention.mean((1, 2)), kernel, stride=1, padding=kernel // 2)
    pooled[:, -window:] = torch.inf
    return pooled.topk(count).indices.sort().values


def windowless(attention, count, kernel):
    mean = attention.mean((1, 2))
    return F.max_pool1d(mean, kernel, stride=1, padding=kernel // 2).topk(count).indices.sort().values


def together(attention, count, kernel):
    return keep(attention.mean((0, 1), keepdim=True).expand_as(attention), count, kernel)


def twice_the_last(attention, count, kernel):
    kept = keep(attention, count, kernel)
    return torch.cat([kept[:, :1].clone() * 0 + kept[:, -1:], kept[:, 1:]], dim=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "keep returned None: is there a `return`?"),
        (lambda a, count, kernel: keep(a, count - 1, kernel), "keep gives shape (2, 11), expected (2, 12)"),
        (lambda a, count, kernel: keep(a, count, kernel)[0], "keep gives shape (12,), expected (2, 12)"),
        (windowless, "the window, the last 4 tokens, stays"),
        (pooled_as(lambda mean, kernel: mean), "12 of 30 tokens, kernel 5: KV head 0: "),
        (pooled_as(lambda mean, kernel: F.avg_pool1d(mean, kernel, 1, kernel // 2)), "12 of 30 tokens, kernel 5"),
        (lambda a, count, kernel: keep(a[:, :1], count, kernel), "score = mean over window and group"),
        (lambda a, count, kernel: keep(a[:, :, -1:].expand_as(a), count, kernel), "score = mean over window and group"),
        (leaking, "none from the window"),
        (together, "each KV head chooses for itself"),
        (twice_the_last, "a token is kept twice"),
    ],
)
def test_wrong_choices(answer, message):
    refused(lesson_00b.check_by_hand, message, answer, evict)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda k, v, kept: None, "evict returned NoneType, not the pair keys, values"),
        (lambda k, v, kept: evict(k, v, kept)[0], "evict returned Tensor, not the pair"),
        (lambda k, v, kept: (evict(k, v, kept)[0], v), "evict: values have shape (1, 2, 9, 4), expected (1, 2, 3, 4)"),
        (lambda k, v, kept: evict(v, k, kept), "evict: keys of KV head 0 are not those of its tokens [0, 3, 8]"),
        (lambda k, v, kept: evict(k, v, kept[:1].expand_as(kept)), "evict: keys of KV head 1 are not those"),
        (lambda k, v, kept: evict(k, v, kept.flip(0)), "evict: keys of KV head 0 are not those"),
        (lambda k, v, kept: evict(k, v, kept.flip(1)), "evict: keys of KV head 0 are not those"),
        (lambda k, v, kept: (k[:, :, -3:], v[:, :, -3:]), "evict: keys of KV head 0 are not those"),
    ],
)
def test_wrong_evictions(answer, message):
    refused(lesson_00b.check_by_hand, message, keep, answer)


@pytest.fixture
def table() -> pd.DataFrame:
    """200 samples; snapkv is near the full cache from 0.4 on, random only at 0.8, knorm never."""
    right = {("full", 1.0): 200, ("snapkv", 0.2): 150, ("snapkv", 0.4): 196, ("snapkv", 0.8): 200}
    right |= {("random", 0.4): 20, ("random", 0.8): 197, ("knorm", 0.4): 100, ("knorm", 0.8): 183}
    rows = [(*cell, sample, float(sample < count)) for cell, count in right.items() for sample in range(200)]
    table = pd.DataFrame(rows, columns=["method", "budget", "sample", "value"])
    return summaries.named(table.assign(model="a model", task="needle", arguments="{}"))


def smallest(table, task, configuration, loss, enough=lambda found, loss: found.low > -loss, budgets=sorted):
    full = summaries.values(table, task, "full", 1.0)
    rows = table[(table["task"] == task) & (table["configuration"] == configuration)]
    for budget in budgets(rows["budget"].unique()):
        values = summaries.values(table, task, configuration, budget)
        if enough(statistics.paired_difference([values], [full]), loss):
            return budget
    return None


def test_smallest_budget(table, capsys):
    names = ("snapkv", "random", "knorm")
    assert [smallest(table, "needle", name, 0.1) for name in names] == [0.4, 0.8, None]
    lesson_00b.check_smallest_budget(smallest, table)
    assert capsys.readouterr().out == "smallest_budget is right\n"


def unpaired(table, task, configuration, loss):
    rows = table[table["task"] == task]
    full = statistics.mean([rows.loc[rows["method"] == "full", "value"]]).value
    for budget, cell in rows[rows["configuration"] == configuration].groupby("budget"):
        if statistics.mean([cell["value"]]).low > full - loss + 0.05:
            return budget
    return None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "smallest_budget returned Ellipsis"),
        (lambda *a: 0.2, "needle, snapkv, loss 0.1: expected 0.4, found 0.2; too optimistic"),
        (lambda *a: None, "needle, snapkv, loss 0.1: expected 0.4, found None"),
        (lambda *a: smallest(*a, enough=lambda found, loss: found.value > -loss), "; too optimistic"),
        (lambda *a: smallest(*a, enough=lambda found, loss: found.high > -loss), "too optimistic"),
        (
            lambda *a: smallest(*a, enough=lambda found, loss: found.low > 0),
            "needle, snapkv, loss 0.1: ",
        ),
        (lambda *a: smallest(*a, budgets=lambda b: sorted(b, reverse=True)), "expected 0.4, found 0.8"),
        (
            lambda t, task, c, loss: smallest(t, task, "snapkv", loss),
            "needle, random, loss 0.1: ",
        ),
        (
            lambda *a: smallest(*a, enough=lambda found, loss: found.low > loss),
            "needle, snapkv, loss 0.1: expected 0.4",
        ),
        (unpaired, "needle, "),
    ],
)
def test_wrong_budgets_of_a_promise(answer, message, table):
    refused(lesson_00b.check_smallest_budget, message, answer, table)


# 01_vatp


def limits(weight, value_norm, output_norm):
    return abs(1 - output_norm / value_norm) / (1 - weight), (1 + output_norm / value_norm) / (1 - weight)


def grouped_score(attention, values, weight):
    heads, group, _ = attention.shape
    parts = weight.view(len(weight), heads, group, -1).permute(1, 2, 3, 0)  # (kv_heads, group, head_dim, hidden)
    return (attention * (values[:, None] @ parts).abs().sum(-1)).mean(1)


def product_score(attention, values):
    return attention.sum(2).mean(1) * values.abs().sum(-1)


def test_right_answers_of_01_pass(capsys):
    lesson_01.check_product_score(product_score)
    lesson_01.check_limits(limits)
    lesson_01.check_grouped_score(grouped_score)
    assert capsys.readouterr().out == "product_score is right\nlimits is right\ngrouped_score is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, v: None, "product_score returned None: is there a `return`?"),
        (lambda a, v: a.sum(2) * v.abs().sum(-1)[:, None], "shape (2, 3, 7), expected (kv_heads, tokens) = (2, 7)"),
        (lambda a, v: product_score(a.mul_(2), v), "changes its arguments"),
        (lambda a, v: a.sum((1, 2)), "that is the attention alone"),
        (lambda a, v: v.abs().sum(-1), "that is the norm alone"),
        (lambda a, v: a.sum((1, 2)) * v.norm(dim=-1), "that is the 2-norm"),
        (lambda a, v: a.sum((1, 2)) * v.sum(-1), "positive and negative numbers cancel"),
        (lambda a, v: product_score(a[:, :, -1:], v), "only the last query was counted"),
        (lambda a, v: product_score(a[:, :1], v), "only one head of the group was counted"),
        (lambda a, v: a.sum(2).amax(1) * v.abs().sum(-1), "the largest of the group"),
        (lambda a, v: a.sum((1, 2)) + v.abs().sum(-1), "expected tensor"),
    ],
)
def test_wrong_product_scores(answer, message):
    refused(lesson_01.check_product_score, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "limits returned None: is there a `return`?"),
        (lambda *a: limits(*a)[1], "not a pair of numbers"),
        (lambda a, v, o: (0, 1 + o / v), "the other weights grow by 1 / (1 - a)"),
        (lambda a, v, o: ((1 - o / v) / (1 - a), limits(a, v, o)[1]), "a norm is not negative"),
        (lambda a, v, o: (0, limits(a, v, o)[1]), "the lower limit 0 is right but not sharp"),
        (lambda a, v, o: (limits(a, v, o)[0], 1e9), "the upper limit 1e+09 is right but not sharp"),
        (lambda a, v, o: (limits(a, v, o)[0], 1 / (1 - a)), "against v: the change is"),
        (lambda *a: limits(*a)[::-1], "outside ["),
        (lambda a, v, o: [a * v * x for x in limits(a, v, o)], "times a ‖v‖, outside ["),
    ],
)
def test_wrong_limits(answer, message):
    refused(lesson_01.check_limits, message, answer)


def reduced_first(attention, values, weight):
    return attention.sum(1) * grouped_score(torch.ones_like(attention), values, weight)


def interleaved(attention, values, weight):
    heads, group, _ = attention.shape
    other = weight.view(len(weight), group, heads, -1).transpose(1, 2).reshape(weight.shape)
    return grouped_score(attention, values, other)


def two_norm(attention, values, weight):
    parts = weight.view(len(weight), *attention.shape[:2], -1).permute(1, 2, 3, 0)
    return (attention * (values[:, None] @ parts).norm(dim=-1)).sum(1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, v, w: None, "grouped_score returned None"),
        (lambda a, v, w: grouped_score(a, v, w)[:, :3], "shape (2, 3), expected (kv_heads, tokens) = (2, 7)"),
        (lambda a, v, w: a.mean(1) * v.abs().sum(-1), "that is the norm before W_O"),
        (reduced_first, "reduced before multiplying"),
        (interleaved, "the columns of W_O are in that order"),
        (two_norm, "the 2-norm, asked for was the 1-norm"),
        (lambda a, v, w: -grouped_score(a, v, w), "expected tensor"),
        (lambda a, v, w: grouped_score(a, v, w.abs()), "expected tensor"),
    ],
)
def test_wrong_grouped_scores(answer, message):
    refused(lesson_01.check_grouped_score, message, answer)


@pytest.fixture(scope="module")
def texts():
    """One held-out text, on the embedded model."""
    model, tokenizer = kvlib.load("minilm")
    ids = excerpts.page(tokenizer, "needle", 0, 144)
    prefix, whole = (kvlib.snapshot(model, torch.tensor([ids[:end]])) for end in (128, 144))
    return model, {"a text": (whole, scoring.importance(model, prefix, "forced_sinks"), value_norms.norms(prefix))}


def per_query(attention, norms):
    return attention / torch.arange(attention.shape[-1], 0, -1)


def test_own_scores(texts, capsys):
    lesson_01.check_own_score(per_query, *texts)
    assert capsys.readouterr().out.startswith("a text: attention ")
    lesson_01.check_own_score(lambda attention, norms: norms, *texts, solved=False)  # worse, and only printed
    assert capsys.readouterr().out.startswith("a text: attention ")
    refused(lesson_01.check_own_score, "shape (8, 128)", lambda attention, norms: attention[0], *texts, solved=False)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, n: ..., "my_score returned Ellipsis"),
        (lambda a, n: a[0], "my_score: shape (8, 128), expected (16, 8, 128)"),
        (lambda a, n: scoring.forced(per_query(a, n), 1), "no token may be forced"),
        (lambda a, n: a.mul_(2), "changes its argument"),
        (lambda a, n: a, "with attention by"),
        (lambda a, n: a * n, "with attention by"),
        (lambda a, n: n, "your score needs them"),
        (lambda a, n: per_query(a, n) * (torch.arange(a.shape[-1]) > 0), "your score needs them"),
    ],
)
def test_wrong_own_scores(texts, answer, message):
    model, parts = texts
    copies = {name: tuple(x.clone() if torch.is_tensor(x) else x for x in part) for name, part in parts.items()}
    refused(lesson_01.check_own_score, message, answer, model, copies)


# 01b_vatp_parts


def chance(n, k, r):
    return (r + (k - r) ** 2 / (n - r)) / k


def prompts_needed(first, second):
    difference = first - second
    return math.ceil(((1.96 + 0.84) * difference.std(ddof=1) / difference.mean()) ** 2)


class Projected(vatp.OutputNorm):
    def importance(self, view, last=None):
        return view.column_sums(last) * view.state["norm"].movedim(-1, 2)


class Lifted(vatp.OutputNorm):
    def observe(self, view):
        norm = view.new_value.abs().sum(-1)
        view.remember("norm", norm[..., None].expand(*norm.shape, view.groups))
        vatp.ForcedSinks.observe(self, view)


class TwoNorm(vatp.OutputNorm):
    def observe(self, view):
        norm = view.new_value.norm(dim=-1)
        view.remember("norm", norm[..., None].expand(*norm.shape, view.groups))
        vatp.ForcedSinks.observe(self, view)


class NormAlone(Lifted):
    def importance(self, view, last=None):
        return torch.ones_like(view.column_sums(last)) * view.state["norm"].movedim(-1, 2)


class MoreAdded(Lifted):
    def importance(self, view, last=None):
        return (view.column_sums(last) + 1e-2) * view.state["norm"].movedim(-1, 2)


class Reduced(Projected):
    """One norm for the whole group."""

    def importance(self, view, last=None):
        return view.column_sums(last) * view.state["norm"].mean(-1)[:, :, None]


@pytest.fixture
def halves(registry):
    """Registers two classes as "one" and "other"."""

    def enter(one, other):
        for name, cls in (("one", one), ("other", other)):
            kvlib.register(name)(type(cls.__name__, (cls,), {"__doc__": "A half."}))

    return enter


def test_right_answers_of_01b_pass(halves, capsys):
    halves(Projected, Lifted)
    lesson_01b.check_chance(chance)
    lesson_01b.check_prompts_needed(prompts_needed)
    lesson_01b.check_halves("one", "other")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["chance is right", "prompts_needed is right", "one and other are one step each"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, k, r: None, "chance returned None: is there a `return`?"),
        (lambda n, k, r: k / n, "the recent tokens are the same for certain"),
        (lambda n, k, r: k * chance(n, k, r), "that is a number of tokens, not a share of k"),
        (lambda n, k, r: (r + (k - r) ** 2 / n) / k, "the others are chosen from n - r tokens"),
        (lambda n, k, r: chance(n, k, r) - r / k, "the recent tokens count too"),
        (lambda n, k, r: 1 - chance(n, k, r), "n = 512, k = 102, r = 51: 0.5553 is expected, found 0.4447"),
        (lambda n, k, r: r / k, "n = 512, k = 102, r = 51: 0.5553 is expected, found 0.5000"),
        (lambda n, k, r: (r + (k - r) * k / n) / k, "n = 512, k = 102, r = 51: 0.5553 is expected, found 0.5996"),
    ],
)
def test_wrong_chances(answer, message):
    refused(lesson_01b.check_chance, message, answer)


def unpaired(first, second):
    return math.ceil(2.8**2 * (first.var(ddof=1) + second.var(ddof=1)) / (first.mean() - second.mean()) ** 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda f, s: ..., "prompts_needed returned Ellipsis"),
        (unpaired, "what counts is how much the *difference* varies"),
        (lambda f, s: prompts_needed(f, s) ** 0.5, "the square is missing"),
        (lambda f, s: prompts_needed(f, s) * (1.96 / 2.8) ** 2, "with 1.96 alone every second experiment misses it"),
        (lambda f, s: len(f), "not how many there were, but how many it takes"),
        (lambda f, s: -(prompts_needed(f, s) ** 0.5), "a number of prompts is positive"),
        (lambda f, s: ((f - s).std(ddof=1) * 2.8 / (f - s).mean()) ** 2, "is no whole number of prompts"),
        (lambda f, s: (f != s).sum(), "1600 prompts, +1.56 points, 29 answers differ: about 576 are needed"),
        (lambda f, s: prompts_needed(f, s) * 2, "are needed, prompts_needed says"),
    ],
)
def test_wrong_numbers_of_prompts(answer, message):
    refused(lesson_01b.check_prompts_needed, message, answer)


BOTH = "(A + 1e-4) ‖W_O v‖₁, both steps at once"


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (vatp.OutputNorm, Lifted, f"one ranks by {BOTH}, not by A ‖W_O v‖₁"),
        (Projected, vatp.OutputNorm, f"other ranks by {BOTH}, not by (A + 1e-4) ‖v‖₁"),
        (vatp.VATP, Lifted, "one ranks by A ‖v‖₁, not by A ‖W_O v‖₁"),
        (vatp.ForcedSinks, Lifted, "one ranks by A, not by A ‖W_O v‖₁"),
        (Lifted, Projected, "one ranks by (A + 1e-4) ‖v‖₁, not by A ‖W_O v‖₁"),
        (Reduced, Lifted, "one ranks by something else, not by A ‖W_O v‖₁"),
        (Projected, TwoNorm, "other ranks by something else, not by (A + 1e-4) ‖v‖₁"),
        (Projected, NormAlone, "other ranks by ‖v‖₁ alone, not by (A + 1e-4) ‖v‖₁"),
        (Projected, MoreAdded, "other ranks by something else, not by (A + 1e-4) ‖v‖₁"),
    ],
)
def test_wrong_halves(halves, one, other, message):
    halves(one, other)
    refused(lesson_01b.check_halves, message, "one", "other")


def test_halves_have_to_be_registered():
    refused(lesson_01b.check_halves, "no method 'nowhere': is the class decorated", "nowhere", "vatp")


# 02_uncomp


def native_share(kept, prompt, query_heads, kv_heads):
    return min(kept, prompt) * query_heads / (prompt * kv_heads)


def eigenvalues(rows):
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp(min=0).flip(-1)


def unit_rows(tokens):
    return F.normalize(tokens - tokens.mean(0), dim=1)


def matrix_entropy(tokens, k):
    return torch.special.entr(eigenvalues(unit_rows(tokens))[:k]).sum()


def test_right_answers_of_02_pass(capsys):
    lesson_02.check_native_share(native_share)
    lesson_02.check_matrix_entropy(matrix_entropy)
    lesson_02.check_matrix_entropy(lambda x, k: float(matrix_entropy(x, k)))
    names = ["native_share", *["matrix_entropy"] * 2]
    assert capsys.readouterr().out.splitlines() == [f"{name} is right" for name in names]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "native_share returned None: is there a `return`?"),
        (lambda k, n, q, h: k / n, "384 of 8096 tokens: 0.1897 is expected, found 0.0474; that is a share of a cache"),
        (lambda k, n, q, h: k / n * h / q, "so their sets take more and not less"),
        (lambda k, n, q, h: k * q / (n * h), "no head keeps more tokens than the prompt has"),
        (lambda *a: 100 * native_share(*a), "a share of 1 is asked for, not percent"),
        (lambda k, n, q, h: min(k, n) * q / n, "the native cache has a set for each KV head"),
        (lambda k, n, q, h: native_share(k, 8192, q, h), "0.1897 is expected, found 0.1875"),
        (lambda *a: min(1, native_share(*a)), "Llama-3-8B, 1000 of 600 tokens: 4.0000 is expected"),
    ],
)
def test_wrong_native_shares(answer, message):
    refused(lesson_02.check_native_share, message, answer)


def naive(tokens, k):
    found = torch.linalg.eigvalsh(unit_rows(tokens).T @ unit_rows(tokens) / len(tokens)).flip(-1)[:k]
    return -(found * found.log()).sum()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, k: ..., "matrix_entropy returned Ellipsis"),
        (naive, "0 ln 0 is 0"),
        (lambda x, k: torch.special.entr(eigenvalues(F.normalize(x, dim=1))[:k]).sum(), "tokens are centred first"),
        (lambda x, k: lesson_02.truncated(x - x.mean(0), k), "rows are divided by their norms"),
        (lambda x, k: lesson_02.truncated(*lesson_02.recentred(x), k), "centre first, then divide by the norms"),
        (lambda x, k: matrix_entropy(x, x.shape[1]), "only the k largest eigenvalues count"),
        (lambda x, k: matrix_entropy(x, k) / math.log(2), "in nats: the natural logarithm"),
        (lambda x, k: matrix_entropy(x, k) / math.log(x.shape[1]), "not divided by ln d"),
        (lambda x, k: torch.special.entr(eigenvalues(unit_rows(x)).flip(-1)[:k]).sum(), "the k largest eigenvalues"),
        (lambda x, k: lesson_02.truncated_singular(unit_rows(x), k), "eigenvalues, not singular values"),
        (lambda x, k: torch.special.entr(eigenvalues(unit_rows(x))[:k] * len(x)).sum(), "the mean over tokens"),
        (lambda x, k: matrix_entropy(x, k).exp(), "that is the effective rank"),
        (lambda x, k: -matrix_entropy(x, k), "an entropy has a minus in front"),
        (
            lambda x, k: entropy(eigenvalues(unit_rows(x)), k, renormalised=True),
            "the k eigenvalues are not divided by their sum",
        ),
        (lambda x, k: matrix_entropy(x.sub_(x.mean(0)), k), "changes its argument"),
    ],
)
def test_wrong_entropies(answer, message):
    refused(lesson_02.check_matrix_entropy, message, answer)


# 02b_uncomp_parts


def elbow(x, y):
    chord = y[0] + (x - x[0]) / (x[-1] - x[0]) * (y[-1] - y[0])
    return (y - chord).abs().argmax() + 1


def group_budgets(mean, groups, spread, tokens):
    furthest = min(int(spread * mean), tokens - mean, mean - 1)
    if groups == 1:
        return [mean]
    return [mean + math.trunc((2 * g - (groups - 1)) * furthest / (groups - 1)) for g in range(groups)]


def by_votes(labels, groups):
    found = [-1] * labels.shape[1]
    for group in range(groups):
        votes = (labels == group).sum(0).tolist()
        left = [head for head in range(len(found)) if found[head] < 0]
        for head in sorted(left, key=lambda head: -votes[head])[: len(found) // groups]:
            found[head] = group
    return found


def test_right_answers_of_02b_pass(capsys):
    lesson_02b.check_elbow(elbow)
    lesson_02b.check_elbow(lambda x, y: elbow(x, y).item())
    lesson_02b.check_group_budgets(group_budgets)
    lesson_02b.check_group_budgets(lambda *a: torch.tensor(group_budgets(*a)))
    lesson_02b.check_greedy(by_votes)
    lesson_02b.check_greedy(lambda *a: torch.tensor(by_votes(*a)))
    right = ["elbow is right", "group_budgets is right", "greedy is right"]
    assert capsys.readouterr().out.splitlines() == [line for line in right for _ in range(2)]


def slope_changes(x, y):
    slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    return (slope[1:] - slope[:-1]).abs().argmax() + 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, y: None, "elbow returned None: is there a `return`?"),
        (lambda x, y: elbow(x, y) - 1, "points are counted from 1"),
        (lambda x, y: (y - y[0] - (x - x[0]) / (x[-1] - x[0]) * (y[-1] - y[0])).argmin() + 1, "no sign"),
        (lambda x, y: (y - y[0] - (x - x[0]) / (x[-1] - x[0]) * (y[-1] - y[0])).argmax() + 1, "no sign"),
        (slope_changes, "where the slope changes most"),
        (lambda x, y: (y - torch.linspace(y[0], y[-1], len(y))).abs().argmax() + 1, "through x as it is given"),
        (lambda x, y: (y - y.mean()).abs().argmin() + 1, "it is not the mean"),
        (lambda x, y: elbow(x.sub_(1), y), "elbow changes its arguments"),
        (lambda x, y: y.argmax() + 1, "a hyperbola: point 6 is expected, found 1"),
        (lambda x, y: x[elbow(x, y) - 1], "abscissas that are not evenly spaced"),
    ],
)
def test_wrong_elbows(answer, message):
    refused(lesson_02b.check_elbow, message, answer)


def uncut(mean, groups, spread, tokens):
    return group_budgets(mean, groups, spread, 10**9)


def exact(mean, groups, spread, tokens, rounded=float):
    furthest = min(int(spread * mean), tokens - mean, mean - 1)
    return [mean + rounded((2 * g - (groups - 1)) * furthest / max(1, groups - 1)) for g in range(groups)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "group_budgets returned Ellipsis"),
        (lambda *a: group_budgets(*a)[::-1], "the lowest group comes first"),
        (uncut, "no head keeps more tokens than the prompt has, and the mean stays"),
        (lambda m, g, s, t: [min(t, b) for b in uncut(m, g, s, t)], "cut to the prompt, but the mean has to stay"),
        (exact, " is expected, found "),
        (lambda *a: exact(*a, rounded=math.floor), "round towards it"),
        (lambda m, g, s, t: group_budgets(m, g, s / 2, t), "half of that is not it"),
        (lambda m, g, s, t: [m] * g, "spread 0.33"),
        (lambda m, g, s, t: group_budgets(m, g, s, t)[1:], "is expected"),
        (lambda m, g, s, t: [b + 1 for b in group_budgets(m, g, s, t)], "[384] is expected, found [385.0]"),
        (lambda m, g, s, t: [m - int(s * m)] if g == 1 else group_budgets(m, g, s, t), "leaves the mean"),
    ],
)
def test_wrong_group_budgets(answer, message):
    refused(lesson_02b.check_group_budgets, message, answer)


def by_mean(labels, groups):
    order = labels.double().mean(0).argsort(stable=True).argsort()
    return order // (labels.shape[1] // groups)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda labels, groups: None, "greedy returned None"),
        (by_mean, "by the mean of the labels, not by counts"),
        (lambda labels, groups: labels.mode(0).values, "whose size is left to chance"),
        (lambda labels, groups: groups - 1 - torch.tensor(by_votes(labels, groups)), "the lowest label"),
        (lambda labels, groups: groups - 1 - torch.tensor(by_votes(groups - 1 - labels, groups)), "from the lowest on"),
        (lambda labels, groups: labels[0], "by one window"),
        (lambda labels, groups: by_votes(labels, groups)[:-1], "one for each head is expected"),
        (lambda labels, groups: [0] * labels.shape[1], "groups of [8, 0, 0, 0] heads"),
        (lambda labels, groups: by_votes(labels.sub_(1).add_(2), groups), "changes its argument"),
        (lambda labels, groups: torch.arange(labels.shape[1]) // (labels.shape[1] // groups), "is expected, found"),
    ],
)
def test_wrong_greedy_rules(answer, message):
    refused(lesson_02b.check_greedy, message, answer)


# 02c_uncomp_stages


def tokens_per_layer(scores, threshold, longest, shortest, fell=lambda now, before, t: before - now > t, fewer=1):
    groups = [0]
    for before, now in pairwise(scores):
        groups.append(groups[-1] + fell(now, before, threshold))
    step = (longest - shortest) // max(1, groups[-1] + 1 - fewer)
    if groups[-1] == 0:
        return [longest] * len(scores)
    return [shortest + (groups[-1] - group) * step for group in groups]


def needle_score(answer, prefix, needle):
    return needles.rouge1(answer, needle[len(prefix) :])


def test_right_answers_of_02c_pass(capsys):
    lesson_02c.check_tokens_per_layer(tokens_per_layer)
    lesson_02c.check_needle_score(needle_score)
    assert capsys.readouterr().out.splitlines() == ["tokens_per_layer is right", "needle_score is right"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "tokens_per_layer returned None"),
        (lambda s, *a: tokens_per_layer(s, *a)[1:], "one number for each of 5 layers"),
        (
            lambda *a: tokens_per_layer(*a, fell=lambda now, before, t: now - before > t),
            "where the score falls, not where it rises",
        ),
        (lambda *a: tokens_per_layer(*a, fell=lambda now, before, t: abs(now - before) > t), "a rise begins no group"),
        (
            lambda s, t, x, y: lesson_02c.per_layer(lesson_02c.from_start(s, t), len(s), x, y),
            "a fall is measured from the layer before",
        ),
        (lambda *a: [*tokens_per_layer(*a)[1:], tokens_per_layer(*a)[-1]], "whose score is lower begins the group"),
        (lambda *a: tokens_per_layer(*a)[::-1], "deeper groups have fewer tokens"),
        (lambda *a: [x + 0.5 for x in tokens_per_layer(*a)], "whole numbers of tokens"),
        (lambda s, t, x, y: tokens_per_layer(s, 2 * t, x, y), "twelve layers: [998, 853, 708"),
        (
            lambda s, t, x, y: [x - g * ((x - y) // 3) for g in (0, 0, 1, 1, 2)] if len(s) == 5 else None,
            "there is one step less than groups",
        ),
        (lambda s, *a: tokens_per_layer(s, *a) if s.sort() else [0] * len(s), "changes its argument"),
    ],
)
def test_wrong_tokens_per_layer(answer, message):
    refused(lesson_02c.check_tokens_per_layer, message, answer)


def right_words(answer, prefix, needle):
    """Words in common, words said, words wanted."""
    said, wanted = (Counter(re.findall("[a-z]+", text.lower())) for text in (answer, needle[len(prefix) :]))
    return (said & wanted).total(), said.total(), wanted.total(), len(said.keys() & wanted.keys())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "needle_score returned None"),
        (
            lambda a, p, n: needles.rouge1(f"{p}{a}", n),
            "has 60.0, 0 is expected; the words of the prefix",
        ),
        (lambda a, p, n: needle_score(a, p, n) / 100, "a share of 1 is not asked for"),
        (lambda a, p, n: needles.rouge1(a, n), "the right answer has 72.7, 100 is expected"),
        (lambda a, p, n: 100.0 * (a.strip() in n), "an empty answer has 100.0"),
        (lambda a, p, n: 100.0 * (a.strip(" .").lower() == n[len(p) :].strip(" .").lower()), "each further right word"),
        (lambda a, p, n: 100 * right_words(a, p, n)[0] / right_words(a, p, n)[2], "whoever says everything"),
        (lambda *a: 100 * right_words(*a)[0] / max(1, right_words(*a)[1]), "each further right word has to count"),
        (
            lambda a, p, n: needle_score(a, p, n) if a == a.lower() else needle_score(a, p, n.lower()) - 1,
            "100 is expected",
        ),
        (lambda a, p, n: needle_score(a, p, n) if "zebra" not in a else 5, "none of its words is right"),
        (
            lambda a, p, n: 100 * (len([w for w in a.lower().strip(".").split() if w in n.lower()]) > 5) if a else 0,
            "each further right word has to count",
        ),
    ],
)
def test_wrong_needle_scores(answer, message):
    refused(lesson_02c.check_needle_score, message, answer)


# 04_tidaldecode


def share_read(layers, dense, query_heads, kv_heads, tokens, k, heads):
    sets = query_heads if heads == "query" else kv_heads
    return (dense * kv_heads * tokens + (layers - dense) * sets * min(k, tokens)) / (layers * kv_heads * tokens)


def ranked(score, k):
    """Positions of the newest token and of the k - 1 best others."""
    newest = torch.full((*score.shape[:-1], 1), score.shape[-1] - 1)
    return torch.cat([score[..., :-1].topk(k - 1).indices, newest], dim=-1)


def best_layers(mass, count):
    compared = attention_mass.candidates(len(mass), count)
    return max(compared, key=lambda chosen: attention_mass.score(mass, chosen))


def greedy(mass, count):
    chosen = (2,)
    while len(chosen) < count:
        longer = [tuple(sorted((*chosen, layer))) for layer in range(3, len(mass)) if layer not in chosen]
        chosen = max(longer, key=lambda one: attention_mass.score(mass, one))
    return chosen


def counting_all(mass, count):
    """Selection layers counted as if they were sparse."""
    ends = (len(mass),)

    def held(chosen):
        return sum(mass[i, i + 1 : j + 1].sum() for i, j in pairwise((*chosen, *ends)))

    return max(attention_mass.candidates(len(mass), count), key=held)


def test_right_answers_of_04_pass(capsys):
    lesson_04.check_share_read(share_read)
    lesson_04.check_choose_by_group(lambda logits, k: ranked(logits.softmax(-1).sum(1), k))
    lesson_04.check_choose_by_group(lambda logits, k: ranked(logits.softmax(-1).mean(1), k).flip(-1))
    lesson_04.check_best_layers(best_layers)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["share_read is right", *["choose_by_group is right"] * 2, "best_layers is right"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "share_read returned None: is there a `return`?"),
        (lambda *a: share_read(*a[:-1], "query"), "with heads='group' there is one set per KV head"),
        (lambda *a: share_read(*a[:-1], "group"), "with heads='query' there is one set per query head"),
        (lambda n, d, q, h, t, k, s: (d * t * h + (n - d) * min(k, t)) / (n * t * h), "every head has one"),
        (lambda n, d, q, h, t, k, s: share_read(n, 0, q, h, t, k, s), "the selection layers read everything"),
        (lambda *a: 100 * share_read(*a), "a share of 1 is asked for, not percent"),
        (
            lambda n, d, q, h, t, k, s: (d * h * t + (n - d) * (q if s == "query" else h) * k) / (n * h * t),
            "a layer has no more tokens than were seen",
        ),
        (lambda n, d, q, h, t, k, s: share_read(n, d + 1, q, h, t, k, s), "a small model, 1 dense layers, k = 10"),
        (lambda *a: share_read(*a) / 4, "0.4000 is expected, found 0.1000"),
    ],
)
def test_wrong_shares(answer, message):
    refused(lesson_04.check_share_read, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, k: ..., "choose_by_group returned Ellipsis"),
        (lambda x, k: ranked(x.sum(1), k), "the head with the largest scale decides"),
        (lambda x, k: ranked(x.softmax(-1).amax(1), k), "that is the largest attention of a head"),
        (lambda x, k: ranked(x.softmax(-1)[:, 0], k), "that is the first head of the group alone"),
        (lambda x, k: ranked(x.softmax(-1), k), "that is a set per query head"),
        (lambda x, k: ranked(x.softmax(-1).sum(1), k + 1), "the newest token is one of the k"),
        (lambda x, k: x.softmax(-1).sum(1).topk(k).indices, "the newest token is always read"),
        (lambda x, k: ranked(-x.softmax(-1).sum(1), k), "the tokens with the least attention"),
        (lambda x, k: ranked(x.softmax(1).sum(1), k), "the softmax is over tokens"),
        (
            lambda x, k: ranked(x.softmax_(-1).sum(1), k) if hasattr(x, "softmax_") else x.mul_(2),
            "changes its argument",
        ),
        (lambda x, k: ranked(x.softmax(-1).sum(1), k).clamp(min=x.shape[-1] - 2), "a token stands twice in a set"),
    ],
)
def test_wrong_groups(answer, message):
    refused(lesson_04.check_choose_by_group, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m, c: None, "best_layers returned None"),
        (lambda m, c: 2, "best_layers returned 2, not layers"),
        (lambda m, c: best_layers(m, c)[1:], "8 layers, 2 of them choose"),
        (lambda m, c: (*best_layers(m, c), 7), "are 3"),
        (lambda m, c: best_layers(m, c)[::-1], "ascending"),
        (lambda m, c: tuple(range(3, 3 + c)), "the first one is given: layer 2"),
        (lambda m, c: best_layers(m.T, c), "of their attention to the sparse layers"),
        (lambda m, c: tuple(range(2, 2 + c)), "of their attention to the sparse layers"),
        (counting_all, "of their attention to the sparse layers"),
        (greedy, "layers chosen one after another are not the best together"),
        (lambda m, c: best_layers(m.fill_(0.5), c), "changes its argument"),
    ],
)
def test_wrong_layers(answer, message):
    refused(lesson_04.check_best_layers, message, answer)


@pytest.fixture(scope="module")
def traced():
    """Steps whose later layers look where all heads of the first one do, a little, and one head much."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(3):
        rows = torch.rand(4, 6, 60, generator=generator, dtype=torch.float64) * 0.02
        rows[:, :, 20:28] += 1  # what all look at
        rows[1, 0, :8] += 1.1  # firsts of the ranks, for single heads
        rows[1, 1, 40:48] += 1.1
        rows[1, 2, 50:58] += 1.1
        rows /= rows.sum(-1, keepdim=True)
        chosen = torch.zeros(4, 6, 60, dtype=torch.bool)
        for layer in range(4):
            ranks = rows[layer, :, :-1].argsort(-1, descending=True).T.flatten().tolist()
            chosen[layer][:, [59, *list(dict.fromkeys(ranks))[:9]]] = True
        steps.append((rows, {"all": chosen}))
    return {"a page": (steps, 1)}


def test_own_choices(traced, capsys):
    lesson_04.check_own_choice(lambda attention: attention.sum(0), traced)
    assert capsys.readouterr().out.startswith("a page: your set holds ")
    lesson_04.check_own_choice(by_ranks, traced, solved=False)  # no better, on a model that may have nothing better
    assert capsys.readouterr().out.startswith("a page: your set holds ")
    refused(lesson_04.check_own_choice, "shape (6,)", lambda attention: attention.sum(1), traced, solved=False)


def by_ranks(attention):
    order = attention[:, :-1].argsort(-1, descending=True).T.flatten().tolist()
    place = {token: number for number, token in reversed([*enumerate(order)])}
    return -torch.tensor([*(float(place[token]) for token in range(attention.shape[-1] - 1)), 0.0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a: None, "my_choice returned None"),
        (lambda a: a, "shape (6, 60), expected (tokens,) = (60,): one set for all"),
        (lambda a: a.sum(1), "shape (6,), expected (tokens,) = (60,)"),
        (lambda a: a.mul_(2).sum(0), "changes its argument"),
        (lambda a: a.sum(0).log() / 0.0, "no token may be forced"),
        (lambda a: -a.sum(0), "your set holds"),
        (by_ranks, "your set holds"),
        (lambda a: torch.arange(60.0), "your set holds"),
        (lambda a: a[0], "your set holds"),
    ],
)
def test_wrong_shared_choices(traced, answer, message):
    refused(lesson_04.check_own_choice, message, answer, traced)


# 04b_tidaldecode_budgets


def largest_k(layers, dense, query_heads, kv_heads, tokens, share):
    left = (share * layers - dense) * tokens * kv_heads
    return max(0, math.floor(left / ((layers - dense) * query_heads)))


def page_rows(chosen, kv_heads, page):
    tokens = chosen.shape[-1]
    wanted = F.pad(chosen.unflatten(0, (kv_heads, -1)).any(1), (0, -tokens % page))
    pages = wanted.unflatten(-1, (-1, page)).any(-1)
    return pages.repeat_interleave(page, -1)[:, :tokens].sum(-1)


def test_right_answers_of_04b_pass(capsys):
    lesson_04b.check_largest_k(largest_k)
    lesson_04b.check_page_rows(page_rows)
    lesson_04b.check_page_rows(lambda *a: page_rows(*a).tolist())
    assert capsys.readouterr().out == "largest_k is right\n" + 2 * "page_rows is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "largest_k returned None"),
        (lambda n, d, q, h, t, s: largest_k(n, d, h, h, t, s), "loads the rows of its own set"),
        (lambda n, d, q, h, t, s: largest_k(n, 0, q, h, t, s), "the selection layers read everything"),
        (lambda n, d, q, h, t, s: largest_k(n, d, q * q // h, q, t, s) // h, "each KV head has rows of its own"),
        (lambda n, d, q, h, t, s: math.floor((s * n - d) * t * h / ((n - d) * q)), "no fewer tokens than none"),
        (lambda n, d, q, h, t, s: (s * n - d) * t * h / ((n - d) * q), "a whole number of tokens"),
        (lambda n, d, q, h, t, s: max(0, math.ceil((s * n - d) * t * h / ((n - d) * q))), "round down"),
        (lambda *a: largest_k(*a) + 1, "SmolLM2, 2 dense layers, 1 of the bytes: 682 is expected, found 683"),
        (lambda n, d, q, h, t, s: largest_k(n, d, h, q, t, s), "682 is expected, found 6144"),
        (lambda *a: largest_k(*a[:-1], 1.0), "0.5 of the bytes: 316 is expected, found 682"),
    ],
)
def test_wrong_largest_k(answer, message):
    refused(lesson_04b.check_largest_k, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "page_rows returned Ellipsis"),
        (lambda c, h, p: page_rows(c, len(c), p), "9 numbers, one per KV head is expected; that is one per query head"),
        (lambda c, h, p: page_rows(c, 1, p), "1 numbers, one per KV head"),
        (lambda c, h, p: page_rows(c, 1, p).tolist() * h, "the union over all heads"),
        (lambda c, h, p: page_rows(c, len(c), p).unflatten(0, (h, -1)).sum(1), "a page is read once for its group"),
        (lambda c, h, p: page_rows(c.unflatten(0, (-1, h)).transpose(0, 1).flatten(0, 1), h, p), "are neighbours"),
        (lambda c, h, p: page_rows(c, h, 1), "but whole pages are read"),
        (lambda c, h, p: -(-page_rows(c, h, p) // p), "that is the number of pages"),
        (lambda c, h, p: -(-page_rows(c, h, p) // p) * p, "the last page is cut"),
        (lambda c, h, p: page_rows(c.unflatten(0, (h, -1)).all(1), h, p), "have in common"),
        (lambda c, h, p: page_rows(c.logical_not_(), h, p), "page_rows changes its argument"),
        (lambda *a: page_rows(*a).flip(0), " is expected, found ["),
        (lambda *a: page_rows(*a) + 1, "3 KV heads, groups of 3, 41 tokens, pages of 4: "),
    ],
)
def test_wrong_pages(answer, message):
    refused(lesson_04b.check_page_rows, message, answer)


# 91_performance


def ideal_ms(weights, layers, heads, dim, tokens, batch, rate):
    return (weights + 4 * batch * tokens * layers * heads * dim) / rate / 1e6


def speed_up(bare, cache, share, rate):
    return (bare + cache / rate / 1e6) / (bare + share * cache / rate / 1e6)


def largest_batch(memory, weights, token, tokens, share, answer):
    return max(0, math.floor((memory - weights) / ((int(share * tokens) + answer) * token)))


def test_right_answers_of_91_pass(capsys):
    lesson_91.check_ideal_ms(ideal_ms)
    lesson_91.check_speed_up(speed_up)
    lesson_91.check_largest_batch(largest_batch)
    assert capsys.readouterr().out == "ideal_ms is right\nspeed_up is right\nlargest_batch is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "ideal_ms returned None"),
        (lambda w, n, h, d, t, b, r: ideal_ms(w, n, h, d, t, b / 2, r), "a key and a value"),
        (lambda w, n, h, d, t, b, r: ideal_ms(w, n, h, d, t, b * 2, r), "16 bits, two bytes"),
        (lambda w, n, h, d, t, b, r: ideal_ms(w, n, h, d, t, 1, r), "a cache of its own"),
        (lambda w, n, h, d, t, b, r: b * ideal_ms(w, n, h, d, t, 1, r), "read once for the whole batch"),
        (lambda w, n, h, d, t, b, r: ideal_ms(w, 1, h, d, t, b, r), "every layer has a cache"),
        (lambda w, n, h, d, t, b, r: ideal_ms(w, n, 1, d, t, b, r), "every KV head has keys"),
        (lambda w, *a: ideal_ms(0, *a), "the weights are read, too"),
        (lambda *a: ideal_ms(*a) / 1e3, "milliseconds are asked for"),
        (lambda *a: ideal_ms(*a) * 1e6, "a million bytes a millisecond"),
        (lambda *a: ideal_ms(*a) * 1e9 / 2**30, "not a GiB"),
        (lambda *a: 1.01 * ideal_ms(*a), "ms are expected, found"),
    ],
)
def test_wrong_ideal_ms(answer, message):
    refused(lesson_91.check_ideal_ms, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "speed_up returned Ellipsis"),
        (lambda *a: 1 / speed_up(*a), "time before over time after"),
        (lambda a, c, s, r: 1 / s, "what does not shrink with the cache"),
        (lambda a, c, s, r: speed_up(a, c, 1 - s, r), "`share` is what is still read"),
        (lambda a, c, s, r: (a + c / r / 1e6) / (s * c / r / 1e6), "after it the weights are still read"),
        (lambda a, c, s, r: c / r / 1e6 / (a + s * c / r / 1e6), "before it the weights are read, too"),
        (lambda a, c, s, r: speed_up(a, 1e3 * c, s, r), "a million bytes a millisecond"),
        (lambda a, c, s, r: speed_up(a, 1e6 * c, s, r), "a million bytes a millisecond"),
        (lambda a, c, s, r: speed_up(a, c / 1e3, s, r), "a million bytes a millisecond"),
        (lambda *a: speed_up(*a) + 0.01, "is expected, found"),
    ],
)
def test_wrong_speed_up(answer, message):
    refused(lesson_91.check_speed_up, message, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "largest_batch returned None"),
        (lambda *a: largest_batch(*a) + 1, "the last one does not fit as a whole"),
        (lambda m, w, b, n, s, a: largest_batch(m, 0, b, n, s, a), "the weights need room"),
        (lambda m, w, b, n, s, a: math.floor(m / (w + (int(s * n) + a) * b)), "the weights are there once"),
        (lambda m, w, b, n, s, a: largest_batch(m, w, b, n, s, 0), "the answer is stored whole"),
        (lambda m, w, b, n, s, a: largest_batch(m, w, b, n + a, s, 0), "of the answer nothing is evicted"),
        (lambda m, w, b, n, s, a: largest_batch(m, w, b, n, 1.0, a), "of the text a share is left"),
        (lambda m, w, b, n, s, a: math.floor((m - w) / ((int(s * n) + a) * b)), "no batch is smaller than none"),
        (lambda m, w, b, n, s, a: max(0, math.floor((m - w) / ((s * n + a) * b))), "a share of a token is not kept"),
        (lambda *a: largest_batch(*a) + 7, "are expected, found"),
    ],
)
def test_wrong_largest_batch(answer, message):
    refused(lesson_91.check_largest_batch, message, answer)


# Methods


def uneven(self, view):
    """The right number of tokens in all, but not in every head."""
    budgets = view.lengths // 2
    budgets[:, 0] -= 5
    budgets[:, 1] += 5
    return budgets


POSITIONS = {"score": lambda self, view: view.positions.float()}
PADDING, CHUNKS = "padding tokens in front", "reading the prompt in chunks"
WRONG = {
    "columns": (PADDING, {"score": lambda self, view: view.positions * view.step.seen % 11.0}),
    "chance": (PADDING, {"score": lambda self, view: torch.rand(view.positions.shape)}),
    "all queries": (PADDING, {"score": lambda self, view: (view.key * view.query.mean((1, 2), True)).sum(-1)}),
    "this pass only": (CHUNKS, {"score": lambda self, view: view.column_sums().sum(2)}),
    "a third": ("is 45, kept are {.*30", POSITIONS | {"budgets": lambda self, view: view.lengths // 3}),
    "uneven": ("is 45, kept are {.*40.*50", POSITIONS | {"budgets": uneven}),
    "one more": ("is 45, kept are {.*46", POSITIONS | {"budgets": lambda self, view: view.lengths // 2 + 1}),
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(kvlib.core.method, "METHODS", dict(kvlib.METHODS))
    monkeypatch.setattr(kvlib, "METHODS", kvlib.core.method.METHODS)


@pytest.mark.parametrize("name", ["random", "streaming_llm", "snapkv", "knorm"])
def test_methods_of_the_library_pass(name, capsys):
    checks.check_method(name)
    assert capsys.readouterr().out.startswith(f"{name} keeps the contract")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_methods(name, registry):
    message, body = WRONG[name]
    kvlib.register("wrong")(type("Wrong", (kvlib.Evictor,), body | {"__doc__": "Wrong."}))
    with pytest.raises(AssertionError, match=message):
        checks.check_method("wrong")


def test_forgotten_registration():
    with pytest.raises(AssertionError, match="no method 'nameless': is the class decorated"):
        checks.check_method("nameless")
