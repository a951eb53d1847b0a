"""Bad input: an error that says what is wrong, before work starts."""

import math

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, StaticCache

import kvlib
from kvlib.core.method import budgeted

KNORM = kvlib.method("knorm", budget=0.5)
GREEDY = {"max_new_tokens": 2, "do_sample": False}
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def refused(error, message, model, *args, method=KNORM, **arguments):
    """`generate` inside a block must raise, and the next one must work."""
    with method(model):
        with pytest.raises(error, match=message):
            model.generate(*args, **{**GREEDY, **arguments})
        model.generate(tiny.tokens(1, 6), **GREEDY)


# Methods and their arguments


@pytest.mark.parametrize("name", sorted({*budgeted()} - {"full"}))
@pytest.mark.parametrize(
    "budget", [0, 0.0, -1, -0.5, 1.5, math.nan, math.inf, True, False, "0.5", None, (0.5,)], ids=str
)
def test_budgets_out_of_range(name, budget):
    with pytest.raises(ValueError, match=r"budget=.*: a fraction in \(0, 1\] or a whole number of tokens >= 1"):
        kvlib.method(name, budget=budget)


@pytest.mark.parametrize("budget", [0.5, 1, 20, True, "1.0"], ids=repr)
def test_the_full_cache_has_one_budget(budget):
    with pytest.raises(ValueError, match=r"budget=.*: the full cache keeps all, 1\.0"):
        kvlib.method("full", budget=budget)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("random", {"seed": 1.5}, r"seed=1\.5: a whole number in"),
        ("random", {"seed": "1"}, r"seed='1': "),
        ("random", {"seed": -1}, r"seed=-1: "),
        ("streaming_llm", {"sinks": -1}, r"sinks=-1: a number of tokens >= 0"),
        ("streaming_llm", {"sinks": 1.5}, r"sinks=1\.5: a number of tokens >= 0"),
        ("streaming_llm", {"sinks": "4"}, r"sinks='4': a number of tokens >= 0"),
        ("streaming_llm", {"sinks": True}, r"sinks=True: a number of tokens >= 0"),
        ("h2o", {"budget": 1}, r"budget=1: room for a heavy and a recent token, >= 2"),
        ("snapkv", {"window": 0}, r"window=0: a number of queries >= 1"),
        ("snapkv", {"window": 2.0}, r"window=2\.0: a number of queries >= 1"),
        ("snapkv", {"kernel": 4}, r"kernel=4: an odd number of tokens"),
        ("snapkv", {"kernel": -1}, r"kernel=-1: an odd number of tokens"),
        ("snapkv", {"kernel": "7"}, r"kernel='7': an odd number of tokens"),
        ("snapkv", {"pooling": "mean"}, r"pooling='mean': 'max' or 'avg'"),
        ("scissorhands", {"budget": 1}, r"budget=1: room for a heavy and a recent token, >= 2"),
        ("pyramidkv", {"beta": 0}, r"beta=0: a whole number >= 1"),
        ("pyramidkv", {"beta": 2.5}, r"beta=2\.5: a whole number >= 1"),
        ("pyramidkv", {"window": 0}, r"window=0: a number of queries >= 1"),
        ("vatp", {"norm": "l3"}, r"norm='l3': 'l1', 'l2' or 'linf'"),
        ("vatp", {"norm": 1}, r"norm=1: 'l1', 'l2' or 'linf'"),
        ("vatp", {"norm": ["l1"]}, r"norm=\['l1'\]: 'l1', 'l2' or 'linf'"),
        *(
            (name, arguments, message)
            for name in ("forced_sinks", "vatp", "exact_error", "output_norm")
            for arguments, message in [
                ({"host": "h20"}, r"unknown host 'h20'; did you mean 'h2o'\?"),
                ({"host": "SnapKV"}, r"unknown host 'SnapKV'; did you mean 'snapkv'\?"),
                ({"host": "knorm"}, r"unknown host 'knorm'; known: h2o, scissorhands, snapkv, pyramidkv"),
                ({"host": None}, r"unknown host None; known: "),
                ({"host": ["h2o"]}, r"unknown host \['h2o'\]; "),
                ({"sinks": -1}, r"sinks=-1: a number of tokens >= 0"),
                ({"sinks": 4.0}, r"sinks=4\.0: a number of tokens >= 0"),
                ({"sinks": True}, r"sinks=True: a number of tokens >= 0"),
                ({"sinks": None}, r"sinks=None: a number of tokens >= 0"),
                ({"budget": 1}, r"budget=1: room for a heavy and a recent token, >= 2"),
                ({"budget": 1, "host": "scissorhands"}, r"budget=1: room for a heavy and a recent token, >= 2"),
            ]
        ),
    ],
)
def test_arguments_that_can_never_work(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method(name, **arguments)


@pytest.mark.parametrize("name", sorted(kvlib.METHODS))
def test_unknown_arguments(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'bugdet'"):
        kvlib.method(name, bugdet=0.5)


@pytest.mark.parametrize(
    "name, near",
    [
        ("snapkw", "did you mean 'snapkv'"),
        ("H2O", "did you mean 'h2o'"),
        ("zzzzzz", "known: adakv, adaptive, anchorcoder, combined, corm, "),
    ],
)
def test_unknown_methods(name, near):
    with pytest.raises(ValueError, match=f"unknown method '{name}'; .*{near}"):
        kvlib.method(name)


def test_two_classes_cannot_share_a_name():
    with pytest.raises(ValueError, match=r"method 'knorm' is already registered by kvlib.methods.baselines.KNorm"):

        @kvlib.register("knorm")
        class Other(kvlib.Evictor):
            pass

    assert kvlib.METHODS["knorm"].__module__ == "kvlib.methods.baselines"


def test_a_class_may_be_defined_again(monkeypatch):
    # As happens when a notebook cell runs twice.
    monkeypatch.setattr("kvlib.core.method.METHODS", dict(kvlib.METHODS))
    for keep in ("first", "second"):

        @kvlib.register("mine")
        class Mine(kvlib.Evictor):
            which: str = keep

        assert Mine(0.5).which == keep


# Models


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4},
         "T5ForConditionalGeneration is an encoder-decoder; kvlib compresses decoder-only models"),
        ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
         "MambaForCausalLM does not use transformers' attention interface, which kvlib needs"),
        ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
         "FalconAttention does not use transformers' attention interface, which kvlib needs"),
        ("Lfm2ForCausalLM", {**SIZE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
         r"Lfm2ForCausalLM: 1 attention modules \(Lfm2Attention\) in 2 layers"),
    ],
)  # fmt: skip
def test_models_that_cannot_work(name, config, message):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**{"vocab_size": 64, **config}))
    with pytest.raises(ValueError, match=message):
        KNORM(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8},
         "Gemma2Attention uses `softcap`, which kvlib does not support"),
        ("GptOssForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2},
         "GptOssAttention uses `s_aux`, which kvlib does not support"),
    ],
)  # fmt: skip
def test_attention_that_is_not_reproduced(name, config, message):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SIZE, **config))
    with KNORM(model), pytest.raises(ValueError, match=message):
        model(tiny.tokens(1, 5))


@pytest.mark.parametrize("extra", [0, 5])
def test_sliding_windows_hold_until_they_would_slide(extra):
    # The window is 16 tokens, and padding is not a token.
    model = tiny.model("mistral", sliding_window=16)
    rows = [tiny.tokens(13), tiny.tokens(8, seed=1)]
    stock = tiny.generate(model, None, rows, new=4)
    with kvlib.method("full")(model) as run:
        assert torch.equal(tiny.generate(model, run, rows, new=4, extra=extra).tokens, stock.tokens)
        with pytest.raises(ValueError, match="17 tokens exceed the sliding window of 16 in layer 0"):
            tiny.generate(model, run, rows, new=5, extra=extra)
            tiny.generate(model, run, rows, new=6, extra=extra)


class Wrapper(torch.nn.Module):
    """Hands on every attribute, as `torch.compile` and the parallel wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inside" else getattr(self.inside, name)


def test_wrapped_models():
    model = tiny.build("llama-gqa")
    with pytest.raises(ValueError, match="Wrapper is no transformers model: pass the one inside it"):
        KNORM(Wrapper(model))
    assert "generate" not in vars(model)


@pytest.mark.parametrize("call", [lambda model: model.model, lambda model: model.forward], ids=["inner", "forward"])
def test_calls_that_bypass_the_block(call):
    model = tiny.model()
    with KNORM(model) as run:
        for _ in range(2):  # before the first pass, and when one has left its cache behind
            with pytest.raises(RuntimeError, match="call the model itself, not model.model or model.forward"):
                call(model)(tiny.tokens(1, 6))
            model(tiny.tokens(1, 6))
        assert run.cache.get_seq_length() == 6


# Prompts, masks, positions


def test_prompts_longer_than_the_model_s_window():
    model = tiny.model("llama-gqa", max_position_embeddings=24)
    message = "the prompt has 25 tokens, the model's window is 24"
    refused(ValueError, message, model, tiny.tokens(1, 25))
    refused(ValueError, message, model, tiny.tokens(1, 25), prefill_chunk_size=7)
    ids, mask = tiny.pad([tiny.tokens(24), tiny.tokens(3)], extra=4)  # padding does not count
    with KNORM(model):
        model.generate(ids, attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_right_padding(chunk):
    ids = tiny.tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    refused(
        ValueError,
        "padding after a real token: pad on the left",
        tiny.model(),
        ids,
        attention_mask=mask,
        prefill_chunk_size=chunk,
        max_new_tokens=1,
    )


@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_without_a_token(chunk):
    mask = torch.tensor([[1] * 6, [0] * 6])
    refused(
        ValueError,
        "row 1 has no real token",
        tiny.model(),
        tiny.tokens(2, 6),
        attention_mask=mask,
        prefill_chunk_size=chunk,
    )


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (2, 6), (1, 5)], ids=str)
def test_masks_of_other_shapes(shape):
    model = tiny.model()
    message = r"attention_mask of shape .*: \(batch, tokens seen so far\) is needed, 1 = real"
    with KNORM(model), pytest.raises(ValueError, match=message):
        model(tiny.tokens(1, 6), attention_mask=torch.ones(shape))


def test_padding_inside_a_later_turn():
    model, rows = tiny.model(), [tiny.tokens(9), tiny.tokens(5, seed=1)]
    with KNORM(model) as run:
        turn = tiny.generate(model, run, rows)
        with pytest.raises(ValueError, match="in a later turn of a batch all rows need new tokens of the same number"):
            tiny.generate(model, run, rows, before=turn)


def test_masks_that_hide_stored_tokens():
    model, (ids, mask) = tiny.model(), tiny.pad([tiny.tokens(6), tiny.tokens(4, seed=1)])
    message = "attention_mask differs from earlier passes over tokens that are already stored"
    with KNORM(model) as run:
        model(ids, attention_mask=mask)
        whole = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        for row, column, value in ((0, 0, 0), (1, 5, 0), (1, 0, 1)):
            other = whole.clone()
            other[row, column] = value
            with pytest.raises(ValueError, match=message):
                model(ids[:, :1], attention_mask=other, past_key_values=run.cache)
        assert run.cache.get_seq_length() == 6
        model(ids[:, :1], attention_mask=whole, past_key_values=run.cache)


def test_masks_that_hide_the_pads_behind_an_early_end():
    # `generate` shows the model pads behind a row that has ended; they are stored, and count as read.
    model, rows = tiny.model(), [tiny.tokens(6), tiny.tokens(6, seed=1)]
    free = tiny.once(model, KNORM, rows, new=5).tokens.tolist()
    end = next(token for token in free[0][:2] if token not in free[1])
    ids = torch.stack(rows)
    with KNORM(model) as run:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=end)
        assert made[0, -1] == model.generation_config.pad_token_id
        more = torch.cat([made, tiny.tokens(2, 3, seed=2)], dim=1)
        with pytest.raises(ValueError, match="attention_mask differs from earlier passes over tokens that are already"):
            model.generate(more, attention_mask=(more != 0).long(), past_key_values=run.cache, **GREEDY)
        model.generate(more, attention_mask=torch.ones_like(more), past_key_values=run.cache, **GREEDY)


@pytest.mark.parametrize(
    "positions",
    [torch.arange(1, 7)[None], torch.arange(6).flip(0)[None], torch.arange(1, 7).expand(3, 1, 6)],
    ids=["late", "reversed", "3d"],
)
def test_positions_that_do_not_count_tokens(positions):
    model = tiny.model()
    with KNORM(model), pytest.raises(ValueError, match="position_ids must count the real tokens of each row"):
        model(tiny.tokens(1, 6), position_ids=positions)


def test_positions_that_ignore_padding():
    model = tiny.model()
    ids, mask = tiny.pad([tiny.tokens(6), tiny.tokens(4)])
    with KNORM(model), pytest.raises(ValueError, match="position_ids must count the real tokens of each row"):
        model(ids, attention_mask=mask, position_ids=torch.arange(6).expand(2, 6))


# Ways to generate


def test_assisted_decoding():
    message = "assisted decoding rolls the cache back, which a compressed cache cannot do"
    refused(ValueError, message, tiny.model(), tiny.tokens(1, 6), assistant_model=tiny.model("mistral"))
    refused(ValueError, message, tiny.model(), tiny.tokens(1, 6), prompt_lookup_num_tokens=2)
    config = transformers.GenerationConfig(prompt_lookup_num_tokens=2)
    refused(ValueError, message, tiny.model(), tiny.tokens(1, 6), generation_config=config)


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "guidance_scale"])
def test_options_in_a_positional_configuration_are_seen_before_the_model_runs(option):
    model, passes = tiny.build("llama-gqa"), []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    config = transformers.GenerationConfig(**{option: 2}, **GREEDY)
    with KNORM(model):
        with pytest.raises(ValueError, match="assisted decoding rolls the cache back|guidance_scale reads a second"):
            model.generate(tiny.tokens(1, 6), config)
        assert not passes
        model.generate(tiny.tokens(1, 6), transformers.GenerationConfig(**GREEDY))
        assert len(passes) == 2


def test_guidance():
    model, ids = tiny.model(), tiny.tokens(1, 6)
    message = "guidance_scale reads a second prompt with a cache of its own, which kvlib does not support"
    refused(ValueError, message, model, ids, guidance_scale=1.5)
    config = transformers.GenerationConfig(guidance_scale=0.5)
    refused(ValueError, message, model, ids, generation_config=config)
    with KNORM(model):
        expected = model.generate(ids, **GREEDY)
        for scale in (None, 1, 1.0):
            assert torch.equal(model.generate(ids, guidance_scale=scale, **GREEDY), expected)


def test_attention_weights():
    message = "output_attentions: inside the block attention weights are never held as a whole"
    refused(ValueError, message, tiny.model(), tiny.tokens(1, 6), output_attentions=True, return_dict_in_generate=True)
    with KNORM(tiny.model()), pytest.raises(ValueError, match=message):
        tiny.model()(tiny.tokens(1, 6), output_attentions=True)
    model = tiny.build("llama-gqa", output_attentions=True, attn_implementation="eager")
    with KNORM(model), pytest.raises(ValueError, match=message):
        model(tiny.tokens(1, 6))


def test_no_cache():
    model = tiny.model()
    refused(ValueError, "use_cache=False leaves nothing to compress", model, tiny.tokens(1, 6), use_cache=False)
    with KNORM(model), pytest.raises(ValueError, match="use_cache=False leaves nothing to compress"):
        model(tiny.tokens(1, 6), use_cache=False)
    uncached = tiny.build("llama-gqa", use_cache=False)
    with KNORM(uncached), pytest.raises(ValueError, match="use_cache=False leaves nothing to compress"):
        uncached(tiny.tokens(1, 6))


# Caches


def test_foreign_caches():
    model, filled = tiny.model(), DynamicCache()
    model(tiny.tokens(1, 6), past_key_values=filled)
    refused(ValueError, "a cache filled outside kvlib cannot be continued; start without past_key_values",
            model, tiny.tokens(1, 9), past_key_values=filled)  # fmt: skip
    assert type(filled) is DynamicCache and filled.get_seq_length() == 6
    refused(ValueError, "kvlib replaces a DynamicCache, got StaticCache; drop `cache_implementation`",
            model, tiny.tokens(1, 9), cache_implementation="static")  # fmt: skip
    static = StaticCache(config=model.config, max_cache_len=16)
    with KNORM(model), pytest.raises(ValueError, match="kvlib replaces a DynamicCache, got StaticCache"):
        model(tiny.tokens(1, 6), past_key_values=static)


def test_offloaded_caches():
    message = "kvlib replaces a DynamicCache, got an offloaded cache; drop `cache_implementation`"
    model, ids = tiny.model(), tiny.tokens(1, 6)
    refused(ValueError, message, model, ids, cache_implementation="offloaded")
    refused(ValueError, message, model, ids, past_key_values=DynamicCache(offloading=True))
    with KNORM(model), pytest.raises(ValueError, match=message):
        model(ids, past_key_values=DynamicCache(offloading=True))


@pytest.mark.parametrize("seen", [0, 6])
def test_caches_of_an_interrupted_pass(seen):
    model, ids = tiny.build("llama-gqa"), tiny.tokens(1, 12)

    def interrupt(*_):
        raise KeyboardInterrupt

    with KNORM(model) as run:
        cache = model(ids[:, :seen]).past_key_values if seen else None
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, seen:9], past_key_values=cache)
        hook.remove()
        message = "a forward pass over this cache was interrupted half-way; start a new one"
        with pytest.raises(ValueError, match=message):
            model(ids[:, 9:], past_key_values=run.cache)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, past_key_values=run.cache, **GREEDY)
        again = tiny.generate(model, run, [ids[0]])
    assert again.kept == tiny.once(model, KNORM, [ids[0]]).kept


@pytest.mark.parametrize("other", [kvlib.method("h2o", budget=0.5), kvlib.method("knorm", budget=0.4)], ids=repr)
def test_caches_of_other_methods(other):
    model = tiny.model()
    with other(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(9)])
    refused(ValueError, r"the cache was filled by .*, not by KNorm\(budget=0\.5, .*\); start without past_key_values",
            model, turn.ids, past_key_values=run.cache)  # fmt: skip


def test_caches_of_other_models():
    with KNORM(tiny.model(num_hidden_layers=1)) as run:
        tiny.model(num_hidden_layers=1)(tiny.tokens(1, 9))
    refused(
        ValueError, "the cache has 1 layers, the model 2", tiny.model(), tiny.tokens(1, 12), past_key_values=run.cache
    )


def test_new_ids_without_a_mask_over_the_past():
    # transformers takes ids as long as their mask for the whole conversation, and would cut all of them off.
    model = tiny.model()
    with KNORM(model) as run:
        tiny.generate(model, run, [tiny.tokens(9)])
        with pytest.raises(
            ValueError, match="5 columns, but the cache has seen 12: pass all ids, or new ones with a mask over all"
        ):
            model.generate(tiny.tokens(1, 5), past_key_values=run.cache, **GREEDY)


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_rows_that_a_cache_does_not_have(arguments):
    """`generate` repeats the rows of a prompt, and leaves those of a cache alone."""
    model = tiny.model()
    with KNORM(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(9)])
        options = {"max_new_tokens": 2, "do_sample": False, **arguments}
        with pytest.raises(ValueError, match="3 rows, but the cache has 1; num_beams and num_return_sequences repeat"):
            model.generate(turn.ids, past_key_values=run.cache, **options)
        run.cache.batch_repeat_interleave(3)
        assert len(model.generate(turn.ids, past_key_values=run.cache, **options)) in (1, 3)


def test_gradient_checkpointing():
    model, ids = tiny.build("llama-gqa").train(), tiny.tokens(1, 9)
    model.gradient_checkpointing_enable()
    with KNORM(model) as run:
        with pytest.raises(
            ValueError, match="gradient checkpointing runs layers twice, .*gradient_checkpointing_disable"
        ):
            model(ids)
        assert run.cache is None
        model.eval()
        model(ids)  # layers run once
        model.train().gradient_checkpointing_disable()
        model(ids)


# What a prompt makes infeasible gives way, and says so


@pytest.mark.parametrize(
    "method, tokens, clamped",
    [
        (kvlib.method("knorm", budget=0.1), 9, {"budget": 1}),
        (kvlib.method("knorm", budget=0.1), 10, {}),
        (kvlib.method("knorm", budget=50), 10, {}),
        (kvlib.method("streaming_llm", budget=0.5), 10, {}),
        (kvlib.method("streaming_llm", budget=0.5), 8, {"sinks": 3}),
        (kvlib.method("streaming_llm", budget=0.5), 1, {"budget": 1}),
        (kvlib.method("h2o", budget=0.5), 4, {}),
        (kvlib.method("h2o", budget=0.5), 3, {"budget": 1}),
        (kvlib.method("snapkv", budget=0.5, window=2), 8, {}),
        (kvlib.method("snapkv", budget=0.5, window=2), 7, {"window": 1}),
        (kvlib.method("snapkv", budget=0.5), 4, {"window": 1}),
        (kvlib.method("scissorhands", budget=0.5), 24, {}),
        (kvlib.method("scissorhands", budget=0.5), 23, {"recent": 9}),
        (kvlib.method("pyramidkv", budget=0.5, window=2), 8, {}),
        (kvlib.method("pyramidkv", budget=0.5, window=2), 7, {"window": 1}),
        (kvlib.method("tova", budget=0.1), 9, {"budget": 1}),
        (kvlib.method("vatp", budget=0.5), 84, {}),
        (kvlib.method("vatp", budget=0.5), 83, {"sinks": 19}),
        (kvlib.method("vatp", budget=0.5, host="scissorhands"), 23, {"recent": 9, "sinks": 0}),
        (kvlib.method("output_norm", budget=0.5), 4, {}),
    ],
    ids=lambda x: f"{x.name}-{x.budget}" if isinstance(x, kvlib.Method) else None,
)
def test_what_gives_way_is_flagged(method, tokens, clamped):
    model = tiny.model()
    with method(model) as run:
        model(tiny.tokens(1, tokens))
        assert {name: values.tolist() for name, values in run.clamped.items()} == {
            name: [value] for name, value in clamped.items()
        }
        model(tiny.tokens(1, 200))
        assert run.clamped == {}  # the next prompt starts afresh


def test_clamping_is_flagged_per_row():
    model = tiny.model()
    with kvlib.method("streaming_llm", budget=0.5)(model) as run:
        model(*tiny.pad([tiny.tokens(20), tiny.tokens(4, seed=1)]))
    assert run.clamped["sinks"].tolist() == [4, 1]


# What was found later


def test_what_a_configuration_leaves_open_is_the_model_s():
    model = tiny.build("llama-gqa")
    model.generation_config.guidance_scale = 2.0
    given = transformers.GenerationConfig(max_new_tokens=2, do_sample=False)
    with (
        kvlib.method("knorm", budget=0.5)(model),
        pytest.raises(ValueError, match="guidance_scale reads a second prompt"),
    ):
        model.generate(tiny.tokens(1, 6), generation_config=given)


def test_an_eviction_that_failed_leaves_no_usable_cache():
    class Fails(kvlib.Evictor):
        def score(self, view):
            if view.layer_idx == 1:  # every layer has stored its tokens by then
                raise RuntimeError("in the last layer")
            return view.positions.float()

    model, ids = tiny.model(), tiny.tokens(1, 6)
    with Fails(0.5)(model) as run:
        with pytest.raises(RuntimeError, match="in the last layer"):
            model(ids)
        with pytest.raises(ValueError, match="interrupted half-way"):
            model(ids[:, :1], past_key_values=run.cache)
