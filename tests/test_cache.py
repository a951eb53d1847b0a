"""The packed cache: rows, waiting queries, and what transformers may ask of it."""

import copy

import properties
import pytest
import tiny
import torch
from transformers import DynamicCache

import kvlib
from kvlib.core.cache import KVCache


def test_layers_of_a_pass_share_what_follows_from_lengths():
    model, seen = tiny.model("llama-gqa"), []

    class Watching(kvlib.Evictor):
        def score(self, view):
            seen.append(len(view.layer.tail.memo))
            return view.positions.float()

        def finish(self, run):
            seen.append(len(run.cache.memo))

    ids = tiny.tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # segments of different lengths
    with Watching(budget=0.5)(model) as run:
        model(ids, attention_mask=mask)
        assert run.cache.memo == {} and not run.cache.memo.open
    first, second, end = seen
    assert 0 < first < second == end  # the first layer works everything out, others nothing


def test_rows_take_everything_that_is_theirs_along():
    """Tokens seen, those of the prompt, waiting queries, what a method remembers, and where the next token goes."""
    model, ids, mask = (
        tiny.model("llama-gqa"),
        *tiny.pad([tiny.tokens(9), tiny.tokens(14, seed=1), tiny.tokens(5, seed=2)]),
    )

    class Remembering(type(kvlib.method("snapkv"))):
        def observe(self, view):
            view.layer.rows["count"] = view.tokens.clone()

    with Remembering(0.5, window=2)(model) as run:
        model(ids, attention_mask=mask)
        model(tiny.tokens(3, 1), past_key_values=run.cache)
        cache, layer = run.cache, run.cache.layers[1]
        layer.queries = torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3)[:, None]
        layer.reads = torch.arange(3)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        assert cache.tokens.tolist() == [6, 6, 10]
        assert cache.prompt_tokens.tolist() == [5, 5, 9]
        assert cache.ends.tolist() == [[6], [6], [10]]
        assert layer.rows["count"].tolist() == [6, 6, 10]
        assert layer.queries[0].flatten().tolist() == layer.queries[1].flatten().tolist() == [2, 2, 0]
        assert layer.reads.tolist() == [2, 2, 0]
        layer.queries = None
        # the shares of a later prompt are those of its own rows
        more = tiny.tokens(3, 4, seed=3)
        model(more, past_key_values=cache)
        assert run.cache.layers[0].lengths[:, 0].tolist() == [5, 5, 7]


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_rows_that_were_selected_go_on_like_rows_that_were_alone(name):
    """Budgets of a decoded token are those of its row's prompt: `prompt_tokens` follows the rows."""
    model, rows = tiny.model("llama-gqa"), [tiny.tokens(24), tiny.tokens(11, seed=1)]
    token = tiny.tokens(1, 1, seed=2)
    with kvlib.method(name, budget=0.5)(model) as run:
        model(*tiny.pad(rows))
        run.cache.batch_select_indices(torch.tensor([1]))
        for _ in range(3):
            model(token, past_key_values=run.cache)
        together = tiny.kept(run)
    with kvlib.method(name, budget=0.5)(model) as run:
        model(rows[1][None])
        for _ in range(3):
            model(token, past_key_values=run.cache)
        assert tiny.kept(run) == together


def test_waiting_queries_cost_a_window_and_not_a_chunk():
    sizes = []

    class Watching(type(kvlib.method("snapkv"))):
        def on_token_ids(self, run, token_ids):
            if run.cache.get_seq_length():
                sizes.append([x.untyped_storage().nbytes() for x in run.cache.layers[0].queries])
                properties.well_formed(run)

    model = tiny.model("llama-gqa")
    with Watching(0.5, window=4)(model) as run:
        tiny.generate(model, run, [tiny.tokens(30)], new=1, chunk=12)
        assert run.cache.layers[0].queries is None
    assert sizes == [[4 * 4 * 8 * 8, 4 * 8]] * 2  # 4 queries x 4 heads x 8 numbers in float64, 4 positions in int64


def test_an_empty_cache_takes_any_order():
    cache = KVCache(2, kvlib.method("full"))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.tokens is None and cache.get_seq_length() == 0


def test_reset_forgets_everything():
    model, method = tiny.model(), kvlib.method("h2o", budget=0.5)
    with method(model) as run:
        before = tiny.generate(model, run, [tiny.tokens(20)])
        run.cache.reset()
        assert tiny.audit(run.cache) == (0, 0)
        again = tiny.generate(model, run, [tiny.tokens(20)])
    assert again.kept == before.kept


def test_cropping_is_refused():
    with pytest.raises(
        ValueError, match=r"a compressed cache cannot be cropped \(assisted decoding is not supported\)"
    ):
        KVCache(1, kvlib.method("full")).crop(-1)
    assert not KVCache(1, kvlib.method("full")).is_croppable


def test_an_empty_dynamic_cache_becomes_the_run_s_cache_in_place():
    model, mine = tiny.model(), DynamicCache()
    with kvlib.method("knorm", budget=0.5)(model) as run:
        model(tiny.tokens(1, 10), past_key_values=mine)
        assert run.cache is mine and type(mine) is KVCache
    assert run.kept(0).shape[-1] == 5


def test_a_copied_cache_goes_its_own_way():
    # transformers' recipe for a prompt that many questions share.
    model, more = tiny.model(), [tiny.tokens(5, seed=1), tiny.tokens(8, seed=2)]
    with kvlib.method("h2o", budget=0.5)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(20)])
        shared, kept = run.cache, []
        for rows in (more[0], more[1], more[0]):
            run.cache = copy.deepcopy(shared)
            kept.append(tiny.generate(model, run, [rows], before=turn).kept)
    assert kept[0] == kept[2] != kept[1]
    assert shared.get_seq_length() == 23


def test_the_sequence_length_counts_columns_and_not_what_is_stored():
    # transformers cuts its inputs with it; with what is stored, a second turn would read old tokens again.
    model = tiny.model()
    with kvlib.method("knorm", budget=0.2)(model) as run:
        tiny.generate(model, run, [tiny.tokens(20), tiny.tokens(11, seed=1)], new=4, extra=2)
        assert run.cache.get_seq_length() == 22 + 3
        assert run.cache.tokens.tolist() == [23, 14]
        assert run.cache.prompt_tokens.tolist() == [20, 11]
