"""What the lesson on values computes: scores against the methods, costs against attention without the tokens."""

import pandas as pd
import pytest
import tiny
import torch
from scipy import stats

import kvlib
from kvlib.lab import statistics, tasks
from kvlib.lab.lessons import attention_maps, evictions, excerpts, keep_sets, scoring, value_norms

N, LATER = 30, 6


@pytest.fixture(scope="module", params=["llama-mha", "llama-gqa"])
def model(request):
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def both(model):
    """Snapshots of the first N tokens and of all."""
    ids = tiny.tokens(1, N + LATER)
    return kvlib.snapshot(model, ids[:, :N]), kvlib.snapshot(model, ids)


@pytest.mark.parametrize(("task", "tokens"), [("needle", 54), ("needle", 500), ("number", 54)])
def test_a_page_is_the_start_of_a_prompt_without_its_question(task, tokens):
    _, tokenizer = kvlib.load()
    page = excerpts.page(tokenizer, task, 1, tokens)
    prompt = tasks.sample(task, max(400, tokens + 128), 1, tokenizer=tokenizer)
    assert len(page) == tokens and page == prompt.ids(tokenizer)[0][:tokens]
    assert page != excerpts.page(tokenizer, task, 2, tokens)


def test_a_page_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(excerpts, "QUESTION", 3)
    with pytest.raises(ValueError, match="needle: the question takes more than 3 tokens"):
        excerpts.page(kvlib.load()[1], "needle", 1, 500)


# Norms


@pytest.mark.parametrize("order", [1, 2, torch.inf])
def test_norms_are_those_of_the_projected_hidden_states(model, order):
    """Values from the model's own v_proj, not from a snapshot."""
    ids, seen = tiny.tokens(1, N), []
    attention = model.model.layers[1].self_attn
    handle = attention.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    snapshot = kvlib.snapshot(model, ids)
    handle.remove()
    dim = attention.head_dim
    for head, part in enumerate(seen[0].split(dim, dim=-1)):
        powers = part.abs() ** order
        expected = part.abs().amax(-1) if order == torch.inf else powers.sum(-1) ** (1 / order)
        torch.testing.assert_close(value_norms.norms(snapshot, order)[1, head], expected)


def test_over_median():
    x = torch.tensor([[1.0, 2.0, 6.0], [10.0, 5.0, 20.0]])
    assert value_norms.over_median(x).tolist() == [[0.5, 1, 3], [1, 0.5, 2]]


def test_rank_correlation_is_spearmans():
    first, second = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).split(1)
    first[0, 0, :10] = 0.0  # ties
    found = value_norms.rank_correlation(first[0], second[0])
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(first[0].numpy(), second[0].numpy())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert value_norms.rank_correlation(first[0, 1], first[0, 1].exp()).item() == pytest.approx(1)
    assert value_norms.rank_correlation(first[0, 1], -first[0, 1]).item() == pytest.approx(-1)


# Scores


def test_scores_are_those_of_attention_and_removal(model, both):
    """Summed over queries one by one; the exact error by really leaving each token out."""
    prefix, _ = both
    others = {"exact error": "exact_error", "output norm": "output_norm"}
    scores = scoring.all_scores(model, prefix)
    scores |= {name: scoring.importance(model, prefix, method) for name, method in others.items()}
    for layer, module in enumerate(model.model.layers):
        query, key, value, scaling = attention_maps.expanded(prefix, layer)
        received, moved = attention_maps.attention_map(prefix, layer).sum(1), torch.zeros(len(query), N)
        for head, i in ((head, i) for head in range(len(query)) for i in range(1, N)):
            seen = slice(0, i + 1)
            changes = evictions.remove_each(query[head, i], key[head, seen], value[head, seen], scaling)
            moved[head, seen] += changes.norm(dim=-1)
        parts = module.self_attn.o_proj.weight.split(value.shape[-1], dim=1)
        projected = torch.stack([(value[head] @ part.T).abs().sum(-1) for head, part in enumerate(parts)])
        expected = {
            "attention": received,
            "product": received * value.abs().sum(-1),
            "exact error": moved,
            "output norm": (received + 1e-4 * N) * projected,
        }
        for name, per_query_head in expected.items():
            groups = per_query_head.unflatten(0, (scores[name].shape[1], -1)).sum(1)
            torch.testing.assert_close(scores[name][layer], groups, check_dtype=False)


def test_forced_scores_keep_the_first_tokens_and_change_nothing_else(model, both):
    scores = scoring.all_scores(model, both[0])
    for name in ("attention", "product"):
        forced = scores[f"{name}, 20 sinks"]
        assert forced[..., :20].isinf().all() and torch.equal(forced[..., 20:], scores[name][..., 20:])
        assert scores[name].isfinite().all()
    again, other = scoring.all_scores(model, both[0]), scoring.all_scores(model, both[0], seed=1)
    assert torch.equal(again["random"], scores["random"]) and not torch.equal(other["random"], scores["random"])


@pytest.mark.parametrize("method", ["forced_sinks", "vatp", "exact_error", "output_norm"])
def test_importance_is_what_the_running_method_ranks(model, method):
    """In a live forward pass: the recent half, the sinks, and of the rest the most important."""
    ids = tiny.tokens(1, N)
    with kvlib.method(method, host="h2o", budget=16, sinks=3)(model) as run:
        model(ids)
    score = scoring.forced(scoring.importance(model, kvlib.snapshot(model, ids), method), 3)
    score[..., -8:] = torch.inf
    assert torch.equal(keep_sets.kept_mask(run), scoring.best(score, 16.5 / N))


def test_importance_on_scissorhands_is_the_mean_of_its_last_queries(model):
    """Of 400, however few they are."""
    snapshot = kvlib.snapshot(model, tiny.tokens(1, N))
    found = scoring.importance(model, snapshot, "vatp", "scissorhands", sinks=3)
    for layer, (_, key, value, _) in enumerate(snapshot.layers):
        received = attention_maps.attention_map(snapshot, layer).sum(1).unflatten(0, (key.shape[1], -1)).sum(1) / 400
        torch.testing.assert_close(found[layer], received * value[0].abs().sum(-1), check_dtype=False)


def test_best_keeps_so_many_and_the_earlier_of_equals():
    score = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, torch.inf]])
    assert scoring.best(score, 0.5).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert scoring.best(score, 0.01).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert scoring.best(score, 1.0).all()
    equal = scoring.best(torch.zeros(3, 5000), 0.1)  # an unstable sort shows at such lengths only
    assert equal[:, :500].all() and not equal[:, 500:].any()


# Costs


def test_changes_are_those_of_attention_without_the_tokens(model, both):
    """Keys and values taken out of the tensors, and the softmax taken anew."""
    _, whole = both
    kv_heads = whole.layers[0][1].shape[1]
    chance = torch.rand(2, kv_heads, N, generator=torch.Generator().manual_seed(3))
    kept = chance < torch.tensor([0.3, 0.8])[:, None, None]
    for layer, module in enumerate(model.model.layers):
        found = evictions.change(whole, layer, kept, module.self_attn.o_proj.weight)
        query, key, value, scaling = attention_maps.expanded(whole, layer)
        heads = len(query)
        assert found["head"].shape == found["mass"].shape == (2, heads, LATER)
        assert found["layer"].shape == (2, LATER)
        for row, i in ((row, i) for row in range(2) for i in range(N, N + LATER)):
            before, after = [], []
            for head in range(heads):
                q, k, v = query[head, i], key[head, : i + 1], value[head, : i + 1]
                stays = torch.cat([kept[row, head * kv_heads // heads], torch.ones(i + 1 - N, dtype=torch.bool)])
                weights = (k @ q * scaling).softmax(0)
                before.append(weights @ v)
                after.append((k[stays] @ q * scaling).softmax(0) @ v[stays])
                size, gone = before[-1].norm(), weights * ~stays
                expected = {"head": (after[-1] - before[-1]).norm() / size}
                for measure, x in (expected | {"mass": gone.sum()}).items():
                    torch.testing.assert_close(found[measure][row, head, i - N], x)
            before, after = (module.self_attn.o_proj(torch.cat(outputs)) for outputs in (before, after))
            torch.testing.assert_close(found["layer"][row, i - N], (after - before).norm() / before.norm())


def test_nothing_changes_if_nothing_goes(both):
    _, whole = both
    query, key, *_ = whole.layers[0]
    weight = torch.eye(query.shape[1] * query.shape[3], dtype=torch.float64)
    kept = torch.ones(key.shape[1], N, dtype=torch.bool)
    for name, x in evictions.change(whole, 0, kept, weight).items():
        assert x.abs().max() < 1e-12, name


def test_one_token_changes_what_the_formula_says(both):
    """a / (1 - a) x ||o - v|| of the first token, and a x ||v|| without renormalising."""
    _, whole = both
    query, key, *_ = whole.layers[1]
    weight = torch.eye(query.shape[1] * query.shape[3], dtype=torch.float64)
    kept = torch.arange(N).expand(key.shape[1], N) > 0
    found = evictions.change(whole, 1, kept, weight)
    weights, value = attention_maps.attention_map(whole, 1)[:, N:], attention_maps.expanded(whole, 1)[2]
    output, a, v = weights @ value, weights[..., 0], value[:, :1]
    expected = a / (1 - a) * (output - v).norm(dim=-1) / output.norm(dim=-1)
    torch.testing.assert_close(found["head"], expected)
    torch.testing.assert_close(found["mass"], a)


def test_damage_is_the_mean_change_of_the_best_tokens(model, both):
    prefix, whole = both
    scores = {name: score for name, score in scoring.all_scores(model, prefix).items() if "sinks" not in name}
    table = evictions.damage(model, whole, scores, [0.2, 0.6, 1.0])
    assert len(table) == 2 * len(scores) * 3
    for (layer, name, budget), row in table.set_index(["layer_idx", "score", "budget"]).iterrows():
        weight = model.model.layers[layer].self_attn.o_proj.weight
        found = evictions.change(whole, layer, scoring.best(scores[name][layer], budget), weight)
        assert {measure: float(x.mean()) for measure, x in found.items()} == pytest.approx(dict(row), abs=1e-12)
    assert table.loc[table["budget"] == 1.0, ["head", "layer", "mass"]].abs().max().max() < 1e-12


def test_worst_found(model, both):
    """A score that knows the errors finds all, its reverse none; a group is asked as one."""
    prefix, whole = both
    kv_heads = whole.layers[0][1].shape[1]

    def of_groups(x):
        return x.unflatten(0, (kv_heads, -1)).mean(1)

    errors = torch.stack([of_groups(evictions.eviction_errors(whole, i, LATER)[1])[:, :N] for i in range(2)])
    coming = torch.stack([of_groups(attention_maps.attention_map(whole, i)[:, N:, :N].mean(1)) for i in range(2)])
    found = evictions.worst_found(whole, {"all": errors, "none": -errors})
    assert found["all"] == 1 and found["none"] == 0 and list(found)[2:] == ["attention to come", "product to come"]
    worst = [set(row.topk(N // 5).indices.tolist()) for row in errors.flatten(0, 1)]
    for name, score in (("attention to come", coming), ("product to come", coming * value_norms.norms(prefix))):
        top = [set(row.topk(N // 5).indices.tolist()) for row in score.flatten(0, 1)]
        shares = [len(one & other) / (N // 5) for one, other in zip(worst, top)]
        assert found[name] == pytest.approx(sum(shares) / len(shares))


def test_paired_differences_are_in_points_by_budget():
    rows = [
        {"score": score, "budget": budget, "text": text, "layer_idx": layer, "head": 0.5 + sign * budget * 0.01 * step}
        for score, sign in (("one", 1), ("other", -1))
        for budget in (0.2, 0.4)
        for text, step in (("a", 1), ("b", 2), ("c", -0.5))
        for layer in (0, 1)
    ]
    found = evictions.paired(pd.DataFrame(rows), "one", "other")
    expected = [2 * budget * 2.5 / 3 for budget in (0.2, 0.4)]
    assert found.index.tolist() == [0.2, 0.4] and found["value"].tolist() == pytest.approx(expected)
    assert found["texts"].tolist() == [1, 1]
    same = statistics.paired_difference([[0.4, 0.8, -0.2]], [[0.0, 0.0, 0.0]])
    assert (found["low"][0.2], found["high"][0.2]) == pytest.approx((same.low, same.high))
    text = evictions.differences(pd.DataFrame(rows), [("one", "other", "head"), ("other", "one", "head")])
    assert text.index.tolist() == [("one − other", "head"), ("other − one", "head")]
    assert list(text.columns) == ["20%", "40%"] and text["20%"].iloc[0].startswith("+0.33 [-0.20, ")
    assert text["40%"].iloc[1].startswith("-0.67 [-1.60, ")


# What is kept


def test_overlaps_by_hand():
    a = torch.tensor([1, 1, 0, 0], dtype=torch.bool)
    sets = {
        "a": torch.stack([a, a])[None],
        "half": torch.stack([a, ~a])[None],  # the same in one head, disjoint in the other
        "larger": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)[None],
    }
    found = keep_sets.overlaps(sets)
    assert (found.to_numpy() == found.to_numpy().T).all()
    assert found.loc["a"].to_list() == pytest.approx([1, 0.5, (4 / 5 + 4 / 6) / 2])
    assert found.loc["half", "larger"] == pytest.approx((4 / 5 + 4 / 6) / 2)


def test_an_empty_set_is_refused():
    kept = {"none": torch.zeros(1, 1, 4, dtype=torch.bool), "all": torch.ones(1, 1, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="an empty keep-set is like no other"):
        keep_sets.overlaps(kept)


def test_kept_by_is_what_runs_keep():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 30)
    methods = {name: kvlib.method(name, budget=0.3) for name in ("h2o", "snapkv")}
    found = keep_sets.kept_by(model, kvlib.snapshot(model, ids), methods)
    assert list(found) == list(methods)
    for name, method in methods.items():
        with method(model) as run:
            model(ids)
        for layer, mask in enumerate(found[name]):
            assert [row.nonzero().flatten().tolist() for row in mask] == run.kept(layer)[0].tolist()
