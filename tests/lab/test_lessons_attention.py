"""What the lessons compute: attention maps against stock transformers, removals against the formula."""

import pytest
import tiny
import torch
from scipy import stats

import kvlib
from kvlib.lab import tasks
from kvlib.lab.lessons import attention_maps, evictions, excerpts, keep_sets


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama-gqa")


@pytest.fixture(scope="module")
def snapshot(model):
    return kvlib.snapshot(model, tiny.tokens(1, 20))


# Attention


def test_maps_are_those_of_eager_attention(snapshot):
    eager = tiny.build("llama-gqa")
    eager.set_attn_implementation("eager")
    expected = eager(tiny.tokens(1, 20), output_attentions=True).attentions
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(attention_maps.attention_map(snapshot, layer), weights[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("last", [1, 7, 20, 50])
def test_maps_of_the_last_queries(snapshot, last):
    torch.testing.assert_close(
        attention_maps.attention_map(snapshot, 1, last), attention_maps.attention_map(snapshot, 1)[:, -last:]
    )


def test_attention_received_is_the_mean_of_the_maps(snapshot):
    received = attention_maps.attention_received(snapshot)
    assert received.shape == (2, 4, 20)
    torch.testing.assert_close(received.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(received[1], attention_maps.attention_map(snapshot, 1).mean(1))


def test_errors_are_those_of_removing_tokens(snapshot):
    """By the formula, averaged over two queries, against the softmax over the others."""
    attention, errors, size = evictions.eviction_errors(snapshot, layer=1, last=2)
    query, key, value, scaling = attention_maps.expanded(snapshot, 1)
    for head in range(4):
        last = evictions.remove_each(query[head, -1], key[head], value[head], scaling).norm(dim=-1)
        before = evictions.remove_each(query[head, -2], key[head, :-1], value[head, :-1], scaling).norm(dim=-1)
        expected = (last + torch.cat([before, torch.zeros(1)])) / 2  # the last token did not exist for that query
        torch.testing.assert_close(errors[head], expected)
    torch.testing.assert_close(attention, attention_maps.attention_map(snapshot, 1)[:, -2:].mean(1))
    outputs = attention_maps.attention_map(snapshot, 1)[:, -2:] @ value
    torch.testing.assert_close(size[:, 0], outputs.norm(dim=-1).mean(1))


def test_best_kept_counts_the_overlap():
    errors = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert evictions.best_kept(errors, errors, 0.4).item() == 1
    assert evictions.best_kept(-errors, errors, 0.4).item() == 0
    assert evictions.best_kept(torch.tensor([[1.0, 9.0, 9.5, 0.0, 0.0]]), errors, 0.4).item() == 0.5


def test_held_out_files_have_names():
    assert excerpts.heldout_code("jinja2/tests.py").count("def test_") > 10
    with pytest.raises(ValueError, match="no held-out file 'jinja2/nothing.py'; there are: attr/"):
        excerpts.heldout_code("jinja2/nothing.py")


# What methods keep


def test_kept_masks_count_what_is_stored(model):
    with kvlib.method("snapkv", budget=0.5, window=4)(model) as run:
        model(tiny.tokens(1, 20))
    mask = keep_sets.kept_mask(run)
    assert mask.shape == (2, 2, 20) and mask.sum(-1).eq(10).all()
    assert mask[1, 0].nonzero()[:, 0].tolist() == run.kept(1)[0, 0].tolist()


def test_looking_heads(snapshot):
    """The heaviest query head of a group speaks for its KV head."""
    found = attention_maps.looking_heads(snapshot, [3, 4], count=4)
    looks = {
        (layer, head): attention_maps.attention_map(snapshot, layer)[2 * head : 2 * head + 2, -1][:, [3, 4]]
        for layer in range(2)
        for head in range(2)
    }
    best = {place: group[group.sum(1).argmax()] for place, group in looks.items()}
    assert [(layer, head) for layer, head, _ in found] == sorted(best, key=lambda place: -best[place].sum())
    for layer, head, on in found:
        torch.testing.assert_close(on, best[layer, head])


def test_looking_heads_of_an_earlier_query(model):
    """What it sees is what the last query of a shorter prompt sees."""
    ids = tiny.tokens(1, 20)
    whole, cut = (kvlib.snapshot(model, ids[:, :tokens]) for tokens in (20, 13))
    first, second = (
        attention_maps.looking_heads(whole, [3, 4], 4, query=12),
        attention_maps.looking_heads(cut, [3, 4], 4),
    )
    assert [entry[:2] for entry in first] == [entry[:2] for entry in second]
    torch.testing.assert_close(torch.stack([entry[2] for entry in first]), torch.stack([entry[2] for entry in second]))


def test_short_keys(snapshot):
    """By scipy, head by head."""
    found = attention_maps.short_keys(snapshot)
    assert found.shape == (2, 2)
    for layer in range(2):
        received = attention_maps.attention_map(snapshot, layer).mean(1)  # (query_heads, tokens)
        for head in range(2):
            norms = snapshot.layers[layer][1][0, head].norm(dim=-1)
            expected = stats.spearmanr(-norms, received[2 * head : 2 * head + 2].mean(0)).statistic
            assert found[layer, head].item() == pytest.approx(expected)


def test_answer_places():
    tokenizer = kvlib.load()[1]
    prompt = tasks.sample("needle", 300, 2, tokenizer=tokenizer)
    ids = prompt.ids(tokenizer)[0]
    places = excerpts.answer_places(prompt, tokenizer)
    assert places == list(range(places[0], places[-1] + 1))
    text = tokenizer.decode([ids[place] for place in places])
    assert text.strip() == prompt.answer.strip()
