"""The packed cache against lists of lists, and what transformers may ask of it."""

import copy

import properties
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import kvlib
from kvlib.core.cache import KVCache, KVLayer

DIM = 3


class Lists:
    """The same as a `KVLayer`, one Python list of (key, value, position, state) per row and head."""

    def __init__(self, batch, heads):
        self.segments = [[[] for _ in range(heads)] for _ in range(batch)]
        self.tokens = [0] * batch

    def append(self, key, value, positions):
        for row, heads in enumerate(self.segments):
            for head, segment in enumerate(heads):
                for column, position in enumerate(positions[row].tolist()):
                    if position >= 0:
                        segment.append(
                            (key[row, head, column].tolist(), value[row, head, column].tolist(), position, [[0, 0]] * 2)
                        )
            self.tokens[row] += int((positions[row] >= 0).sum())

    def select(self, rows):
        self.segments = [[list(head) for head in self.segments[row]] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]

    def keep(self, mask):
        self.segments = [
            [
                [entry for entry, stays in zip(head, flags, strict=False) if stays]
                for head, flags in zip(heads, row, strict=True)
            ]
            for heads, row in zip(self.segments, mask.tolist(), strict=True)
        ]


def check(layer: KVLayer, lists: Lists) -> None:
    flat = [entry for heads in lists.segments for head in heads for entry in head]
    assert layer.lengths.tolist() == [[len(head) for head in heads] for heads in lists.segments]
    assert layer.keys.tolist() == [entry[0] for entry in flat]
    assert layer.values.tolist() == [entry[1] for entry in flat]
    assert layer.positions.tolist() == [entry[2] for entry in flat]
    assert layer.state["x"].tolist() == [entry[3] for entry in flat]
    assert layer.tokens.tolist() == lists.tokens
    for tensor in (layer.keys, layer.values, layer.positions, layer.state["x"]):
        assert tensor.untyped_storage().nbytes() == len(flat) * tensor[:1].numel() * tensor.element_size() or not len(
            flat
        )
    # Rectangles hold the same, and going there and back changes nothing.
    rectangle, state = layer.rectangles(layer.keys, layer.state["x"])
    assert torch.equal(layer.flatten(rectangle), layer.keys)
    assert torch.equal(layer.flatten(state), layer.state["x"])
    for row, heads in zip(layer.position_rectangle().tolist(), lists.segments, strict=True):
        for positions, head in zip(row, heads, strict=True):
            assert positions == [entry[2] for entry in head] + [-1] * (len(positions) - len(head))
    if layer.uniform and len(flat):
        assert rectangle.data_ptr() == layer.keys.data_ptr()  # no copy


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_history_leaves_what_lists_would_hold(data, batch, heads, even, remembering):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    layer, lists = KVLayer(), Lists(batch, heads)
    layer.places = {} if remembering else None  # a pass that never ends
    layer.tokens = layer.prompt_tokens = torch.zeros(batch, dtype=torch.int64)
    for action in [
        "append",
        *data.draw(st.lists(st.sampled_from(["append", "keep", "select", "repeat", "pick"]), max_size=6)),
    ]:
        batch = len(lists.segments)
        if action == "append":
            new = data.draw(st.integers(1, 4))
            counts = torch.tensor([new if even else data.draw(st.integers(0, new)) for _ in range(batch)])
            key, value = torch.randn(2, batch, heads, new, DIM, generator=random)
            index = torch.arange(new) - (new - counts)[:, None]
            positions = (layer.tokens[:, None] + index).where(index >= 0, -1)
            layer.append(key, value, positions, counts)
            layer.tokens = layer.tokens + counts
            layer.state.setdefault("x", torch.zeros(len(layer.keys), 2, 2))
            lists.append(key, value, positions)
        elif action == "keep":
            slots = int(layer.lengths.max())
            lengths = (layer.lengths + 1) // 2
            noise = torch.rand(batch, heads, slots, generator=random).where(layer.position_rectangle() >= 0, -1)
            mask = noise.argsort(-1, descending=True).argsort(-1) < lengths[..., None]
            layer.keep(mask, lengths)
            lists.keep(mask)
        elif action == "select":
            rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            layer.reorder_cache(torch.tensor(rows))
            lists.select(rows)
        elif action == "repeat":
            layer.batch_repeat_interleave(2)
            lists.select([row for row in range(batch) for _ in range(2)])
        else:
            chosen = torch.rand(batch, generator=random) < 0.5
            chosen[0] = True
            layer.batch_select_indices(chosen)
            lists.select(chosen.nonzero().squeeze(1).tolist())
        check(layer, lists)


def test_layers_of_a_pass_share_what_follows_from_lengths():
    model, seen = tiny.model("llama-gqa"), []

    class Watching(kvlib.Evictor):
        def score(self, view):
            seen.append((view.layer.places, len(view.layer.places)))
            return view.positions.float()

    ids = tiny.tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # segments of different lengths
    with Watching(budget=0.5)(model) as run:
        model(ids, attention_mask=mask)
        assert all(layer.places is None for layer in run.cache.layers)
    places, counts = seen[0][0], [count for _, count in seen]
    assert all(shared is places for shared, _ in seen)
    assert 0 < counts[0] < counts[1] == len(places)  # the first layer works everything out, others nothing


def test_waiting_queries_follow_their_rows():
    # Rows may be selected while a prompt is unfinished, and the window of queries must stay with its row.
    queries, positions = torch.arange(2.0).view(2, 1, 1, 1), torch.arange(2)[:, None]
    layer = KVLayer()
    layer.tokens = layer.prompt_tokens = torch.tensor([1, 1])
    layer.append(torch.zeros(2, 1, 1, DIM), torch.zeros(2, 1, 1, DIM), torch.zeros(2, 1), torch.tensor([1, 1]))
    layer.queries = (queries, positions)
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert layer.queries[0].flatten().tolist() == layer.queries[1].flatten().tolist() == [1, 1, 0]


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


def test_an_empty_layer_takes_any_order():
    layer = KVLayer()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.lengths is None and layer.get_seq_length() == 0


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
        assert [layer.tokens.tolist() for layer in run.cache.layers] == [[23, 14]] * 2
        assert [layer.prompt_tokens.tolist() for layer in run.cache.layers] == [[20, 11]] * 2
