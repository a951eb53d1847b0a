"""What every registered method has to do, on every kind of model. Registering a method is enough to be tested here."""

from dataclasses import replace
from itertools import groupby

import properties
import pytest
import tiny
import torch
import transformers
from properties import Conversation

import kvlib
from kvlib.core.method import Budgeted, budgeted

ARCHITECTURES = list(tiny.ARCHITECTURES)
BUDGETS = {  # of what shares its code with a method that has all three, those that differ most
    "full": [1.0],
    "uncomp_random": [0.3],
    "uncomp_reversed": [0.6],
    "uncomp_release": [0.6],
    "uncomp_continuous": [0.3, 12],
    "uncomp_h2o": [0.6],
    "uncomp_pyramidkv": [0.3],
    "keydiff": [0.3],
    "adaptive": [0.6],
    "combined": [0.3],
    "kv_compress": [0.3, 12],
    "kvzip": [0.3, 12],
    "elastic_cache": [0.6, 12],
    "subgen": [0.3],
    "critical_kv": [0.6],
    "defensive_kv": [0.3, 12],
    "lagkv": [0.3, 12],
    "expected_attention": [0.3, 12],
    "keyformer": [0.3, 12],
}
UNCOMP = ("uncomp", "uncomp_random", "uncomp_reversed", "uncomp_stage")
NARROW = {"window": 4, "kernel": 3}
SETTINGS = {  # their own read all of two layers and short prompts, and leave no budget of 12 to the score
    "quest": {"page": 4, "dense": 0},
    **{name: {**NARROW, "spread": 0.5} for name in UNCOMP},
    "uncomp_continuous": NARROW,
    "kv_compress": {**NARROW, "protected": 2},
    "kvzip": {"chunk": 7, "sinks": 2, "prompt_ids": (5, 6)},
    "elastic_cache": {"sinks": 2, "recent": 4},
    "subgen": {"recent": 3},
    "defensive_kv": NARROW,
    "lagkv": {"sinks": 2, "lag": 3},
    "uncomp_release": {**NARROW, "spread": 0.0, "shortest": 0.01},  # of a window of 256 tokens
}
METHODS = [
    *(
        kvlib.method(name, budget=budget, **SETTINGS.get(name, {}))
        for name in budgeted()
        for budget in BUDGETS.get(name, [0.3, 0.6, 12])
    ),
    kvlib.method("streaming_llm", budget=0.3, sinks=2, renumber=False),
    kvlib.method("knorm", budget=0.3, recent=3),
    # The defaults of windows and sinks are longer than these prompts.
    kvlib.method("snapkv", budget=0.3, window=4, kernel=3, pooling="avg"),
    kvlib.method("pyramidkv", budget=0.3, window=2, kernel=3, beta=3),
    kvlib.method("forced_sinks", budget=0.6, host="snapkv", sinks=2),
    kvlib.method("vatp", budget=0.6, host="scissorhands", sinks=2),
    kvlib.method("vatp", budget=12, host="snapkv", sinks=2, norm="l2"),
    kvlib.method("exact_error", budget=0.6, host="scissorhands", sinks=1),
    kvlib.method("exact_error", budget=0.6, host="pyramidkv"),
    kvlib.method("output_norm", budget=12, host="scissorhands"),
    kvlib.method("critical_kv", budget=0.6, host="h2o", sinks=2),
    kvlib.method("critical_kv", budget=12, host="scissorhands"),
    kvlib.method("output_norm", budget=0.6, host="snapkv", sinks=2),
    kvlib.method("anchorcoder", anchor=7, per=2, source=0, beyond=0, forced=False),
    kvlib.method("tidaldecode", budget=0.3, heads="group"),
    kvlib.method("tidaldecode", budget=12, heads="all", sinks=2, recent=0.25),
    kvlib.method("quest", budget=12, page=3, dense=1),
    kvlib.method("loki", budget=0.3, rank=3),
    kvlib.method("tokenselect", budget=12, sinks=2, recent=3, similarity=0.1),
    kvlib.method("int8"),
    kvlib.method("adaptive", budget=12, host="snapkv", floor=0.0),
    kvlib.method("combined", budget=0.6, evictor="h2o", store="int8"),
    kvlib.method("combined", budget=12, evictor="keydiff", reader="loki", read=0.2),
    kvlib.method("combined", budget=14, evictor="keydiff", store=kvlib.method("kivi", group=4, residual=8)),
    kvlib.method("combined", budget=0.6, evictor="keydiff", store=kvlib.method("think", window=4, recent=5)),
    kvlib.method("kivi", group=4, residual=8),
    kvlib.method("think", window=4, recent=5),
    kvlib.method("minicache", start=0.0, gamma=0.2),
    kvlib.method("kvsharer", pairs=((1, 0),)),
    kvlib.method("lorc"),
    kvlib.method("cskv", recent=4),
    kvlib.method("eigen_attention"),
    kvlib.method("kvzip", budget=0.6, chunk=9, layerwise=True),
    kvlib.method("subgen_sampled", samples=6, radius=0.9, per=2),
    kvlib.method("corm", window=4, recent=5),
    kvlib.method("zipvl", tau=0.8),
]
EVICTING = [method for method in METHODS if method.evicts]
# Methods that attend to everything they store (re-numbered or not) as it was, so that evicting a token is hiding it.
MERGING = ["elastic_cache"]
MASKING = [
    m
    for m in METHODS
    if not (m.own_prefill or m.hooks("decode") or m.name in MERGING)
    and (not m.hooks("attend") or m.name == "streaming_llm")
]

# One per architecture: chunks that end in a single token, that are all padding, that fit exactly, and none.
TALKS = dict(
    zip(
        ARCHITECTURES,
        [
            Conversation(first=(21, 14), second=7, chunk=5),
            Conversation(first=(17, 9, 24), second=12, extra=4, chunk=4, only_new=True),
            Conversation(first=(13,), second=26, extra=8, chunk=3, only_new=True),
            Conversation(first=(24, 5), second=1, extra=1, chunk=24),
            Conversation(first=(18, 23), second=30, new=5),
        ],
        strict=True,
    )
)


def host(method):
    return [method.host] if hasattr(method, "host") else []


def name_of(method):
    return getattr(method, "name", type(method).__name__)


def label(x):
    return "-".join([x.name, *host(x), str(getattr(x, "budget", ""))]) if hasattr(x, "name") else str(x)


def on(methods):
    return pytest.mark.parametrize("method", methods, ids=label)


def spread(name, options, methods, each=2):
    """Each method with `each` of the options at least, so that those of one name have all of them together.

    All pairs would take twice as long: what breaks on one kind of model only breaks at every budget, and the other way
    round.
    """
    pairs = []
    for start, (_, same) in enumerate(groupby(sorted(methods, key=name_of), key=name_of)):
        same = list(same)
        share = min(len(options), max(each, -(-len(options) // len(same))))
        for i, method in enumerate(same):
            pairs += [(options[(start + i * share + j) % len(options)], method) for j in range(share)]
    return pytest.mark.parametrize(f"{name}, method", pairs, ids=label)


def in_chunks(method, talk):
    """The talk, read at once by methods that drop tokens of one pass at a time: these depend on chunks by nature."""
    return replace(talk, chunk=None) if method.own_prefill else talk


everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)
# A method for each name and arguments, whatever its budget.
KINDS = list({repr(replace(m, budget=1.0) if hasattr(m, "budget") else m): m for m in METHODS}.values())


def test_attention_of_the_models_is_not_uniform():
    # With uniform attention scores tie, any keep-set is as good as any other, and the tests below test little.
    for name in ARCHITECTURES:
        model = tiny.build(name, attn_implementation="eager")
        for weights in model(tiny.tokens(1, 40), output_attentions=True).attentions:
            rows = weights[..., 20:, :]
            entropy = torch.special.entr(rows).sum(-1) / torch.arange(21, 41).log()
            assert entropy.mean() < 0.75
    norms = torch.linalg.vector_norm(properties.teacher_keys(tiny.model("qwen3")), dim=-1)
    assert norms.std() / norms.mean() > 0.05


@everywhere
@pytest.mark.parametrize("name", budgeted())
def test_full_budget_is_the_stock_model(architecture, name):
    chunk = [None, 5, 20][(ARCHITECTURES.index(architecture) + len(name)) % 3]
    model = tiny.model(architecture, torch.float32)
    first, second = [tiny.tokens(21), tiny.tokens(21, seed=1)], [tiny.tokens(6, seed=2), tiny.tokens(6, seed=3)]
    before = tiny.generate(model, None, first, chunk=chunk)
    after = tiny.generate(model, None, second, chunk=chunk, before=before)
    with kvlib.method(name, budget=1.0)(model) as run:
        turn = tiny.generate(model, run, first, chunk=chunk)
        assert torch.equal(turn.logits, before.logits)
        assert turn.kept == [[[[*range(24)]] * model.config.num_key_value_heads] * 2] * 2  # not the last sampled token
        turn = tiny.generate(model, run, second, chunk=chunk, before=turn)
        assert torch.equal(turn.logits, after.logits)
        assert run.stored_bytes() == run.full_bytes()
    assert torch.equal(turn.ids, after.ids)


@spread("architecture", ARCHITECTURES, METHODS)
def test_padding_chunks_and_company_change_nothing(architecture, method):
    properties.same_alone_and_in_company(tiny.model(architecture), method, in_chunks(method, TALKS[architecture]))


@pytest.mark.parametrize(
    "name, config",
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": None, "bos_token_id": None}),
        ("PhiForCausalLM",
         {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("DeepseekV3ForCausalLM",
         {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
          "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 6}),
    ],
)  # fmt: skip
def test_other_families(name, config):
    # Learned positions; rotation of half a head; values of another width than keys.
    cls, rows = getattr(transformers, name), [tiny.tokens(18), tiny.tokens(11, seed=1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(vocab_size=64, initializer_range=0.3, **config)).double().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    stock = tiny.generate(model, None, rows, new=6, extra=2)
    assert torch.equal(tiny.once(model, kvlib.method("full"), rows, new=6, extra=2).tokens, stock.tokens)
    talk = Conversation(first=(18, 11), second=5, extra=2, chunk=4)
    properties.same_alone_and_in_company(model, kvlib.method("h2o", budget=0.5), talk)


@spread("architecture", ARCHITECTURES, METHODS)
def test_fork_continues_like_the_live_run(architecture, method):
    model, talk = tiny.model(architecture), TALKS[architecture]
    if method.own_prefill:
        with (
            method(model) as run,
            pytest.raises(ValueError, match="changes the prefill and cannot start from a snapshot"),
        ):
            run.fork(kvlib.snapshot(model, *tiny.pad(talk.rows(0))))
    else:
        properties.fork_continues_like_live(model, method, talk)


@on(KINDS)
def test_passes_and_runs_leave_nothing_to_the_collector(method):
    properties.leaves_nothing_to_the_collector(tiny.model("llama-gqa"), method, TALKS["llama-gqa"])


@spread("architecture", ARCHITECTURES, MASKING)
def test_evicting_is_hiding(architecture, method):
    model = tiny.model(architecture)
    passes = [tiny.tokens(1, length, seed=length) for length in (30, 1, 1, 1, 9, 1, 1)]
    logits, visible = properties.teacher_forced(model, method, passes)
    assert method.evicts == (not torch.equal(visible[0], torch.ones_like(visible[0]).tril()))
    hidden = properties.masked_logits(model, torch.cat(passes, dim=1), visible, properties.frequencies(model, method))
    torch.testing.assert_close(logits, hidden, rtol=0, atol=1e-10)


@spread("architecture", ["llama-gqa", "qwen3"], METHODS, each=1)
def test_beams_have_their_own_history(architecture, method):
    rows = [tiny.tokens(19), tiny.tokens(12, seed=1)]
    properties.beams_have_their_own_history(tiny.model(architecture), method, rows, beams=3, new=5)


@everywhere
@pytest.mark.parametrize("name", budgeted())
def test_full_budget_beams_are_stock_beams(architecture, name):
    model = tiny.model(architecture)
    ids, mask = tiny.pad([tiny.tokens(19), tiny.tokens(12, seed=1)])
    arguments = {
        "attention_mask": mask,
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    stock = model.generate(ids, **arguments)
    with kvlib.method(name, budget=1.0)(model):
        assert torch.equal(model.generate(ids, **arguments), stock)


def budgeted(method, length: int) -> int:
    """Tokens of a prompt that a head keeps, on average over layers."""
    if not method.evicts:
        return length
    if isinstance(method.budget, int):
        return method.budget
    parts = 2 if {"h2o", "scissorhands", "uncomp_h2o", "adaptive"} & {method.name, *host(method)} else 1
    return parts * int(method.budget / parts * length)


# What stores otherwise, or has no budget, has tests of its bytes of its own.
EXACT = [m for m in METHODS if isinstance(m, Budgeted) and not (m.own_prefill or m.hooks("decode"))]


@spread("architecture", ARCHITECTURES, EXACT)
def test_bytes_are_what_the_budget_says(architecture, method):
    model, rows = tiny.model(architecture), [tiny.tokens(40), tiny.tokens(35, seed=1)]
    with method(model) as run:
        logits = model(*tiny.pad(rows)).logits[:, -1]
        properties.well_formed(run)
        prompt = run.stored_bytes()
        assert run.full_bytes() == 75 * properties.token_bytes(model)
        assert prompt == sum(budgeted(method, len(row)) for row in rows) * properties.token_bytes(model)
        for step in range(1, 4):
            tiny.decode(model, run, logits, new=2)
            properties.well_formed(run)
            grown = 0 if method.evicts_in_decode and method.evicts else step * len(rows) * properties.token_bytes(model)
            assert run.stored_bytes() == prompt + grown
            assert run.full_bytes() == (75 + 2 * step) * properties.token_bytes(model)
            groups = model.config.num_attention_heads // model.config.num_key_value_heads
            # each head of a group may read a token, and choosing the keys of all
            most = groups + 0.5 if method.hooks("attend") and method.name != "streaming_llm" else 1
            assert 0 < run.read_bytes() <= most * run.stored_bytes()


@on(METHODS)
def test_nothing_leaks_from_one_sample_to_the_next(method):
    model = tiny.model()
    sample, other = (
        [tiny.tokens(25)],
        [tiny.tokens(3, seed=1), tiny.tokens(2, seed=2)],
    )  # `other` clamps whatever can be clamped
    turns = []
    with method(model) as run:
        for rows in (sample, sample, other, sample):
            turns.append((tiny.generate(model, run, rows), run.clamped, run.stored_bytes(), run.state_bytes()))
    for rows in (other, sample):
        with method(model) as run:
            turns.append((tiny.generate(model, run, rows), run.clamped, run.stored_bytes(), run.state_bytes()))
    for first, second in ((0, 1), (0, 3), (0, 5), (2, 4)):
        (a, clamped, *sizes), (b, clamped_again, *sizes_again) = turns[first], turns[second]
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.kept == b.kept
        assert {k: v.tolist() for k, v in clamped.items()} == {k: v.tolist() for k, v in clamped_again.items()}
        assert sizes == sizes_again


@spread("length", [1, 2, 3, 5], METHODS)
def test_prompts_of_a_few_tokens(length, method):
    properties.same_alone_and_in_company(
        tiny.model(), method, in_chunks(method, Conversation(first=(length, 6), second=1, extra=2, chunk=2))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@spread("architecture", ["llama-gqa", "qwen3"], MASKING, each=1)
def test_half_precision_errs_like_the_stock_model(architecture, dtype, method):
    # The keep-sets of the half-precision run are imposed on float32, since rounding may decide a near-tie either way.
    half, passes = tiny.model(architecture, dtype), [tiny.tokens(1, n, seed=n) for n in (30, 1, 1, 1)]
    single, ids = tiny.build(architecture, dtype).float(), torch.cat(passes, dim=1)
    logits, visible = properties.teacher_forced(half, method, passes)
    frequencies = properties.frequencies(single, method)
    exact = properties.masked_logits(single, ids, visible, frequencies)
    plain = properties.masked_logits(half, ids, visible, frequencies)
    assert logits.isfinite().all()
    assert (logits - exact).abs().max() <= 2 * (plain - exact).abs().max()


@on([method for method in EVICTING if not (method.own_prefill or method.hooks("decode"))])
def test_large_keys_do_not_overflow_in_float16(method):
    # Powers of two change no digit of attention or of ratios of norms, so the same tokens must stay; squares of these
    # keys exceed the largest float16.
    model = tiny.build("llama-gqa", torch.float16)
    before = tiny.once(model, method, [tiny.tokens(40)])
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight *= 128
        layer.self_attn.q_proj.weight /= 128
    with method(model) as run:
        after = tiny.generate(model, run, [tiny.tokens(40)])
        layer = run.cache.layers[0]
        keys = layer.tail.rectangle(layer.tail.fields["key"])[layer.position_rectangle() >= 0]  # room may hold anything
        assert keys.norm(dim=-1, dtype=torch.float32).max() > 256
    assert after.logits.isfinite().all()
    assert after.kept == before.kept
