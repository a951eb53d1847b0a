"""The eleven kinds of method in `throwaway.py` have the properties of every method, and do what they are there for."""

import ast
import inspect

import properties
import pytest
import throwaway
import tiny
import torch
from properties import Conversation

import kvlib

on_all = pytest.mark.parametrize("method", throwaway.METHODS, ids=repr)
FORKING = [m for m in throwaway.METHODS if not m.own_prefill]
LONG = {throwaway.TwoBits(32): 30}  # more tokens, so that groups are filled


def talk(method, first, **arguments) -> Conversation:
    more = LONG.get(method, 0)
    return Conversation(first=tuple(n + more for n in first), **arguments)


@on_all
@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "qwen3"])
def test_padding_chunks_and_second_turns_change_nothing(method, architecture):
    model = tiny.model(architecture)
    properties.same_alone_and_in_company(model, method, talk(method, (21, 14), second=9, chunk=5, extra=3, new=6))


@on_all
@pytest.mark.parametrize("chunk", [1, 4, 21])
def test_chunks_change_nothing(method, chunk):
    model = tiny.model("llama-gqa")
    properties.same_alone_and_in_company(model, method, talk(method, (21,), second=8, chunk=chunk, new=5))


@on_all
def test_beams_have_their_own_history(method):
    rows = talk(method, (19, 12), second=1).rows(0)
    properties.beams_have_their_own_history(tiny.model("llama-gqa"), method, rows, beams=3, new=5)


@pytest.mark.parametrize("method", FORKING, ids=repr)
def test_fork_continues_like_the_live_run(method):
    properties.fork_continues_like_live(tiny.model("llama-gqa"), method, talk(method, (21, 14), second=1, extra=2))


@on_all
def test_nothing_is_left_to_the_collector(method):
    properties.leaves_nothing_to_the_collector(tiny.model("llama-gqa"), method, talk(method, (21, 14), second=1))


@pytest.mark.parametrize("cls", dict.fromkeys(map(type, throwaway.METHODS)), ids=lambda c: c.__name__)
def test_each_takes_at_most_25_lines(cls):
    (node,) = ast.parse(inspect.getsource(cls)).body
    body = [x for x in ast.walk(node) if isinstance(x, ast.stmt)]
    documented = {x.value.lineno for x in body if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)}
    lines = {
        n for x in body if not isinstance(x, ast.ClassDef | ast.FunctionDef) for n in range(x.lineno, x.end_lineno + 1)
    }
    heads = {x.lineno for x in body if isinstance(x, ast.ClassDef | ast.FunctionDef)}
    assert len((lines | heads) - documented) <= 25


# Bytes: of a Llama with two layers, two KV heads of 8 channels in float64


def bytes_of(method, tokens=40, new=0):
    model = tiny.model("llama-gqa")
    with method(model) as run:
        tiny.generate(model, run, [tiny.tokens(tokens)], new=new + 1)
        properties.well_formed(run)
        assert run.full_bytes() == (tokens + new) * properties.token_bytes(model)
        if not new:
            properties.without_room(run)
    return run, model


@pytest.mark.parametrize("new", [0, 3])
def test_bytes_are_what_each_form_takes(new):
    per_token = 2 * 2 * 8 * 8  # two layers and two heads of 8 numbers of 8 bytes, once
    n = 40 + new
    assert bytes_of(throwaway.HalfChannels(), new=new)[0].stored_bytes() == n * 1.5 * per_token
    assert bytes_of(throwaway.Int8(), new=new)[0].stored_bytes() == n * 2 * 2 * (2 * 8 + 2 * 4)
    assert bytes_of(throwaway.LowRank(), new=new)[0].stored_bytes() == n * 2 * per_token * 6 / 8
    assert bytes_of(throwaway.Borrowed(), new=new)[0].stored_bytes() == n * per_token
    assert bytes_of(throwaway.Merging(0.5), new=new)[0].stored_bytes() == (20 + new) * 2 * per_token
    assert bytes_of(throwaway.SharedSlots(0.4), new=new)[0].stored_bytes() == n * 2 * per_token


@pytest.mark.parametrize(("new", "groups"), [(0, 1), (23, 1), (24, 2), (30, 2)])
def test_groups_are_encoded_as_they_fill(new, groups):
    run, _ = bytes_of(throwaway.TwoBits(32), new=new)
    raw = 40 + new - 32 * groups
    group = 32 * 8 // 4 + 2 * 8 * 8 + 32 * 8 * 8  # codes, lowest and step of each channel, values
    assert run.stored_bytes() == 4 * (groups * group + raw * 2 * 8 * 8)


def test_what_two_layers_share_is_stored_once():
    run, model = bytes_of(throwaway.SharedDirections(retained=5))
    one, two = run.cache.layers
    assert one.body is two.body and one.tail is not two.tail
    merged = 35 * 2 * 2 * (8 + 2) * 8  # heads, keys and values, a direction and two norms
    assert run.stored_bytes() == merged + 5 * properties.token_bytes(model)
    model.generate(torch.ones(1, 3, dtype=torch.long), num_beams=2, max_new_tokens=2)
    run.cache.select_rows(torch.tensor([0, 0]))
    assert one.body is two.body
    assert run.stored_bytes() == 2 * (merged + 5 * properties.token_bytes(model))


def test_a_probe_leaves_nothing_but_state():
    model, ids = tiny.model(), tiny.tokens(2, 20)
    with throwaway.Repeated(1.0)(model) as run:
        model(ids)
        cache, before = run.cache, (run.stored_bytes(), run.cache.get_seq_length(), tiny.kept(run))
        run._begin(_finished(run))
        run.probe(ids)
        run.step = None
        assert (run.stored_bytes(), cache.get_seq_length(), tiny.kept(run)) == before
        assert (cache.layers[1].tail.rectangle(cache.layers[1].tail.state["most"]) > 0).all()
        after = model(ids[:, :1], past_key_values=cache).logits
    with kvlib.method("full")(model) as run:
        model(ids)
        torch.testing.assert_close(model(ids[:, :1], past_key_values=run.cache).logits, after, rtol=0, atol=1e-12)


def _finished(run):
    return kvlib.snapshot(run.model, tiny.tokens(2, 20)).step()


def test_a_repeated_pass_scores_by_what_it_looks_at():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 20)
    with throwaway.Repeated(6)(model) as run:
        model(ids)
    with properties.eager(model):
        weights = model(torch.cat([ids, ids], dim=1), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        sums = matrix[0, :, 20:, :20].sum(1).unflatten(0, (2, 2)).amax(1)
        for head in range(2):
            best = sums[head].sort(descending=True, stable=True).indices[:6].sort().values
            assert run.kept(layer)[0, head].tolist() == best.tolist()


def test_a_cache_whose_finish_failed_cannot_be_continued():
    """Half of its layers may be compressed; the error comes through, and the model is as it was."""

    class Failing(throwaway.Repeated):
        def finish(self, run):
            super().finish(run)
            raise ArithmeticError("half-way")

    model, ids = tiny.model(), tiny.tokens(1, 20)
    with Failing(6)(model) as run:
        with pytest.raises(ArithmeticError, match="half-way"):
            model(ids)
        assert run.step is None and not run.cache.memo.open
        with pytest.raises(ValueError, match="interrupted half-way"):
            model(ids[:, :1], past_key_values=run.cache)
    with throwaway.Repeated(6)(model) as run:
        model(ids)
        assert not run.cache.interrupted


# Readers


@pytest.mark.parametrize("method", [throwaway.SharedSlots(5), throwaway.Pages(8)], ids=repr)
def test_what_is_not_selected_is_not_read(method):
    """Poisoned with NaN in layer 1, it changes nothing."""
    model, ids, token = tiny.model("llama-gqa"), tiny.tokens(1, 30), tiny.tokens(1, 1, seed=1)
    chosen = []

    class Watched(type(method)):
        def select(self, view):
            slots = super().select(view)
            if view.layer_idx == 1:
                chosen.append(slots)
            return slots

    logits = []
    for poison in (False, True):
        with Watched(method.budget)(model) as run:
            model(ids)
            if poison:
                tail = run.cache.layers[1].tail
                read = torch.zeros(1, tail.lengths.shape[1], 31, dtype=torch.bool)
                group = chosen[0].shape[1] // tail.lengths.shape[1]
                for head, slots in enumerate(chosen[0][0]):
                    read[0, head // group, slots[slots >= 0]] = True
                assert not read[..., :30].all()
                for flat in tail.fields.values():
                    tail.rectangle(flat)[~read[..., :30]] = torch.nan
            logits.append(model(token, past_key_values=run.cache).logits)
    assert torch.equal(*logits)


def test_bytes_read_are_those_of_what_is_selected_and_of_choosing():
    model, token = tiny.model("llama-gqa"), 2 * 8 * 8  # bytes of a token in a head
    ids, mask = tiny.pad([tiny.tokens(30), tiny.tokens(17, seed=1)])
    with throwaway.SharedSlots(5)(model) as run:
        model(ids, attention_mask=mask)
        assert run.read_bytes() == run.stored_bytes()
        model(tiny.tokens(2, 1), past_key_values=run.cache)
        # layer 0 reads all of its two KV heads, layer 1 five tokens for each of four query heads, in both rows
        assert run.read_bytes() == 2 * (31 + 18) * token + 2 * 4 * 5 * token
        properties.well_formed(run)
    with throwaway.Pages(8)(model) as run:
        model(ids, attention_mask=mask)
        model(tiny.tokens(2, 1), past_key_values=run.cache)
        pages = 2 * (8 + 5) * 2 * 8 * 8  # heads, pages that were there before the token, two bounds of 8 numbers
        # three pages; the last of row 0 has three tokens, that of row 1 two
        assert run.read_bytes() == 2 * (pages + 2 * (11 + 10) * token)


def test_a_reader_that_reads_everything_is_the_stock_model():
    model, rows = tiny.model("llama-gqa"), [tiny.tokens(21), tiny.tokens(13, seed=1)]
    stock = tiny.generate(model, None, rows, new=6)
    for method in (throwaway.SharedSlots(1.0), throwaway.SharedSlots(64), throwaway.Pages(64)):
        turn = tiny.once(model, method, rows, new=6)
        torch.testing.assert_close(turn.logits, stock.logits, rtol=0, atol=1e-10)
        assert turn.tokens.tolist() == stock.tokens.tolist()


# Two layers at once


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_own_and_another_layer_s_keys_are_one_softmax(chunk):
    model, ids, first = tiny.model("llama-gqa"), tiny.tokens(1, 24), []

    def by_hand(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx == 0:
            first[:] = [key, value]
        else:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), first))
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        tokens = query.shape[2]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(1, key.shape[2] // tokens)
        weights = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    with properties.attending_with(model, by_hand), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with throwaway.BothLayers()(model) as run, torch.no_grad():
        parts = ids.split(chunk or 24, dim=1)
        logits = [model(part, past_key_values=run.cache if i else None).logits for i, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-12)


# Traps of the contract's first edition


def test_state_set_while_attending_stays_at_a_full_budget():
    class Noting(kvlib.Evictor):
        def attend(self, view):
            view.remember("key", view.new_key[..., 0])
            return super().attend(view)

    model = tiny.model()
    with Noting(1.0)(model) as run:
        model(tiny.tokens(1, 9))
        model(tiny.tokens(1, 1), past_key_values=run.cache)
    tail = run.cache.layers[1].tail
    assert torch.equal(tail.rectangle(tail.state["key"]), tail.rectangle(tail.fields["key"])[..., 0])


def test_observing_happens_at_a_full_budget_too():
    model = tiny.model()
    with kvlib.method("h2o", budget=1.0)(model) as run:
        model(tiny.tokens(1, 9))
    assert tiny.remembered(run.cache.layers[0], "attention").sum().item() == pytest.approx(9 * 4)


def test_a_reader_evicts_nothing():
    model = tiny.model()
    with throwaway.SharedSlots(3)(model) as run:
        tiny.generate(model, run, [tiny.tokens(20)], new=4)
    assert tiny.kept(run) == [[[[*range(23)]] * 2] * 2]


def test_other_keys_open_the_view_anew():
    """Keys of two layers behind each other have no causal order of their own: what is seen follows from positions."""
    model, seen = tiny.model("llama-gqa"), []

    class Twice(kvlib.Method):
        own_prefill = True

        def attend(self, view):
            pairs = {name: torch.cat([getattr(view, name)] * 2, dim=2) for name in ("key", "value", "positions")}
            double = view.replaced(**pairs)
            seen.append((double.uniform, double.intact))
            return super().attend(double)  # every key twice: the same weights, halved

    ids = tiny.tokens(1, 12)
    with Twice()(model):
        twice = model(ids).logits
    torch.testing.assert_close(twice, model(ids).logits, rtol=0, atol=1e-12)
    assert set(seen) == {(False, False)}


def test_full_bytes_do_not_follow_the_form():
    for method in (throwaway.Int8(), throwaway.Borrowed(), throwaway.LowRank(), throwaway.TwoBits(4)):
        run, model = bytes_of(method)
        assert run.full_bytes() == 40 * properties.token_bytes(model) > run.stored_bytes()


def test_bytes_that_a_view_has_read_are_part_of_the_state():
    model = tiny.model()
    with throwaway.SharedSlots(3)(model) as run:
        tiny.generate(model, run, [tiny.tokens(20)], new=3)
        assert run.cache.layers[1].reads is not None
        properties.well_formed(run)


@pytest.mark.parametrize("chunk", [None, 7, 11, 20])
def test_the_next_layer_s_hook_sees_the_queries_that_wait(chunk):
    """Sums over the last 8 queries are the same wherever chunks were cut."""
    sums = []

    class Staged(kvlib.Method):
        window = 8
        own_prefill = True

        def before_layer(self, run, layer_idx):
            if layer_idx == 1 and run.step.ends_prompt:
                sums.append(run.step.view.column_sums(last=8))

    model = tiny.model("llama-gqa")
    for size in (None, chunk):
        with Staged()(model) as run:
            tiny.generate(model, run, [tiny.tokens(23)], new=1, chunk=size)
    assert sums[0].sum().item() == pytest.approx(8 * 4)
    torch.testing.assert_close(*sums)


def test_sums_are_those_of_the_queries_and_keys_that_a_view_has():
    model, found = tiny.model("llama-gqa"), []

    class Watching(kvlib.Method):
        def observe(self, view):
            query = view.query.flip(-1)
            plain, other = view.column_sums(), view.replaced(query=query).column_sums()
            keyed = view.replaced(key=view.key.flip(-1)).column_sums()
            found.append((plain, other, keyed, view.column_sums(), view.replaced(query=query).column_sums()))

    with Watching()(model):
        model(tiny.tokens(1, 12))
    for plain, other, keyed, again, other_again in found:
        assert torch.equal(plain, again) and torch.equal(other, other_again)
        assert not torch.allclose(plain, other) and not torch.allclose(plain, keyed)


def test_sums_over_another_layer_s_keys_are_not_those_over_its_own():
    model, found = tiny.model("llama-gqa"), []

    class Watching(kvlib.Method):
        def observe(self, view):
            if view.layer_idx == 1:
                found.extend([view.column_sums(), view.other(0).column_sums(), view.column_sums()])

    with Watching()(model):
        model(tiny.tokens(1, 12))
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])


def test_methods_that_hold_tensors_are_compared_by_identity():
    @kvlib.core.method.dataclass(frozen=True)
    class Holding(kvlib.Evictor):
        weights: torch.Tensor = None

        def score(self, view):
            return view.positions.float()

    model, weights = tiny.model(), torch.ones(3)
    with Holding(0.5, weights)(model) as run:
        model(tiny.tokens(1, 9))
    with Holding(0.5, weights)(model):
        model(tiny.tokens(1, 1), past_key_values=run.cache)
    with Holding(0.5, weights.clone())(model), pytest.raises(ValueError, match="the cache was filled by"):
        model(tiny.tokens(1, 1), past_key_values=run.cache)


# Slots in any order


class PooledStreams(type(kvlib.method("snapkv"))):
    """SnapKV's pooled score of the newest query, evicting at every decode step."""

    evicts_in_decode = True
    text_order = True

    def score(self, view):
        weights = view.column_sums(last=1).mean(2)
        return torch.nn.functional.max_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)


def test_a_pooled_score_while_decoding_sees_neighbours_in_the_text():
    """Against a cache of lists; without text order in slots, other tokens would be neighbours."""
    model, budget = tiny.model("llama-mha"), 12
    method, ids = PooledStreams(budget, window=1, kernel=3), tiny.tokens(1, 30)
    with method(model) as run, torch.no_grad():
        model(ids)
        kept, text = [run.kept(0)[0]], ids
        for seed in range(12):
            token = tiny.tokens(1, 1, seed=seed)
            model(token, past_key_values=run.cache)
            text = torch.cat([text, token], dim=1)
            kept.append(run.kept(0)[0])
    with properties.eager(model):  # layer 0: its keys and queries depend on their tokens alone
        weights = model(text, output_attentions=True).attentions[0][0]
    for head in range(4):
        stored = [*range(30)]
        for step in range(13):
            stored += [29 + step] if step else []
            row = weights[head, 29 + step, stored]
            row = row / row.sum()
            pooled = [max(row[max(0, i - 1) : i + 2].tolist()) for i in range(len(stored))]
            best = sorted(range(len(stored)), key=lambda i: (-pooled[i], i))[:budget]
            stored = [stored[i] for i in sorted(best)]
            assert kept[step][head].tolist() == stored
