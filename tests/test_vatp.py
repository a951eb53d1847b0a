"""VATP and its relatives against their executable specification, the laws they obey, and mutants that break them.

T1 to T19 are the tests that the specification of the paper asks for. T4, T5 and T16 are in `test_attention.py` and
`test_gate.py`, T18 (hiding is evicting), T14 (padding) and T15 (samples) also hold for every method in
`test_generic.py`; recorded numbers of the authors' code are in `test_parity_vatp.py`.
"""

import dataclasses
from functools import cache, cached_property, partial

import numpy as np
import pytest
import reference
import tiny
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from reference import HOSTS, VOCABULARY, hosted, simulate, tiny_llama
from test_baselines import decode, finds_no_trace, lists, prompt

import kvlib
from kvlib.methods import baselines, vatp

few = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
llama = cache(tiny_llama)
grouped = partial(tiny.build, "llama-gqa", vocab_size=VOCABULARY)
WORTH = {
    ("forced_sinks",): reference.attention,
    ("vatp", "l1"): reference.attention_by_norm(1),
    ("vatp", "l2"): reference.attention_by_norm(2),
    ("vatp", "linf"): reference.attention_by_norm(np.inf),
    ("exact_error",): reference.eviction_error,
    ("output_norm",): reference.attention_by_output_norm,
}
NAMES = ["forced_sinks", "vatp", "exact_error", "output_norm"]
KINDS = [kind for kind in WORTH if kind[1:] in ((), ("l1",))]

every_kind = pytest.mark.parametrize("kind", WORTH, ids="-".join)
kinds = pytest.mark.parametrize("kind", KINDS, ids="-".join)
names = pytest.mark.parametrize("name", NAMES)
hosts = pytest.mark.parametrize("host", HOSTS)


def make(kind, budget, host="h2o", sinks=4):
    name, *norm = kind
    return kvlib.method(name, budget=budget, host=host, sinks=sinks, **({"norm": norm[0]} if norm else {}))


def follows(method, model, prompts, steps, worth):
    """Every row keeps and computes, at every step, what the specification says."""
    logits, kept, run = decode(method, model, prompts, steps)
    for row, ids in enumerate(prompts):
        expected = simulate(model, ids, steps, hosted(method.host, method.budget, worth, method.sinks))
        assert lists(kept, row) == expected.kept
        assert torch.stack(logits)[:, row].argmax(-1).tolist() == expected.ids
        np.testing.assert_allclose(torch.stack(logits)[:, row], expected.logits, rtol=0, atol=1e-9)
    return run


# The specification


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@hosts
@every_kind
def test_equals_reference(kind, host, kv_heads):
    model = llama(kv_heads)

    # A budget of one token per part, and one that the prompt does not reach but decoding does
    @few
    @example(0.01, 4, [13, 30], 2, 0)
    @example(9, 0, [1, 6], 5, 1)
    @example(0.5, 20, [32], 3, 2)
    @given(
        st.floats(0.01, 0.99) | st.integers(2, 40),
        st.integers(0, 24),
        st.lists(st.integers(1, 32), min_size=1, max_size=2),
        st.integers(0, 4),
        st.integers(0, 99),
    )
    def check(budget, sinks, lengths, steps, seed):
        prompts = [prompt(length, seed + row) for row, length in enumerate(lengths)]
        follows(make(kind, budget, host, sinks), model, prompts, steps, WORTH[kind])

    check()


@kinds
@pytest.mark.parametrize("host", [pytest.param(h, marks=pytest.mark.deep if h != "h2o" else ()) for h in HOSTS])
def test_equals_reference_at_budgets_from_tiny_to_all_but_one(kind, host):
    for budget in (2, 7, 31, 0.05, 0.35, 0.7, 47.5 / 48):
        follows(make(kind, budget, host), llama(2, layers=3), [prompt(48)], 1, WORTH[kind])


def test_sinks_are_20_for_vatp_and_none_for_scores_that_see_them():
    assert [kvlib.method(name).sinks for name in NAMES] == [20, 20, 0, 0]
    assert [kvlib.method(name).host for name in NAMES] == ["h2o"] * 4
    assert kvlib.method("vatp").norm == "l1"


@names
@hosts
def test_a_host_decides_when_to_evict_and_what_to_look_at(name, host):
    method, own = kvlib.method(name, budget=0.3, host=host), kvlib.method(host, budget=0.3)
    assert (method.evicts_in_decode, method.window) == (own.evicts_in_decode, own.window)
    assert method.hosted == own
    assert method == kvlib.method(name, budget=0.3, host=host) and hash(method) == hash(dataclasses.replace(method))


@hosts
def test_without_sinks_the_control_is_its_host(host):
    rows = [prompt(40), prompt(23, seed=1)]
    for budget in (0.4, 12):
        control = decode(kvlib.method("forced_sinks", budget=budget, host=host, sinks=0), llama(2), rows, 4)
        own = decode(kvlib.method(host, budget=budget), llama(2), rows, 4)
        assert str(control[1]) == str(own[1]) and str(control[2].clamped) == str(own[2].clamped)


# Laws


@names
@hosts
def test_a_cache_that_holds_everything_is_the_full_cache(name, host):
    """T1: bit for bit, though scores are kept."""
    model = grouped(torch.float32)
    stock = decode(kvlib.method("full"), model, [prompt(30)], 4)
    ours = decode(kvlib.method(name, budget=100, host=host), model, [prompt(30)], 4)
    assert torch.equal(torch.stack(ours[0]), torch.stack(stock[0]))
    assert str(ours[1]) == str(stock[1])


@names
@hosts
def test_the_first_new_token_is_that_of_the_full_cache(name, host):
    """T2."""
    model, rows = llama(2), [prompt(30), prompt(17, seed=1)]
    stock = decode(kvlib.method("full"), model, rows, 1)[0]
    ours = decode(kvlib.method(name, budget=0.2, host=host), model, rows, 1)[0]
    assert torch.equal(ours[0], stock[0])
    assert not torch.allclose(ours[1], stock[1], atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_control_counts_every_query_once_per_head(kv_heads):
    """T3 through the composition: sums of what the host has accumulated."""
    for host, prefix in (("h2o", 23), ("scissorhands", 23 / 400)):
        with torch.no_grad(), kvlib.method("forced_sinks", budget=100, host=host)(llama(kv_heads)) as run:
            ids = torch.tensor([prompt(23)])
            for step in range(4):
                run.model(ids, past_key_values=run.cache)
                ids = torch.tensor([[5]])
                for layer in run.cache.layers:
                    sums = tiny.remembered(layer, "attention").view(kv_heads, -1).sum(-1)
                    np.testing.assert_allclose(sums, (prefix + step) * (4 // kv_heads), rtol=1e-12)


@hosts
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_values_of_one_norm_change_nothing(host, norm):
    """T6: then VATP is its host with forced sinks."""
    model = grouped()
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[norm]
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, out: 3 * F.normalize(out.unflatten(-1, (2, 8)), order, dim=-1).flatten(-2)
        )
    rows = [prompt(40)]
    for budget, sinks in ((0.3, 4), (12, 0), (0.6, 20)):
        arguments = {"budget": budget, "host": host, "sinks": sinks}
        ours = decode(kvlib.method("vatp", norm=norm, **arguments), model, rows, 4)
        assert str(ours[1]) == str(decode(kvlib.method("forced_sinks", **arguments), model, rows, 4)[1])


def scaled_values(factor):
    """The tiny model with the values of a KV head scaled and what reads them scaled back: the same function."""
    model = grouped()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[:8] *= factor
        layer.self_attn.o_proj.weight[:, :16] /= factor
    return model


@names
@hosts
@pytest.mark.parametrize("factor", [2.0**-6, 2.0**9])
def test_the_scale_of_a_head_s_values_does_not_matter(name, host, factor):
    """T7: budgets are per head. For the projected norm the scale is not even there."""
    method = kvlib.method(name, budget=0.4, host=host, sinks=2)
    before = decode(method, grouped(), [prompt(40)], 4)
    after = decode(method, scaled_values(factor), [prompt(40)], 4)
    assert torch.equal(torch.stack(after[0]), torch.stack(before[0]))
    assert str(after[1]) == str(before[1])


@names
@pytest.mark.parametrize(
    ("host", "budget", "recent"), [("h2o", 0.5, 10), ("scissorhands", 16, 10), ("snapkv", 14, 7), ("h2o", 2, 1)]
)
def test_sinks_leave_one_place_to_the_score(name, host, budget, recent):
    """T8: as many as there are heavy tokens, or more, give way, and it is flagged, row by row."""
    total = budget if isinstance(budget, int) else 20
    for sinks in (total - recent - 1, total - recent, 50):
        method = kvlib.method(name, budget=budget, host=host, sinks=sinks)
        _, kept, run = decode(method, llama(2), [prompt(40), prompt(60, seed=1)], 0)
        forced = total - recent - 1
        first, second = (lists(kept, row)[0] for row in (0, 1))
        for head in [head for layer in first for head in layer]:
            assert head[:forced] == list(range(forced)) and head[-recent:] == list(range(40 - recent, 40))
            assert len(head) == total
        if sinks == forced:
            assert "sinks" not in run.clamped
        else:
            other = min(sinks, 14) if isinstance(budget, float) else forced
            assert run.clamped["sinks"].tolist() == [forced, other]
            assert all(head[:other] == list(range(other)) for layer in second for head in layer)


@pytest.mark.parametrize(
    ("host", "budget", "heavy", "recent"),
    [("h2o", 0.4, 6, 6), ("h2o", 13, 7, 6), ("scissorhands", 0.8, 14, 10), ("scissorhands", 13, 3, 10)],
)
@names
def test_the_next_query_sees_heavy_recent_and_itself(name, host, budget, heavy, recent):
    """T9, and 1.6.3 of the specification: H + R + 1 keys at every step. One ratio gives both parts (1.6.5)."""
    seen = []

    class Watched(kvlib.METHODS[name]):
        def attend(self, view):
            seen.append(view.lengths.unique().tolist())
            return super().attend(view)

    _, kept, _ = decode(Watched(budget=budget, host=host, sinks=2), llama(2), [prompt(30)], 6)
    assert seen == [[30]] * 2 + [[heavy + recent + 1]] * 12
    for step, layers in enumerate(lists(kept, 0)):
        for head in [head for layer in layers for head in layer]:
            assert len(head) == heavy + recent and head[:2] == [0, 1]
            assert head[-recent:] == list(range(30 + step - recent, 30 + step))


@names
@hosts
def test_nothing_comes_back(name, host):
    """T10."""
    method = kvlib.method(name, budget=0.3, host=host, sinks=2)
    steps = lists(decode(method, llama(2), [prompt(30)], 8)[1], 0)
    for step in range(1, 9):
        for layer in range(2):
            for before, after in zip(steps[step - 1][layer], steps[step][layer]):
                assert set(after) <= {*before, 29 + step}
                assert method.evicts_in_decode or after == [*before, 29 + step]


@names
@hosts
def test_the_shortest_prompts_work(name, host):
    """T11: no part of a budget is ever empty, at the fraction where theirs fails below 20 tokens or prunes nothing."""
    for length in (1, 2, 3, 4, 7, 19, 20, 23):
        logits, kept, run = decode(kvlib.method(name, budget=0.5, host=host), llama(2), [prompt(length)], 2)
        _, own_kept, own_run = decode(kvlib.method(host, budget=0.5), llama(2), [prompt(length)], 2)
        assert torch.stack(logits).isfinite().all()
        assert [layer.shape for step in kept for layer in step] == [x.shape for step in own_kept for x in step]
        assert {n: v for n, v in run.clamped.items() if n != "sinks"} == own_run.clamped
        assert all((layer[..., -1] == length - 1).all() for layer in kept[0])  # the newest token is never evicted


def repeated(gqa):
    """Multi-head weights that compute what grouped weights compute, two query heads to a group."""
    mha = tiny.build("llama-mha", vocab_size=VOCABULARY)
    weights = dict(gqa.state_dict())
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    mha.load_state_dict(weights)
    return mha


@names
@hosts
def test_groups_of_equal_query_heads_choose_like_single_heads(name, host):
    """T12: summed or averaged over such a group, a score is that of each head. Else the group has one set for all."""
    gqa = grouped()
    method = kvlib.method(name, budget=0.4, host=host, sinks=2)
    different = decode(method, gqa, [prompt(40)], 0)[1], decode(method, repeated(gqa), [prompt(40)], 0)[1]
    for layer in gqa.model.layers:
        for weights, dim in ((layer.self_attn.q_proj.weight, 0), (layer.self_attn.o_proj.weight, 1)):
            first, second, third, fourth = weights.split(8, dim)
            second.copy_(first), fourth.copy_(third)
    equal = decode(method, gqa, [prompt(40)], 3)[1], decode(method, repeated(gqa), [prompt(40)], 3)[1]
    for shared, single in zip(*equal):
        for layer in range(2):
            assert shared[layer].repeat_interleave(2, dim=1).tolist() == single[layer].tolist()
    assert any(a.repeat_interleave(2, dim=1).tolist() != b.tolist() for a, b in zip(different[0][0], different[1][0]))


@pytest.mark.parametrize("host", ["h2o", "scissorhands"])
def test_reducing_before_multiplying_is_another_method_for_projected_norms_only(host):
    """T13: ||v|| is one number for a group, ||W_O v|| is not."""

    def late(name):
        class Late(kvlib.METHODS[name]):
            """The group's mean attention by the group's mean norm."""

            def importance(self, view, last=None):
                norms = view.state["norm"] if name == "vatp" else view.state["norm"].mean(-1)
                sums = view.column_sums(last).mean(2, keepdim=True).expand(-1, -1, view.groups, -1)
                return sums * norms[:, :, None]

        return Late

    for name in ("vatp", "output_norm"):
        both = [
            lists(decode(cls(budget=0.5, host=host, sinks=0), llama(2), [prompt(60, seed)], 3)[1], 0)
            for cls in (kvlib.METHODS[name], late(name))
            for seed in range(3)
        ]
        assert (both[:3] == both[3:]) == (name == "vatp")


@names
@hosts
def test_sinks_are_real_tokens(name, host):
    """T14: the first of each row, whatever its padding; rows have their own heavy and recent parts."""
    method = kvlib.method(name, budget=0.8, host=host, sinks=3)
    rows = [prompt(40), prompt(26, seed=1), prompt(33, seed=2)]
    _, kept, _ = decode(method, llama(2), rows, 3)
    for row, ids in enumerate(rows):
        together, alone = lists(kept, row), lists(decode(method, llama(2), [ids], 3)[1], 0)
        assert together == alone
        assert all(head[:3] == [0, 1, 2] for step in together for layer in step for head in layer)


@names
@hosts
def test_a_second_prompt_finds_no_trace_of_the_first(name, host):
    finds_no_trace(kvlib.method(name, budget=0.3, host=host))


def survives_large_scores(cls):
    """T17, and 1.6.7: sums of 3000 and norms of 60 and more, 65504 being the largest float16."""
    model = tiny.build("llama-gqa", torch.float16, max_position_embeddings=4096, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight *= 128
    attention.o_proj.weight /= 128
    taken = []

    class Watched(cls):
        def score(self, view):
            taken.append((view.state["attention"], super().score(view), view.state.get("norm")))
            return taken[-1][1]

    with torch.no_grad(), Watched(budget=0.5, sinks=2)(model) as run:
        logits = model(tiny.tokens(1, 3000)).logits
        for _ in range(2):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=run.cache).logits
    assert logits.isfinite().all()
    for scores, ranked, norms in taken:
        assert scores.dtype == ranked.dtype == torch.float32
        assert scores.isfinite().all() and not ranked.isnan().any()
        assert (ranked[..., :2] == torch.inf).all() and norms.max() > 60 and scores.max() > 65504
    first, second = taken[0][0], taken[1][0]
    assert (second[..., :1000] > first[..., :1000]).float().mean() > 0.1  # a single query still adds something


def test_scores_survive_half_precision():
    survives_large_scores(kvlib.METHODS["vatp"])


@names
@hosts
@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
def test_chunks_change_no_score(name, host, chunk):
    """T19: neither in the prompt nor in what follows, a second turn included; padding in early chunks as well."""

    def scores(chunk):
        taken = []

        class Watched(kvlib.METHODS[name]):
            def score(self, view):
                taken.append((super().score(view), view.positions))
                return taken[-1][0]

        method = Watched(budget=0.4, host=host, sinks=2)
        with method(tiny.model()) as run:
            turn = tiny.generate(run.model, run, [tiny.tokens(27), tiny.tokens(15, seed=1)], extra=5, chunk=chunk)
            tiny.generate(run.model, run, [tiny.tokens(9, seed=2), tiny.tokens(9, seed=3)], before=turn, chunk=chunk)
        return taken

    for (ours, positions), (expected, same) in zip(scores(chunk), scores(None), strict=True):
        assert torch.equal(positions, same)
        torch.testing.assert_close(ours[positions >= 0], expected[same >= 0], rtol=1e-11, atol=1e-14)


# Norms


def norms_of(value, module, name, order=1):
    """What the norms of values `(batch, kv_heads, slots, dim)` are by their definition."""
    if name == "vatp":
        return torch.linalg.vector_norm(value, order, dim=-1)
    weight = module.o_proj.weight.unflatten(1, (value.shape[1], -1, value.shape[-1]))  # (hidden, kv heads, group, dim)
    return torch.einsum("okgd,bksd->bksgo", weight, value).abs().sum(-1)


def norms_belong_to_their_tokens(cls, order=1, **arguments):
    """Through padding, chunks, eviction, decoding, a second turn and the reordering of beams."""
    model = tiny.model("llama-gqa")

    def check():
        for layer, module in zip(run.cache.layers, run.modules):
            found, value = tiny.remembered(layer, "norm"), layer.tail.rectangle(layer.tail.fields["value"])
            held = layer.tail.position_rectangle() >= 0
            expected = norms_of(value, module, cls.name, order)
            torch.testing.assert_close(found[held], expected[held], rtol=1e-12, atol=0)

    with cls(budget=0.4, sinks=2, **arguments)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(27), tiny.tokens(15, seed=1)], extra=5, chunk=8)
        check()
        tiny.generate(model, run, [tiny.tokens(9), tiny.tokens(9, seed=1)], before=turn, chunk=4)
        check()
        ids, mask = tiny.pad([tiny.tokens(21), tiny.tokens(14, seed=1)])
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5)
        check()


@hosts
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("vatp", {}), ("vatp", {"norm": "l2"}), ("vatp", {"norm": "linf"}), ("output_norm", {})],
)
def test_norms_stay_with_their_tokens(name, arguments, host):
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[arguments.get("norm", "l1")]
    norms_belong_to_their_tokens(kvlib.METHODS[name], order, host=host, **arguments)


@pytest.mark.parametrize(("name", "shape"), [("vatp", ()), ("output_norm", (2,))])
def test_norms_are_taken_once_of_every_token(name, shape, monkeypatch):
    """One float32 number per KV head and token (per query head for the projected norm), of new tokens only."""
    counted, norm = [], torch.linalg.vector_norm
    counting = lambda x, *args, **kwargs: counted.append(x[..., 0].numel()) or norm(x, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "vector_norm", counting)
    model = tiny.model("llama-gqa", torch.float16)
    with kvlib.method(name, budget=0.5)(model) as run:
        tiny.generate(model, run, [tiny.tokens(20)], new=4, chunk=8)
    heads = 2 if name == "vatp" else 4
    assert sum(counted) == 2 * heads * 23  # two layers, and the last sampled token is not read
    for layer in run.cache.layers:
        assert layer.tail.state["norm"].dtype == torch.float32
        assert layer.tail.state["norm"].shape == (len(layer.tail.positions), *shape)


def test_every_token_ends_with_the_same_share_of_epsilon():
    """Without attention and with all norms 1, a score is the number of queries that the host has counted."""
    taken = []

    class Watched(vatp.OutputNorm):
        def importance(self, view, last=None):
            view.state["norm"] = torch.ones_like(view.state["norm"])
            blind = super().importance(view, last) - view.column_sums(last)
            return blind / 1e-4

        def score(self, view):
            score = super().score(view)
            taken.append((score, view.positions))
            return score

    for host, count in (("h2o", lambda n, step: n + step), ("scissorhands", lambda n, step: 1 + step)):
        taken.clear()
        decode(Watched(budget=0.5, host=host), llama(2), [prompt(40), prompt(26)], 14)
        for at, (score, positions) in enumerate(taken):
            for row, length in enumerate((40, 26)):
                real = score[row][(positions[row] >= 0) & score[row].isfinite()]
                assert len(real)
                expected = 2 * count(length, at // 2)  # query heads in a group
                np.testing.assert_allclose(real, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "eos_token_id": 0, "bos_token_id": 0}, "GPT2"),
        ("PhiForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "Phi"),
    ],
)
def test_models_without_an_output_projection_by_that_name(name, config, kind):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=VOCABULARY, **config)).eval()
    for method in NAMES[:3]:
        decode(kvlib.method(method, budget=0.5), model, [prompt(12)], 1)
    with pytest.raises(ValueError, match=f"{kind}Attention has no o_proj, which output_norm needs"):
        decode(kvlib.method("output_norm", budget=0.5), model, [prompt(12)], 1)


def test_values_of_another_width_than_keys():
    config = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 6,
    }  # fmt: skip
    cls = transformers.DeepseekV3ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(vocab_size=64, initializer_range=0.3, **config)).double().eval()
    for name in NAMES:
        with torch.no_grad(), kvlib.method(name, budget=0.5, sinks=2)(model) as run:
            model(tiny.tokens(1, 18))
        assert run.kept(1).shape == (1, 4, 8)  # int(18 / 4) twice


# Mutants: what the checks above are worth


def keeps_all_sinks(cls):
    """20 of 20, in every head and at every step."""
    _, kept, _ = decode(cls(budget=44), llama(4), [prompt(60)], 6)
    assert all(head[:20] == list(range(20)) for step in lists(kept, 0) for layer in step for head in layer)


def follows_the_reference(cls):
    for host, kv_heads in (("h2o", 4), ("h2o", 2), ("scissorhands", 4), ("scissorhands", 2)):
        method = cls(budget=0.6, host=host, sinks=3)
        follows(method, llama(kv_heads), [prompt(40), prompt(27, seed=1)], 6, WORTH["vatp", "l1"])


def keeps_heavy_tokens(cls):
    """As many places for the score as the budget leaves beside the recent tokens (T9)."""
    window = []

    class Watched(cls):
        def score(self, view):
            score = super().score(view)
            window.append((score == torch.inf).sum(-1).unique().tolist())
            return score

    decode(Watched(budget=0.5, sinks=0), llama(2), [prompt(40)], 6)
    assert window == [[10]] * 14


CHECKS = [
    follows_the_reference,
    keeps_all_sinks,
    keeps_heavy_tokens,
    norms_belong_to_their_tokens,
    survives_large_scores,
]


class NotForced(vatp.VATP):
    def score(self, view):
        return self.hosted.score(view)


class NineteenOfTwenty(vatp.VATP):
    def score(self, view):
        return dataclasses.replace(self, sinks=max(0, self.sinks - 1)).score_of_parent(view)

    def score_of_parent(self, view):
        return super().score(view)


class WiderH2O(baselines.H2O):
    def recent(self, view):
        return super().recent(view) + 1


class WiderWindow(vatp.VATP):
    @cached_property
    def hosted(self):
        return WiderH2O(self.budget)


class OtherHead(vatp.VATP):
    def importance(self, view, last=None):
        return view.column_sums(last) * view.state["norm"].flip(1)[:, :, None]


class StaleNorms(vatp.VATP):
    """Norms stay in the slots in which tokens once stood, while the tokens move up."""

    def observe(self, view):
        before = vars(view.layer).get("norms")
        stale = None if view.step.index == 0 and view.step.seen == view.query.shape[2] else before
        super().observe(view)
        norms = view.state["norm"]
        if stale is not None:
            kept = min(stale.shape[-1], norms.shape[-1])
            norms = torch.cat([stale[..., :kept], norms[..., kept:]], dim=-1)
        vars(view.layer)["norms"] = view.state["norm"] = norms


class HalfScores(vatp.VATP):
    def observe(self, view):
        super().observe(view)
        view.state["attention"] = view.state["attention"].half()

    def score(self, view):
        return super().score(view).float()


MUTANTS = [
    ("sinks not forced", NotForced, keeps_all_sinks),
    ("sinks not forced", NotForced, follows_the_reference),
    ("19 of 20 sinks", NineteenOfTwenty, keeps_all_sinks),
    ("window R+1", WiderWindow, keeps_heavy_tokens),
    ("window R+1", WiderWindow, follows_the_reference),
    ("norm of the wrong head", OtherHead, follows_the_reference),
    ("stale norm after eviction", StaleNorms, norms_belong_to_their_tokens),
    ("stale norm after eviction", StaleNorms, follows_the_reference),
    ("fp16 scores", HalfScores, survives_large_scores),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checks_hold_for_vatp(check):
    check(kvlib.METHODS["vatp"])


@pytest.mark.parametrize(("mutant", "check"), [pytest.param(m, c, id=f"{n}: {c.__name__}") for n, m, c in MUTANTS])
def test_mutants_are_killed(mutant, check):
    with pytest.raises(AssertionError):
        check(mutant)
