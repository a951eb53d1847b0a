"""Blocks: what they change, that they undo it, and what a run says afterwards."""

import copy
import subprocess
import sys

import properties
import pytest
import tiny
import torch
from transformers import AttentionInterface
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvlib
from kvlib.core import attention

KNORM = kvlib.method("knorm", budget=0.5)
H2O = kvlib.method("h2o", budget=0.5)


class Boom(Exception):
    pass


def attributes(model) -> dict:
    """Everything that hangs on a model and its parts: attributes, hooks, configuration."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
    for config in (model.config, model.generation_config):
        found[type(config).__name__, "config"] = dict(vars(config))
    return found


def stock(model):
    return tiny.generate(model, None, [tiny.tokens(12)]).tokens.tolist()


# Leaving no trace


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_leaves_no_trace(attention):
    model = tiny.build("llama-gqa", attn_implementation=attention)
    before, tokens = attributes(model), stock(model)
    with KNORM(model) as run:
        assert model.config._attn_implementation == "kvlib"
        tiny.generate(model, run, [tiny.tokens(12)])
        assert attributes(model) != before
    assert attributes(model) == before
    assert model.config._attn_implementation == attention
    assert stock(model) == tokens


@pytest.mark.parametrize("place", ["block", "forward", "score", "before_layer"])
def test_an_exception_leaves_no_trace(place):
    model = tiny.build("llama-gqa", attn_implementation="eager")
    before, tokens = attributes(model), stock(model)

    class Failing(type(KNORM)):
        def score(self, view):
            if place == "score" and view.layer_idx == 1:
                raise Boom
            return super().score(view)

    class Shortening(Failing):
        def before_layer(self, run, layer_idx):
            if layer_idx == 1:
                raise Boom

    method = (Shortening if place == "before_layer" else Failing)(0.5)
    with pytest.raises(Boom if place != "forward" else IndexError), method(model):
        if place == "forward":
            model(torch.tensor([[tiny.VOCABULARY]]))  # no such embedding
        model.generate(tiny.tokens(1, 9), max_new_tokens=3)
        raise Boom
    assert attributes(model) == before
    assert stock(model) == tokens


def test_a_model_that_has_a_generate_of_its_own_keeps_it():
    model = tiny.build("llama-gqa")
    model.generate = lambda *args, **kwargs: "mine"
    with KNORM(model):
        assert torch.is_tensor(model.generate(tiny.tokens(1, 5), max_new_tokens=1))
    assert model.generate() == "mine"


def test_nothing_is_patched_outside_a_block():
    # In a process of its own: importing kvlib must add one name to two registries and change nothing else.
    code = """
import transformers
from transformers import cache_utils, generation
from transformers.models.llama import modeling_llama as llama
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
def everything():
    modules = [llama, cache_utils, generation]
    spaces = [*map(vars, modules), dict(masks), dict(functions), vars(transformers.PreTrainedModel)]
    spaces += [vars(thing) for module in modules for thing in vars(module).values() if isinstance(thing, type)]
    return [{k: v for k, v in space.items() if k != '__annotations_cache__'} for space in spaces]
names = set(masks), set(functions)
before = everything()
import kvlib
after = everything()
assert (set(masks) - names[0], set(functions) - names[1]) == ({"kvlib", "kvlib_keys"},) * 2
for space in after:
    space.pop("kvlib", None), space.pop("kvlib_keys", None)
assert before == after
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_models_and_classes_are_untouched_inside_a_block():
    inside, outside = tiny.build("llama-gqa"), tiny.build("llama-gqa")
    before, tokens = attributes(outside), stock(outside)
    with KNORM(inside):
        assert attributes(outside) == before
        assert stock(outside) == tokens
        assert type(inside).generate is GenerationMixin.generate
        assert AttentionInterface()["sdpa"] is sdpa_attention_forward


# Blocks within blocks


def test_the_inner_block_holds_and_then_the_outer_goes_on():
    model = tiny.build("llama-gqa", attn_implementation="eager")
    before = attributes(model)
    rows, more = [tiny.tokens(20), tiny.tokens(13, seed=1)], [tiny.tokens(5, seed=2)] * 2
    with KNORM(model) as run:
        first = tiny.generate(model, run, rows)
        second = tiny.generate(model, run, more, before=first)
    alone = tiny.once(model, H2O, rows)
    with KNORM(model) as outer:
        outer_first = tiny.generate(model, outer, rows)
        cache = outer.cache
        with H2O(model) as inner:
            between = tiny.generate(model, inner, rows)
            assert outer.cache is cache and inner.cache is not cache
        outer_second = tiny.generate(model, outer, more, before=outer_first)
        assert outer.cache is cache
    for got, expected in ((outer_first, first), (outer_second, second), (between, alone)):
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.kept == expected.kept
    assert tiny.kept(inner) == alone.kept  # the outer block did not write to it
    assert attributes(model) == before


def test_inner_blocks_that_shorten_do_not_reach_the_outer_one():
    class Shorten(type(kvlib.method("full"))):
        own_prefill = True

        def before_layer(self, run, layer_idx):
            return torch.tensor([[0, 2, 3]]) if layer_idx == 1 else None

    model = tiny.build("llama-gqa")
    with Shorten()(model) as outer, KNORM(model) as inner:
        model(tiny.tokens(1, 4))
        assert inner.kept(1).shape[-1] == 2 and outer.cache is None
    with KNORM(model) as outer:
        with Shorten()(model) as inner:
            model(tiny.tokens(1, 4))
        model(tiny.tokens(1, 4))
    assert inner.kept(1).tolist() == [[[0, 2, 3]] * 2]
    assert outer.kept(1).shape[-1] == 2


def test_an_exception_in_the_inner_block_leaves_the_outer_one_working():
    model = tiny.build("llama-gqa")
    expected = tiny.once(model, KNORM, [tiny.tokens(12)])
    with KNORM(model) as run:
        with pytest.raises(Boom), H2O(model):
            raise Boom
        assert tiny.generate(model, run, [tiny.tokens(12)]).kept == expected.kept


def test_two_models_at_once():
    one, two = tiny.model("llama-gqa"), tiny.model("qwen3")
    rows = [tiny.tokens(15)]
    expected = tiny.once(one, KNORM, rows), tiny.once(two, H2O, rows)
    with KNORM(one) as first, H2O(two) as second:
        a = [tiny.generate(one, first, rows, new=2), tiny.generate(two, second, rows, new=2)]
        a = [tiny.generate(one, first, rows), tiny.generate(two, second, rows)]
    assert [turn.kept for turn in a] == [turn.kept for turn in expected]
    assert [turn.tokens.tolist() for turn in a] == [turn.tokens.tolist() for turn in expected]


def test_one_run_may_be_entered_again():
    model, run = tiny.model(), KNORM(tiny.model())
    with run:
        first = tiny.generate(model, run, [tiny.tokens(12)])
    with run:
        second = tiny.generate(model, run, [tiny.tokens(5, seed=1)], before=first)
    with KNORM(model) as whole:
        turn = tiny.generate(model, whole, [tiny.tokens(12)])
        assert tiny.generate(model, whole, [tiny.tokens(5, seed=1)], before=turn).kept == second.kept


def test_one_run_is_open_once_at_a_time():
    model = tiny.build("llama-gqa", attn_implementation="eager")
    before, tokens, run = attributes(model), stock(model), KNORM(model)
    expected = tiny.once(model, KNORM, [tiny.tokens(12)])
    with run:
        with pytest.raises(RuntimeError, match="this run is already open on this model"), run:
            pass
        assert tiny.generate(model, run, [tiny.tokens(12)]).kept == expected.kept
    assert attributes(model) == before
    with pytest.raises(RuntimeError, match="this run is already open on this model"), run, run:
        pass
    assert attributes(model) == before
    assert stock(model) == tokens


def test_other_arguments_reach_the_inner_model_once():
    model, ids, seen = tiny.build("llama-gqa"), tiny.tokens(1, 6), []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(ids, marker=7)
    with KNORM(model):
        model(ids, marker=7)
        model(ids)
    stock, inside, without = seen
    assert inside.keys() == stock.keys() and inside["marker"] == 7
    assert without.keys() == stock.keys() - {"marker"}


# What a run says, and when


def test_a_run_stays_valid_after_its_block():
    model = tiny.model()
    with H2O(model) as run:
        tiny.generate(model, run, [tiny.tokens(20), tiny.tokens(3, seed=1)])
        reports = (
            run.stored_bytes(),
            run.state_bytes(),
            run.full_bytes(),
            run.read_bytes(),
            tiny.kept(run),
            dict(run.clamped),
        )
    stock(model)
    assert (
        run.stored_bytes(),
        run.state_bytes(),
        run.full_bytes(),
        run.read_bytes(),
        tiny.kept(run),
        run.clamped,
    ) == reports
    assert run.step is None
    properties.well_formed(run)


def test_reports_before_the_first_pass_say_what_is_missing():
    with KNORM(tiny.model()) as run:
        for report in (run.stored_bytes, run.state_bytes, run.full_bytes, run.read_bytes, lambda: run.kept(0)):
            with pytest.raises(RuntimeError, match="the run has no cache yet: call the model inside the block first"):
                report()


def test_a_new_prompt_is_a_new_cache_and_the_run_describes_the_latest():
    model = tiny.model()
    with KNORM(model) as run:
        tiny.generate(model, run, [tiny.tokens(20)])
        first = run.cache
        tiny.generate(model, run, [tiny.tokens(6)])
        assert run.cache is not first
        assert first.get_seq_length() == 23 and run.cache.get_seq_length() == 9
        assert run.kept(0).shape[-1] == 3 + 3


def test_a_cache_of_kvlib_goes_nowhere_outside_a_block():
    model = tiny.model()
    with KNORM(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(12)])
    message = "this cache was filled by kvlib and can only be continued inside a `with method"
    with pytest.raises(RuntimeError, match=message):
        model(tiny.tokens(1, 1), past_key_values=run.cache)
    with pytest.raises(RuntimeError, match=message):
        model.generate(turn.ids, past_key_values=run.cache, max_new_tokens=1)
    with KNORM(model):  # but another block of the same method may go on
        model(tiny.tokens(1, 1), past_key_values=run.cache)


def test_a_bare_call_is_a_complete_prompt_and_single_tokens_are_decoded():
    model = tiny.model()
    with H2O(model) as run:
        model(tiny.tokens(1, 20))
        assert run.kept(0).shape[-1] == 10
        model(tiny.tokens(1, 1), past_key_values=run.cache)
        assert run.kept(0).shape[-1] == 10 and run.cache.steps == 1
        model(tiny.tokens(1, 9), past_key_values=run.cache)  # a second turn: 30 tokens in all
        assert run.kept(0).shape[-1] == 2 * (30 // 4) and run.cache.steps == 0


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}])
def test_sampling_reads_like_greedy_decoding(arguments):
    model = tiny.model()
    torch.manual_seed(0)
    with kvlib.method("full")(model):
        sampled = model.generate(tiny.tokens(1, 12), max_new_tokens=6, **arguments)
    torch.manual_seed(0)
    assert torch.equal(sampled, model.generate(tiny.tokens(1, 12), max_new_tokens=6, **arguments))


def test_embeddings_may_take_the_place_of_ids():
    model, ids = tiny.model(), tiny.tokens(1, 18)
    with KNORM(model) as run:
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        kept = tiny.kept(run)
        made = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=4, do_sample=False)
        assert tiny.kept(run) == kept
    assert torch.equal(made, expected[:, 18:])


def test_padding_may_stand_before_a_later_turn_if_it_starts_a_pass():
    # Two rows whose second prompts differ in length, padded on the left each time.
    model, method = tiny.model(), H2O
    turns = [[tiny.tokens(14), tiny.tokens(9, seed=1)], [tiny.tokens(4, seed=2), tiny.tokens(11, seed=3)]]
    ids, masks = zip(*(tiny.pad(rows, extra=2) for rows in turns), strict=True)
    with method(model) as run:
        model(ids[0], attention_mask=masks[0])
        logits = model(ids[1], attention_mask=torch.cat(masks, dim=1), past_key_values=run.cache).logits[:, -1]
        together = tiny.decode(model, run, logits, new=4)
    for i in range(2):
        with method(model) as run:
            model(turns[0][i][None])
            logits = model(turns[1][i][None], past_key_values=run.cache).logits[:, -1]
            made, kept = tiny.decode(model, run, logits, new=4)
        assert together[0][i].tolist() == made[0].tolist()
        assert together[1][i] == kept[0]


def test_gradients_flow_through_attention_and_not_through_scores():
    # Bare calls run with gradients unless they are told not to; the scores' graph would keep the attention matrix.
    model = tiny.build("llama-gqa").requires_grad_(True)
    stock = torch.autograd.grad(model(tiny.tokens(1, 12)).logits.sum(), [*model.parameters()])
    for method in (H2O, kvlib.method("snapkv", budget=0.5, window=4)):
        with method(model) as run:
            gradients = torch.autograd.grad(model(tiny.tokens(1, 12)).logits.sum(), [*model.parameters()])
        assert not any(x.requires_grad for layer in run.cache.layers for x in layer.tail.state.values())
        for got, expected in zip(gradients, stock, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_snapshot_is_the_stock_model_s_last_logits_and_can_be_used_many_times():
    model = tiny.model("qwen3", torch.float32)
    ids = tiny.tokens(2, 17)
    taken = kvlib.snapshot(model, ids)
    assert torch.equal(taken.logits, model(ids, logits_to_keep=1).logits[:, -1])
    before = [[x.clone() for x in layer[:3]] for layer in taken.layers]
    for method in (H2O, KNORM, H2O):
        with method(model) as run:
            run.fork(taken)
            kept = tiny.decode(model, run, taken.logits, new=4)[1]
            model.generate(ids, max_new_tokens=4, do_sample=False)
            assert tiny.kept(run) == kept
    for layer, copies in zip(taken.layers, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, copies, strict=False))
    assert model.config._attn_implementation == "sdpa"


def test_column_sums_are_computed_once_and_each_method_gets_its_own(monkeypatch):
    model = tiny.model("llama-gqa", torch.float32)
    taken, calls, plain = kvlib.snapshot(model, tiny.tokens(2, 17)), [], attention.column_sums
    monkeypatch.setattr(attention, "column_sums", lambda *a, **o: calls.append(1) or plain(*a, **o))

    class Doubling(kvlib.Evictor):
        def score(self, view):
            return view.column_sums().mul_(-2).sum(2)  # in place, in its own copy

    class Shifted(kvlib.Evictor):
        def score(self, view):
            view = copy.copy(view)
            view.key = -view.key
            return view.column_sums().sum(2)  # of other keys: neither from the shared sums nor into them

    layers = model.config.num_hidden_layers
    kept = []
    for method in (Shifted(budget=0.5), H2O, Doubling(budget=0.5), H2O):
        with method(model) as run:
            run.fork(taken)
            kept.append(tiny.kept(run))
    assert kept[1] == kept[3] and len({str(each) for each in kept}) == 3 and len(calls) == 2 * layers


def test_column_sums_of_a_window_are_computed_once_for_those_who_may_ask():
    model = tiny.model("llama-gqa", torch.float32)
    taken = kvlib.snapshot(model, tiny.tokens(2, 17))

    class Three(kvlib.Evictor):
        window, last = 5, 3

        def score(self, view):
            return view.column_sums(last=self.last).mul_(-2).sum(2)  # in place, in its own copy

    class Five(Three):
        last = 5

    class OfEachRow(Three):
        last = (3, 5)

    class Undeclared(Three):
        window = 0

    kept = []
    for method in (Three(budget=0.5), Five(budget=0.5), OfEachRow(budget=0.5), Three(budget=0.5)):
        with method(model) as run:
            run.fork(taken)
            kept.append((tiny.kept(run), len(taken.sums)))
    layers = model.config.num_hidden_layers
    three, five, mixed, again = (sets for sets, _ in kept)
    assert [size for _, size in kept] == [layers, 2 * layers, 3 * layers, 3 * layers]
    assert three == again and mixed == [three[0], five[1]] and three[1] != five[1]
    with Undeclared(budget=0.5)(model) as run, pytest.raises(ValueError, match="last=3: the method declares window=0"):
        run.fork(taken)


def test_reading_and_storing_once_is_not_copying_twice():
    # Forked caches must not hold on to the snapshot's memory, nor live ones to the pass that filled them.
    model = tiny.model()
    taken = kvlib.snapshot(model, tiny.tokens(1, 20))
    with KNORM(model) as run:
        run.fork(taken)
        properties.well_formed(run)
        borrowed = {x.untyped_storage().data_ptr() for layer in taken.layers for x in layer[:3]}
        assert not borrowed & {layer.tail.fields["key"].untyped_storage().data_ptr() for layer in run.cache.layers}


def test_a_wrong_call_says_what_python_says_and_leaves_the_block_usable():
    model, ids = tiny.model(), tiny.tokens(1, 9)
    expected = model(ids).logits
    with kvlib.method("full")(model) as run:
        for arguments, named in (((ids,), {"input_ids": ids}), ((ids,) * 40, {})):
            with pytest.raises(TypeError, match="multiple values|positional arguments"):
                model(*arguments, **named)
            assert run.step is None
        assert torch.equal(model(ids, torch.ones_like(ids)).logits, expected)
