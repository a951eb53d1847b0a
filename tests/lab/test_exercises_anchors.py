"""The checks of the exercises about anchors accept right answers and name what is wrong with others."""

import math

import pytest
import torch
from test_exercises import refused
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import kvlib
from kvlib.core.rotary import rotaries, rotate
from kvlib.core.support import kv_heads
from kvlib.lab.checks import tiny_model
from kvlib.lab.lessons.exercises import lesson_03, lesson_03b, lesson_03c
from kvlib.methods.anchors import offsets

# 03_anchorcoder


def taa_mask(marked):
    seen, begin = [], 0
    for i in range(len(marked)):
        seen.append([j <= i and (marked[j] or j == 0 or j >= begin) for j in range(len(marked))])
        begin = i + 1 if marked[i] else begin
    return seen


def changed(change):
    """The right mask, of which `change(seen, marked)` changes a tensor in place."""

    def function(marked):
        seen = torch.tensor(taa_mask(marked))
        change(seen, marked)
        return seen

    return function


def blind(seen, marked):
    """Marks see their own line alone."""
    begin = 0
    for i, mark in enumerate(marked):
        if mark:
            seen[i, :begin] = False
            begin = i + 1


def own_line_hidden(seen, marked):
    begin = 0
    for i, mark in enumerate(marked):
        seen[i, begin:i] = False
        if begin == 0:
            seen[i, 0] = True
        begin = i + 1 if mark else begin


def only_the_last(seen, marked):
    begin = 0
    for i, mark in enumerate(marked):
        seen[i, 1 : max(0, begin - 1)] = False
        begin = i + 1 if mark else begin


def test_right_masks_pass(capsys):
    lesson_03.check_mask(taa_mask)
    lesson_03.check_mask(lambda marked: torch.tensor(taa_mask(marked)).float())
    assert "taa_mask is right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda marked: None, "taa_mask returned None: is there a `return`?"),
        (lambda marked: taa_mask(marked)[0], "shape (8,), expected (tokens, tokens) = (8, 8)"),
        (lambda marked: torch.tensor(taa_mask(marked)).T, "a row is a query and a column a key"),
        (lambda marked: torch.ones(len(marked), len(marked)).tril(), "that is a full layer"),
        (
            changed(lambda seen, marked: seen[marked.index(True) + 1 :, 0].fill_(False)),
            "the first token is always seen",
        ),
        (changed(lambda seen, marked: seen.fill_diagonal_(False)), "a token sees itself"),
        (changed(blind), "blind ones are those of AnLLM"),
        (changed(own_line_hidden), "a token sees its own line so far"),
        (changed(only_the_last), "all marks are seen, not the last one alone"),
        (changed(lambda seen, marked: seen[:, 1].fill_(False)), "two lines xxxAxxxA: token 1 (x) does not see token 1"),
        (lambda marked: taa_mask([*map(bool, [marked.pop(), *marked])]), "taa_mask changes its argument"),
    ],
)
def test_wrong_masks(answer, message):
    refused(lesson_03.check_mask, message, answer)


def test_marks_close_their_lines():
    def open_lines(marked):
        seen = torch.tensor(taa_mask(marked))
        for i, mark in enumerate(marked):
            if mark:
                ordinary = [j for j in range(1, i) if not marked[j]]
                seen[i, ordinary] = False
        return seen

    def looks_ahead(marked):
        seen = torch.tensor(taa_mask(marked))
        for i in range(len(marked)):
            begin = max([0, *(j + 1 for j in range(i) if marked[j])])
            seen[i, begin:] = True
            seen[i, [j for j, mark in enumerate(marked) if mark]] = True
        return seen

    def forgets_marks(marked):
        seen = torch.tensor(taa_mask(marked))
        for i in range(len(marked)):
            begin = max([0, *(j + 1 for j in range(i) if marked[j])])
            seen[i, 1:begin] = False
        return seen

    refused(lesson_03.check_mask, "a mark closes its line, and sees the line's tokens", open_lines)
    refused(lesson_03.check_mask, "nobody sees what comes later", looks_ahead)
    refused(lesson_03.check_mask, "of earlier lines the marks are seen", forgets_marks)


class Layer(DynamicLayer):
    turn = source = None

    def update(self, key, value, *args, **kwargs):
        if self.turn is not None:
            key = rotate(key, *self.turn)
        found = super().update(key, value)
        if self.source is None:
            return found
        layer, slots = self.source
        others = layer.keys[:, :, slots], layer.values[:, :, slots]
        return tuple(torch.cat(pair, dim=2) for pair in zip(found, others))


def decode(model, ids, settings, position=lambda i, left: i, early=False):
    """position, early: for wrong ones, which number positions by what is left, or free before the anchor is read."""
    cache, per, source = DynamicCache(), settings["per"], settings["source"]
    cache.layers = [Layer() for _ in range(model.config.num_hidden_layers)]
    forgets = [per is None or index % per > 0 for index in range(len(cache.layers))]
    rotary, heads = rotaries(model), kv_heads(model)
    begin, left, logits = 0, [], []
    for i, token in enumerate(ids):
        marked = token in (settings["anchor"], model.config.bos_token_id)
        if early and marked:
            left = free(cache, forgets, left, begin)
        left.append(i)
        place = torch.tensor([i - begin] * heads)
        if settings["spread"] and marked and i > begin:
            place = torch.tensor(offsets(i - begin, heads))
        for index, layer in enumerate(cache.layers):
            layer.turn = (place - (i - begin))[:, None], rotary[index]
            if settings["beyond"] is not None and index > settings["beyond"]:
                everything = forgets[source] or not forgets[index]
                layer.source = cache.layers[source], slice(None) if everything else left
        at = torch.tensor([[position(i, left)]])
        logits.append(model(torch.tensor([[token]]), past_key_values=cache, position_ids=at).logits[0, -1])
        if marked:
            left = free(cache, forgets, left, begin, i)
            begin = i + 1
    return torch.stack(logits)


def free(cache, forgets, left, begin, mark=None):
    """Ordinary tokens of the line that began at `begin` go from layers that forget; which are left."""
    stay = [slot for slot, at in enumerate(left) if at in (0, mark) or at < begin]
    for layer, forgetful in zip(cache.layers, forgets):
        if forgetful and layer.keys is not None:
            layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]
    return [left[slot] for slot in stay]


def with_settings(**other):
    return lambda model, ids, settings: decode(model, ids, settings | other)


def test_right_decoding_passes(capsys):
    lesson_03.check_decoding(decode)
    model = tiny_model(layers=5)
    model.config.anchorcoder = lesson_03.SETTINGS | {"per": None, "source": 1, "beyond": 3, "spread": True}
    lesson_03.check_decoding(decode, model, [11, 12, 13, 7, 20, 21, 7, 30])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "decode is right: on tiny models it gives the logits of the training mask"
    assert "over 8 tokens of the trained model the largest difference of a logit is" in second


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "decode returned Ellipsis"),
        (lambda *a: decode(*a)[-1], "shape (64,), expected (tokens, vocabulary) = (18, 64)"),
        (with_settings(per=1), "nothing was freed"),
        (with_settings(per=None), "every layer has freed, full ones too"),
        (with_settings(per=4), "full layers are those whose number is a multiple of per"),
        (with_settings(spread=False), "keys of anchors are not where the heads see them"),
        (with_settings(spread=True), "the keys of anchors were turned, though spread is False"),
        (with_settings(source=None, beyond=None), "the second layer is not read"),
        (lambda m, i, s: decode(m, i, s | ({"source": 0} if s["beyond"] else {})), "the second layer is another one"),
        (lambda m, i, s: decode(m, i, s | ({"beyond": 3} if s["beyond"] else {})), "layers behind `beyond` read it"),
        (lambda *a: decode(*a, position=lambda i, left: len(left) - 1), "TAA alone: from token 6 on"),
        (lambda *a: decode(*a, early=True), "from token 5 on"),
    ],
)
def test_wrong_decoding(answer, message):
    refused(lesson_03.check_decoding, message, answer)


def test_a_trained_model_is_asked_too():
    model = tiny_model(layers=5)
    model.config.anchorcoder = lesson_03.SETTINGS | {"per": 3}
    without = lambda m, ids, s: decode(m, ids, s | ({"per": 2} if s["per"] == 3 else {}))  # noqa: E731
    refused(lesson_03.check_decoding, "on tiny models decode is right, but over", without, model, [11, 7, 12, 13, 7, 9])


def share_stored(lines, layers, per):
    plain, marks = sum(lines) + 1, len(lines) + 1
    full = math.ceil(layers / per) if per else 0
    return (full * (plain + len(lines)) + (layers - full) * marks) / (layers * plain)


def test_right_shares_pass(capsys):
    lesson_03.check_share_stored(share_stored)
    assert capsys.readouterr().out == "share_stored is right\n"


def formula(full=lambda layers, per: math.ceil(layers / per) if per else 0, tokens=0, marks=0, of=0):
    """The right one with something added to a part of it, in tokens of the text or as a function of its lines."""

    def function(lines, layers, per):
        plain, n = sum(lines) + 1, len(lines)
        count = full(layers, per)
        kept = n + 1 + (marks(lines) if callable(marks) else marks)
        return (count * (plain + n + tokens * n) + (layers - count) * kept) / (layers * (plain + of * n))

    return function


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "share_stored returned None"),
        (formula(of=1), "that is the share of the anchored stream"),
        (formula(tokens=-1), "full layers store anchors, too"),
        (formula(marks=-1), "BOS is a mark, and stays"),
        (formula(full=lambda layers, per: layers // per if per else 0), "layer 0 is full for every per: round up"),
        (formula(full=lambda layers, per: math.ceil(layers / (per or layers))), "with per=None no layer is full"),
        (formula(marks=lambda lines: lines[-1]), "of finished lines anchors alone are left"),
        (lambda *a: 1 - share_stored(*a), "that is what is freed"),
        (lambda *a: 100 * share_stored(*a), "a share of 1 is asked for, not percent"),
        (formula(marks=lambda lines: -len(lines) - 1), "TAA layers keep the anchors"),
        (lambda lines, *a: share_stored([lines.pop(), *lines], *a), "share_stored changes its argument"),
    ],
)
def test_wrong_shares(answer, message):
    refused(lesson_03.check_share_stored, message, answer)


def test_the_share_is_what_a_model_stores():
    """Measured, of a text in three finished lines."""
    model = tiny_model(layers=5)
    lines = [[10, 11, 9], [12, 13, 14, 15, 9], [16, 9]]
    ids = [1, *(token for line in lines for token in [*line, 7])]
    assert model.config.bos_token_id == 1
    with kvlib.method("anchorcoder", anchor=7, ends=(9,), per=2)(model) as run, torch.no_grad():
        model(torch.tensor([ids]))
    whole = run.full_bytes() / len(ids) * (len(ids) - len(lines))  # of the text without its anchors
    assert run.stored_bytes() / whole == pytest.approx(share_stored([3, 5, 2], 5, 2))


# 03b_anchors_in_depth


def head_places(tokens, heads, weight=lambda i, tokens: i**3, order=lambda i, rest: (-rest[i], i)):
    weights = [weight(i, tokens) for i in range(1, tokens + 1)]
    shares = [heads * w // sum(weights) for w in weights]
    rest = [heads * w % sum(weights) for w in weights]
    for i in sorted(range(tokens), key=lambda i: order(i, rest))[: heads - sum(shares)]:
        shares[i] += 1
    return [i for i in range(tokens) for _ in range(shares[i])]


def test_right_places_pass(capsys):
    lesson_03b.check_head_places(head_places)
    assert capsys.readouterr().out == "head_places is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "head_places returned None"),
        (lambda *a: head_places(*a)[:-1], "7 places, one for each head is expected"),
        (lambda *a: [place + 1 for place in head_places(*a)], "tokens are counted from 0"),
        (lambda *a: head_places(*a)[::-1], "places ascend with the heads"),
        (lambda *a: head_places(*a, lambda i, n: (n + 1 - i) ** 3), "most heads stand at the line's end"),
        (lambda *a: head_places(*a, lambda i, n: i**2), "shares go by the cube of a token's number"),
        (lambda *a: head_places(*a, lambda i, n: i), "shares go by the cube, not by the number itself"),
        (lambda *a: head_places(*a, lambda i, n: 1), "shares are not all the same"),
        (lambda *a: head_places(*a, order=lambda i, rest: i), "not to the first tokens"),
        (lambda *a: head_places(*a, order=lambda i, rest: -i), "is expected, found"),
        (lambda tokens, heads: [tokens - 1] * heads, "is expected, found"),
    ],
)
def test_wrong_places(answer, message):
    refused(lesson_03b.check_head_places, message, answer)


def emission(chosen, right, anchor):
    due = [c for c, r in zip(chosen, right) if r == anchor]
    others = [c for c, r in zip(chosen, right) if r != anchor]
    return sum(c != anchor for c in due) / len(due), sum(c == anchor for c in others) / len(others)


def of(change):
    return lambda chosen, right, anchor: change(*emission(chosen, right, anchor), chosen, right)


def test_right_rates_pass(capsys):
    lesson_03b.check_emission(emission)
    assert capsys.readouterr().out == "emission is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: ..., "emission returned Ellipsis"),
        (lambda *a: (*emission(*a), 0), "a pair is expected"),
        (of(lambda missed, spurious, c, r: (spurious, missed)), "missed comes first"),
        (of(lambda m, s, c, r: (m * r.count(3), s * (len(r) - r.count(3)))), "shares, not counts"),
        (of(lambda m, s, c, r: (m * r.count(3) / len(r), s * (len(r) - r.count(3)) / len(r))), "one of all other"),
        (of(lambda m, s, c, r: (m, s * (len(r) - r.count(3)) / r.count(3))), "of the tokens that are no anchors"),
        (of(lambda m, s, c, r: (1 - m, s)), "that is how many are found"),
        (of(lambda m, s, c, r: (100 * m, 100 * s)), "percent were not asked for"),
        (lambda c, r, a: (emission(c, r, a)[0], sum(x != y != a for x, y in zip(c, r)) / (len(r) - r.count(a))),
         "a wrong token is not spurious unless it is an anchor"),
        (lambda c, r, a: emission([c.pop(), *c], r, a), "emission changes its arguments"),
    ],
)  # fmt: skip
def test_wrong_rates(answer, message):
    refused(lesson_03b.check_emission, message, answer)


def recall(scores, wanted):
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: sum(wanted)]
    return sum(wanted[i] for i in best) / sum(wanted)


def best_of(count=sum, sign=-1):
    """Another number of words, or the worst of them."""
    return lambda s, w: sum(w[i] for i in sorted(range(len(s)), key=lambda i: sign * s[i])[: count(w)]) / sum(w)


def test_right_recall_passes(capsys):
    lesson_03b.check_recall(recall)
    assert capsys.readouterr().out == "recall is right\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: None, "recall returned None"),
        (best_of(count=lambda wanted: 1), "not the best one alone"),
        (best_of(sign=1), "the best words have the highest scores"),
        (best_of(count=len), "is expected, found 1.000"),
        (lambda s, w: recall(s, w) * sum(w) / len(w), "not of all words"),
        (lambda s, w: recall(s, w) * sum(w), "a share, not a count"),
        (lambda s, w: sum(x for x, score in zip(w, s) if score > 0.5) / sum(w), "not all that score above one half"),
        (lambda s, w: sum(w[: sum(w)]) / sum(w), "these are the first words, not the best"),
        (lambda s, w: float(recall(s, w) == 1), "that is 1 if all of them are found"),
        (lambda s, w: recall([s.pop(), *s], w), "recall changes its arguments"),
    ],
)
def test_wrong_recall(answer, message):
    refused(lesson_03b.check_recall, message, answer)


# 03c_anchors_against_eviction


def mcnemar(first, second, **wrong):
    return tossed(*(sum(x > y for x, y in zip(*pair)) for pair in ((first, second), (second, first))), **wrong)


def tossed(a, b, *, terms=None, factor=2, most=1.0):
    terms = min(a, b) + 1 if terms is None else terms(a, b)
    return a, b, min(most, factor * sum(math.comb(a + b, k) for k in range(terms)) / 2 ** (a + b))


def of_all(first, second):
    a, b, _ = mcnemar(first, second)
    return a, b, tossed(a, len(first) - a)[2]


def test_right_mcnemar_passes(capsys):
    lesson_03c.check_mcnemar(mcnemar)
    assert "mcnemar is right" in capsys.readouterr().out
    assert mcnemar([1, 0, 0, 0, 0], [0, 1, 1, 1, 1]) == (1, 4, 0.375)  # as with a pencil


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda first, second: None, "mcnemar returned None: is there a `return`?"),
        (lambda first, second: 0.5, "three values are expected, found 0.5"),
        (lambda first, second: first.clear() or (0, 0, 1.0), "mcnemar changes its arguments, work on copies"),
        (lambda first, second: mcnemar(second, first), "the first comes first"),
        (lambda first, second: tossed(sum(first), sum(second)), "what both solve counts for neither"),
        (lambda first, second: tossed(first.count(0), second.count(0)), "these are failures of each"),
        (lambda first, second: mcnemar(first, second, factor=1), "both sides count: twice the tail"),
        (lambda first, second: mcnemar(first, second, most=9.0), "p is at most 1"),
        (lambda first, second: mcnemar(first, second, terms=min), "the tail goes up to the smaller count and has it"),
        (lambda first, second: mcnemar(first, second, terms=max), "p = 0.45312 is expected, found 1.00000"),
        (of_all, "problems that both or neither solve are left out"),
        (lambda first, second: (*mcnemar(first, second)[:2], 2 - mcnemar(first, second)[2]), "not the larger"),
    ],
)
def test_wrong_mcnemar_is_told_why(answer, message):
    refused(lesson_03c.check_mcnemar, message, answer)
