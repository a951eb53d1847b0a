"""Decode attention over slots against the references of the core: in Triton's interpreter where there is no GPU."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.core import attention, layout

pytest.importorskip("triton")

from kvlib.kernels import decode
from kvlib.kernels.decode import Tiling
from kvlib.methods.systems import int8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LISTS = "none", "kv head", "query head"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


class Case:
    """Random segments `lengths` `(batch, kv_heads)` for `group` query heads each; what nobody may read is not a number.

    listed: whose lists of slots there are. hiding: some slots have the position -1. repeats: lists may name a slot
    twice. Between the segments there is room.
    """

    def __init__(self, lengths, group, dim, listed="none", hiding=False, repeats=False, dtype=torch.float32):
        torch.manual_seed(sum(map(sum, lengths)) + 7 * group + dim)
        self.lengths = torch.tensor(lengths)
        batch, kv_heads = self.lengths.shape
        self.capacity = self.lengths + torch.randint(4, self.lengths.shape)
        self.most = max(1, int(self.lengths.max()))
        self.index, filled = layout.slots(self.capacity, self.capacity, "cpu")
        readable = filled & (torch.arange(self.index.shape[-1]) < self.lengths[..., None])
        self.positions = torch.zeros(int(self.capacity.sum()), dtype=torch.int32) if hiding else None
        if hiding:
            self.positions[torch.rand(len(self.positions)) < 0.3] = -1
            readable &= self.positions[self.index] >= 0
        self.key, self.value = 2 * torch.randn(2, int(self.capacity.sum()), dim).to(dtype)
        unread = torch.ones(len(self.key), dtype=torch.bool)
        unread[self.index[readable]] = False
        self.key[unread] = self.value[unread] = torch.nan
        self.query = torch.randn(batch, kv_heads * group, dim).to(dtype)
        self.slots = None
        if listed != "none":
            heads = kv_heads if listed == "kv head" else kv_heads * group
            of = torch.arange(heads) // (heads // kv_heads)
            self.index, readable = self.index[:, of], readable[:, of]
            order = torch.rand(self.index.shape).argsort(-1)[..., : max(1, self.most // 2)]
            self.slots = order.where(torch.rand(order.shape) < 0.8, -1)
            if repeats:
                self.slots[..., -1] = self.slots[..., 0]
            place = self.slots.clamp(min=0)
            self.index, readable = self.index.gather(2, place), readable.gather(2, place) & (self.slots >= 0)
        self.readable = readable

    def expected(self, scaling=None):
        """Weights `(batch, query_heads, width)`, output and log-sum-exp in float64 by the functions of the core."""
        hidden = ~self.readable[..., None]
        key, value = (x.double()[self.index].masked_fill(hidden, 0) for x in (self.key, self.value))
        heads, query = key.shape[1], self.query.double()
        weights = attention.weights(query[:, :, None], key, self.readable.long() - 1, scaling).nan_to_num(0.0)
        output = torch.einsum("bhgk,bhkd->bhgd", weights, value).flatten(1, 2)
        scaling = key.shape[-1] ** -0.5 if scaling is None else scaling
        logits = torch.einsum("bhgd,bhkd->bhgk", query.unflatten(1, (heads, -1)), key) * scaling
        logits = logits.masked_fill(hidden[:, :, None, :, 0], -torch.inf).flatten(1, 2)
        return weights.flatten(1, 2), output, logits.logsumexp(-1)

    def attend(self, most=None, **more):
        starts = layout.starts(self.capacity)
        place = {name: None if x is None else x.to(DEVICE) for name, x in vars(self).items() if name in PLACED}
        tensors = (x.to(DEVICE) for x in (self.query, self.key, self.value, starts, self.lengths))
        with mock.patch("torch.empty", poisoned):
            return decode.attend(*tensors, most or self.most, **(place | more))


PLACED = "slots", "positions"


def poisoned(*shape, **more):
    """Memory in which what is not written shows."""
    return torch.full(shape, torch.nan, **more)


def check(case, scaling=None, **more):
    got, (weights, output, lse) = case.attend(scaling=scaling, scoring=True, **more), case.expected(scaling)
    close = {"rtol": TOLERANCE[case.key.dtype], "atol": TOLERANCE[case.key.dtype]}
    assert got.output.dtype == case.query.dtype and got.lse.dtype == got.logits.dtype == torch.float32
    torch.testing.assert_close(got.output.double().cpu(), output, **close)
    torch.testing.assert_close(got.lse.double().cpu(), lse, **close)
    found = decode.weights(got).double().cpu()
    width = min(found.shape[-1], weights.shape[-1])  # a rectangle has room, and `most` may be larger
    torch.testing.assert_close(found[..., :width], weights[..., :width], **close)
    assert (found[..., width:] == 0).all() and (weights[..., width:] == 0).all()
    torch.testing.assert_close(found.sum(-1), (lse > -torch.inf).double(), **close)
    plain = case.attend(scaling=scaling, **more)
    assert plain.logits is None and torch.equal(plain.output, got.output) and torch.equal(plain.lse, got.lse)


DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not GPU, reason="the interpreter knows no bfloat16 dot")),
]


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]])
@pytest.mark.parametrize("group, dim, listed", [(1, 128, "none"), (3, 24, "query head"), (4, 64, "kv head")])
def test_codes_are_read_as_what_they_stand_for(group, dim, listed, dtype):
    case = Case([[70, 1, 300], [5, 64, 131]], group, dim, listed, hiding=listed == "none", dtype=dtype)
    unread = case.key.isnan().any(1, keepdim=True)
    codes = {
        name: int8.codes(x.nan_to_num(), x.nan_to_num())["key"]
        for name, x in (("key", case.key), ("value", case.value))
    }
    scales = [torch.rand(len(unread), 1).half() / 50 for _ in range(2)]
    for (name, code), scale in zip(codes.items(), scales):
        setattr(case, name, (code.to(dtype) * scale.to(dtype)).double())
    weights, output, lse = case.expected()
    stored = [scale.masked_fill(unread, torch.nan).to(DEVICE) for scale in scales]  # what is hidden is not read
    case.key, case.value = codes.values()
    got = case.attend(scales=tuple(stored), scoring=True)
    assert got.output.dtype == dtype
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.output.double().cpu(), output, **close)
    torch.testing.assert_close(got.lse.double().cpu(), lse, **close)
    found = decode.weights(got).double().cpu()
    width = min(found.shape[-1], weights.shape[-1])
    torch.testing.assert_close(found[..., :width], weights[..., :width], **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "group, dim, listed",
    [
        (1, 128, "none"),
        (1, 128, "kv head"),
        (3, 24, "query head"),
        (4, 64, "kv head"),
        (8, 32, "none"),
        (20, 8, "kv head"),
    ],
)
def test_groups_and_dimensions_of_heads(group, dim, listed, dtype):
    check(Case([[0, 1], [65, 130]], group, dim, listed, dtype=dtype), tiling=Tiling(block=32, programs=12))


@settings(max_examples=15)
@given(
    lengths=st.lists(
        st.lists(st.one_of(st.sampled_from([0, 1, 15, 16, 17, 32, 64]), st.integers(0, 100)), min_size=2, max_size=2),
        min_size=1,
        max_size=2,
    ),
    group=st.sampled_from([1, 2, 3, 4]),
    dim=st.sampled_from([8, 16, 24]),
    listed=st.sampled_from(LISTS),
    hiding=st.booleans(),
    repeats=st.booleans(),
    block=st.sampled_from([16, 32]),
    programs=st.integers(1, 40),
    beyond=st.sampled_from([0, 1, 40]),
    scaling=st.sampled_from([None, 1.0, 0.05]),
)
def test_any_segments_lists_and_splits(lengths, group, dim, listed, hiding, repeats, block, programs, beyond, scaling):
    case = Case(lengths, group, dim, listed, hiding, repeats)
    tiling = Tiling(block=block, programs=programs)
    check(case, scaling, most=case.most + beyond, tiling=tiling)


def test_splits_are_combined_whatever_their_number():
    case = Case([[333, 400]], 2, 16)
    alone = case.attend(tiling=Tiling(block=16, programs=1))
    for splits in (2, 3, 25, 10_000):  # 25: as many as blocks
        got = case.attend(tiling=Tiling(block=16, programs=2 * splits))
        torch.testing.assert_close(got.output, alone.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.lse, alone.lse, rtol=1e-5, atol=1e-6)


def test_more_splits_than_are_combined_at_a_time():
    case, first = Case([[decode.PARTS * 16 + 40, 1]], 1, 16), decode.PARTS * 16
    case.key[first:] *= 3  # the largest logits come later
    check(case, tiling=Tiling(block=16, programs=10_000))


def test_large_logits_do_not_overflow():
    case = Case([[70, 3]], 4, 16)
    case.query *= 200
    check(case, tiling=Tiling(block=16, programs=6))


def test_lists_of_either_integer_and_views_of_one_list():
    case = Case([[90, 50]], 3, 16, "kv head")
    case.slots = case.slots[:, :1].expand(-1, 2, -1)  # as methods share a list among heads
    found = [case.attend(slots=case.slots.to(DEVICE, dtype)) for dtype in (torch.int32, torch.int64)]
    each = case.attend(slots=case.slots.repeat_interleave(3, dim=1).to(DEVICE))
    for other in (found[1], each):
        torch.testing.assert_close(found[0].output, other.output, rtol=1e-6, atol=1e-6)


def test_nothing_to_read_at_all():
    got = Case([[0, 0]], 3, 16).attend(scoring=True)
    assert (got.output == 0).all() and (got.lse == -torch.inf).all() and (decode.weights(got) == 0).all()


@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
def test_a_captured_graph_reads_lengths_on_the_device():
    case = Case([[200, 300]], 4, 64, dtype=torch.bfloat16)
    tensors = [x.to(DEVICE) for x in (case.query, case.key, case.value, layout.starts(case.capacity), case.lengths)]
    decode.attend(*tensors, case.most)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode.attend(*tensors, case.most)
    for lengths in ([[200, 300]], [[0, 17]], [[150, 299]]):
        tensors[-1].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(got.output, decode.attend(*tensors, case.most).output)
