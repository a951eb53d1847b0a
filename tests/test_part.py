"""Segments with room against lists of lists, whatever happens to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.core.part import ROOM, Memo, Part, most_room

DIM = 3


class Lists:
    """The same as a `Part`: one Python list of (key, value, position, state) per row and head, in text order."""

    def __init__(self, batch, heads):
        self.segments = [[[] for _ in range(heads)] for _ in range(batch)]
        self.tokens = [0] * batch

    def append(self, key, value, positions):
        for row, heads in enumerate(self.segments):
            for head, segment in enumerate(heads):
                for column, position in enumerate(positions[row].tolist()):
                    if position >= 0:
                        entry = key[row, head, column].tolist(), value[row, head, column].tolist(), position
                        segment.append((*entry, [[0, 0]] * 2))
            self.tokens[row] += int((positions[row] >= 0).sum())

    def select(self, rows):
        self.segments = [[list(head) for head in self.segments[row]] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]

    def each(self, change):
        self.segments = [
            [change(row, h, head) for h, head in enumerate(heads)] for row, heads in enumerate(self.segments)
        ]


def check(part: Part, lists: Lists) -> None:
    """The same entries in every segment, in any order of slots; nothing else has a position."""
    assert part.lengths.tolist() == [[len(head) for head in heads] for heads in lists.segments]
    flats = [part.fields["key"], part.fields["value"], part.positions, part.state["x"]]
    assert all(len(flat) == part.capacity.sum() for flat in flats)
    assert bool((part.lengths <= part.capacity).all())
    assert bool((part.capacity <= part.lengths + most_room(part.width)).all())
    held = part.lengths == part.lengths[0, 0], part.capacity == part.capacity[0, 0]
    assert part.uniform == all(bool(x.all()) for x in held)
    assert int((part.position_rectangle() >= 0).sum()) == int(part.lengths.sum())
    assert torch.equal(part.ends, part.lengths + part.vacant) and part.width == int(part.ends.max())
    assert torch.equal(part.starts.flatten(), part.capacity.flatten().cumsum(0) - part.capacity.flatten())
    key, value, state = (part.rectangle(flat) for flat in (*flats[:2], flats[3]))
    at = part.position_rectangle()
    if part.uniform and key.numel():
        assert key.data_ptr() == part.fields["key"].data_ptr()  # no copy
    for row, heads in enumerate(lists.segments):
        for head, segment in enumerate(heads):
            slots = [i for i, position in enumerate(at[row, head].tolist()) if position >= 0]
            entries = [tuple(x[row, head, i].tolist() for x in (key, value, at, state)) for i in slots]
            assert sorted(entries, key=lambda e: e[2]) == segment
            if part.ordered:
                assert entries == segment and slots == [*range(len(slots))]


def step(data, part, lists, random, even):
    """One thing that may happen to a part."""
    batch, heads = part.lengths.shape
    action = data.draw(
        st.sampled_from(["append", "one", "next", "next", "keep", "retire", "select", "order", "cut", "put", "reserve"])
    )
    if action in ("append", "one", "next"):
        new = 1 if action != "append" else data.draw(st.integers(1, 4))
        full = even or action != "append"
        counts = torch.tensor([new if full else data.draw(st.integers(0, new)) for _ in range(batch)])
        key, value = torch.randn(2, batch, heads, new, DIM, generator=random)
        index = torch.arange(new) - (new - counts)[:, None]
        if action == "one" and data.draw(st.booleans()):  # it need not be the next
            lists.tokens = [n + 2 for n in lists.tokens]
        positions = (torch.tensor(lists.tokens)[:, None] + index).where(index >= 0, -1)
        if new > 1:
            part.restore_order()
        if action == "next":
            part.append_one({"key": key, "value": value}, positions)
        else:
            part.append({"key": key, "value": value}, positions[:, None], counts[:, None].expand(-1, heads))
        part.state.setdefault("x", torch.zeros(len(part.positions), 2, 2))
        lists.append(key, value, positions)
    elif action == "keep":
        lengths, at = (part.lengths + 1) // 2, part.position_rectangle()
        noise = torch.rand(at.shape, generator=random).where(at >= 0, -1)
        mask = noise.argsort(-1, descending=True).argsort(-1) < lengths[..., None]
        stays = [
            [{p for p, keep in zip(at[r, h].tolist(), mask[r, h].tolist()) if keep} for h in range(heads)]
            for r in range(batch)
        ]
        part.keep(mask, lengths)
        lists.each(lambda r, h, segment: [entry for entry in segment if entry[2] in stays[r][h]])
    elif action == "retire" and not part.vacant and bool((part.lengths > 0).all()):
        at = part.position_rectangle()
        score = torch.rand(at.shape, generator=random).mul(4).round()  # with ties
        least = score.masked_fill(at < 0, torch.inf).amin(-1, keepdim=True)
        gone = at.where(score == least, -1).amax(-1)
        if data.draw(st.booleans()):
            part.retire_weakest(score)
        else:
            part.retire((at == gone[..., None]).long().argmax(-1))
        gone = gone.tolist()
        lists.each(lambda r, h, segment: [entry for entry in segment if entry[2] != gone[r][h]])
    elif action == "select":
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        part.select(torch.tensor(rows))
        lists.select(rows)
    elif action == "order":
        part.restore_order()
        assert part.ordered and not part.vacant
    elif action == "cut":
        lengths = part.lengths // 2
        part.truncate(lengths)
        lists.each(lambda r, h, segment: segment[: int(lengths[r, h])])
    elif action == "put":
        part.put(part.state, "x", part.rectangle(part.state["x"]) * 1)
        part.put(part.state, "y", torch.ones(part.position_rectangle().shape))
        assert part.rectangle(part.state["y"])[part.position_rectangle() >= 0].eq(1).all()
        del part.state["y"]
        if part.intact and part.uniform and not part.vacant and part.ordered and int(part.lengths[0, 0]):
            noted = torch.randn(batch, heads, 1, 2, 2, generator=random)
            part.put(part.state, "z", torch.zeros(*part.position_rectangle().shape, 2, 2))
            part.set_last("z", noted)
            assert torch.equal(part.rectangle(part.state.pop("z"))[:, :, -1:], noted)
    elif action == "reserve":
        room = int((part.capacity - part.extent).max())
        if room + 2 < ROOM - 2:
            before = part.capacity
            part.reserve(room + 2)
            assert bool((part.capacity == part.extent + room + 2).all()) and bool((part.capacity >= before).all())


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_history_leaves_what_lists_would_hold(data, batch, heads, even, remembering):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    memo = Memo()
    memo.open = remembering  # a pass that never ends
    part, lists = Part(batch, heads, "cpu", memo=memo), Lists(batch, heads)
    key, value = torch.randn(2, batch, heads, 3, DIM, generator=random)
    positions, counts = torch.arange(3).expand(batch, 3), torch.full((batch, heads), 3)
    part.append({"key": key, "value": value}, positions[:, None], counts)
    part.state["x"] = torch.zeros(len(part.positions), 2, 2)
    lists.append(key, value, positions)
    for _ in range(data.draw(st.integers(1, 8))):
        step(data, part, lists, random, even)
        check(part, lists)


def filled(lengths, dim=DIM):
    """A part with these `(batch, heads)` lengths, appended at once; entry i of a segment has the key i."""
    counts = torch.tensor(lengths)
    part, new = Part(*counts.shape, "cpu"), int(counts.max())
    at = torch.arange(new).where(torch.arange(new) < counts[..., None], -1)
    part.append({"key": at[..., None].expand(*at.shape, dim).double()}, at, counts, skip=torch.zeros_like(counts))
    return part


@pytest.mark.parametrize(
    "lengths",
    [[[5, 5], [5, 5]], [[2, 5], [4, 0]], [[3000] * 2] * 2, [[2, 3000], [4, 0]]],
    ids=["equal", "ragged", "equal and long", "ragged and long"],
)
def test_room_grows_to_its_bound_and_is_given_back(lengths):
    part, rooms = filled(lengths), []
    for token in range(3 * ROOM):
        storage = part.fields["key"].data_ptr()
        key = torch.full((2, 2, 1, DIM), 9.0, dtype=torch.double)
        part.append({"key": key}, torch.full((2, 1, 1), 100 + token), torch.ones(2, 2, dtype=torch.int64))
        room = int((part.capacity - part.lengths).max())
        assert bool((part.capacity - part.lengths == room).all())
        if part.fields["key"].data_ptr() != storage:
            rooms.append(room + 1)
    longest = max(map(max, lengths))
    most = [max(ROOM, (longest + sum(rooms[:i])) // 32) for i in range(len(rooms))]
    assert rooms == [min(x, 4**i) for i, x in enumerate(most)] and max(rooms) == (ROOM if longest < 3000 else 99)
    assert most == [most_room(longest + sum(rooms[:i])) for i in range(len(rooms))]
    part.keep(part.position_rectangle() >= 0, part.lengths)
    assert torch.equal(part.capacity, part.lengths)


@pytest.mark.parametrize("lengths", [[[5, 5], [5, 5]], [[2, 5], [4, 3]]], ids=["equal", "ragged"])
def test_one_in_for_one_out_moves_nothing(lengths):
    part = filled(lengths)
    one = torch.ones(2, 2, dtype=torch.int64)

    def append(token):
        part.append(
            {"key": torch.full((2, 2, 1, DIM), float(token), dtype=torch.double)}, torch.full((2, 1, 1), token), one
        )

    append(90)
    storage, places = part.fields["key"].data_ptr(), part.position_rectangle().clone()
    for token in range(91, 120):
        victim = torch.full((2, 2), token % 2)
        part.retire(victim)
        append(token)
        places.scatter_(2, victim[..., None], token)
        assert part.fields["key"].data_ptr() == storage
        assert torch.equal(part.position_rectangle(), places)
    assert not part.ordered


def test_more_room_than_is_laid_out_at_once():
    part, key = filled([[3000, 3000]]), torch.ones(1, 2, 1, DIM).double()
    for position in range(3000, 3000 + 21 + 200):
        part.append_one({"key": position * key}, torch.tensor([[position]]))
    assert part.position_rectangle().tolist() == [[[*range(3221)]] * 2]
    assert part.rectangle(part.fields["key"])[0, 1, :, 0].tolist() == [*range(3221)]


def test_what_was_laid_out_gives_way():
    """Positions and places of coming tokens are prepared; an entry from elsewhere, or a new form, is not among them."""
    part, key = filled([[3, 3]]), torch.ones(1, 2, 1, DIM).double()
    one = torch.ones(1, 2, dtype=torch.int64)
    for position in (3, 4):
        part.append_one({"key": key}, torch.tensor([[position]]))
    part.append({"key": key}, torch.tensor([[[9]]]), one)
    part.append_one({"key": 2 * key}, torch.tensor([[10]]))
    assert part.position_rectangle().tolist() == [[[0, 1, 2, 3, 4, 9, 10]] * 2]
    for position in (11, 12):
        part.append_one({"key": key}, torch.tensor([[position]]))
    part.put(part.fields, "key", part.rectangle(part.fields["key"]).float())
    part.append_one({"key": 3 * key.float()}, torch.tensor([[13]]))
    assert part.position_rectangle().tolist() == [[[0, 1, 2, 3, 4, 9, 10, 11, 12, 13]] * 2]
    assert part.rectangle(part.fields["key"])[0, 1, :, 0].tolist() == [0, 1, 2, 1, 1, 1, 2, 1, 1, 3]


@pytest.mark.parametrize("lengths", [[[5, 5], [5, 5]], [[2, 5], [4, 0]]], ids=["equal", "ragged"])
def test_the_device_counts_tokens_as_they_come(lengths):
    part, key = filled(lengths), torch.ones(2, 2, 1, DIM).double()
    for position in range(5, 15):  # there is room for one, then for four more, then for sixteen
        part.append_one({"key": key}, torch.tensor([[position]] * 2))
        assert torch.equal(part.ends, part.lengths) and part.lengths[0, 0] == lengths[0][0] + position - 4


@pytest.mark.parametrize("lengths", [[[5, 5], [5, 5]], [[2, 5], [4, 0]]], ids=["equal", "ragged"])
def test_room_holds_zeros(lengths):
    """A weight of 0 does not hide what is not a number."""
    part = filled(lengths)
    part.reserve(3)
    unused = part.positions < 0
    assert unused.sum() == 12 and not part.fields["key"][unused].any()


def test_two_cannot_go_at_once():
    part = filled([[3]])
    part.retire(torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match="one entry at a time"):
        part.retire(torch.tensor([[2]]))


def test_new_entries_begin_with_empty_state_where_an_old_one_was():
    part = filled([[3, 3]])
    part.put(part.state, "x", torch.ones(1, 2, 3))
    part.retire(torch.tensor([[1, 2]]))
    part.append({"key": torch.zeros(1, 2, 1, DIM).double()}, torch.tensor([[[3]]]), torch.ones(1, 2, dtype=torch.int64))
    assert part.rectangle(part.state["x"]).tolist() == [[[1, 0, 1], [1, 1, 0]]]


def test_gradients_pass_through_a_single_token():
    part, key = filled([[2]]), torch.ones(1, 1, 1, DIM, dtype=torch.double, requires_grad=True)
    part.append({"key": key}, torch.tensor([[[2]]]), torch.ones(1, 1, dtype=torch.int64))
    part.rectangle(part.fields["key"]).sum().backward()
    assert key.grad.sum() == DIM


def test_gradients_pass_through_a_token_into_room_that_is_laid_out():
    part, at = Part(1, 2, torch.device("cpu")), 0
    for at in range(12):  # the last ones into room that was prepared
        with torch.no_grad():
            part.with_one(*torch.randn(2, 1, 2, 1, DIM), torch.tensor([[at]]))
    key, value = torch.randn(2, 1, 2, 1, DIM).unbind()
    key.requires_grad_()
    keys, values = part.with_one(key, value, torch.tensor([[at + 1]]))
    keys.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key)) and torch.equal(values[:, :, -1:], value)


def test_groups_of_tokens_are_entries():
    part = Part(2, 1, "cpu", size=4)
    at = torch.arange(12).view(1, 1, 3, 4).expand(2, 1, 3, 4)
    counts = torch.tensor([[3], [1]])
    part.append(
        {"code": torch.arange(3).view(1, 1, 3, 1).expand(2, 1, 3, 1)}, at, counts, skip=torch.zeros_like(counts)
    )
    assert part.tokens.tolist() == [[12], [4]]
    assert part.fields["code"].flatten().tolist() == [0, 1, 2, 0]
    assert part.position_rectangle().flatten(2).tolist() == [[[*range(12)]], [[0, 1, 2, 3] + [-1] * 8]]


@torch.no_grad()
def test_what_comes_with_one_more_is_the_rectangles_wherever_memory_lies():
    part, twin = Part(2, 3, torch.device("cpu")), Part(2, 3, torch.device("cpu"))
    for at in range(100):
        key, value = torch.randn(2, 2, 3, 1, 4)
        part.intact = False
        found = part.with_one(key, value, torch.full((2, 1), at))
        assert part.intact
        twin.append_one({"key": key, "value": value}, torch.full((2, 1), at))
        for name, rectangle in zip(("key", "value"), found, strict=True):
            assert torch.equal(rectangle, part.rectangle(part.fields[name]))
            assert torch.equal(rectangle, twin.rectangle(twin.fields[name]))
        assert torch.equal(part.position_rectangle(), twin.position_rectangle())
        assert torch.equal(part.ends, twin.ends) and torch.equal(part.ends, part.lengths)
        for each in (part, twin):
            if at == 40:
                each.select(torch.tensor([1, 0]))
            if at == 60:
                each.truncate(each.lengths - 3)
            if at == 80:
                each.put(each.fields, "key", each.rectangle(each.fields["key"]).double().float())
                each.put(each.fields, "value", each.rectangle(each.fields["value"]).double())
            if at == 90:
                each.put(each.fields, "value", each.rectangle(each.fields["value"]).float())
    assert part.lengths.tolist() == [[97] * 3] * 2
