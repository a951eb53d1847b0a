"""The GPU paths against their references: kernels in Triton's interpreter where there is no GPU (`conftest.py`)."""

import pytest
import torch

from kvlib import kernels
from kvlib.core import attention, layout, part

pytest.importorskip("triton")

from kvlib.kernels import newest, rows, weakest

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


# Kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("count, taken, dim", [(1, 1, 1), (300, 1000, 24), (70, 33, 128), (9, 0, 64)])
def test_the_kernel_takes_rows_as_indexing_does(count, taken, dim, dtype):
    torch.manual_seed(count + dim)
    flat = (100 * torch.randn(count, 2 * dim, device=DEVICE)).to(dtype)
    index = torch.randint(count, (2 * taken,), device=DEVICE)[::2]
    for source in (flat[:, :dim].clone(), flat[:, dim:]):  # the second is not contiguous
        assert torch.equal(rows.take(source, index), source[index])


@pytest.mark.parametrize("filling", [False, True], ids=["behind the last", "in a hole"])
@pytest.mark.parametrize("dtype, dim", [(torch.float64, 24), (torch.bfloat16, 16), (torch.int8, 5)])
def test_the_kernel_writes_what_the_reference_does(dtype, dim, filling, monkeypatch):
    parts = []
    for decoding in (True, False):
        monkeypatch.setattr(kernels, "decoding", decoding)
        random = torch.Generator().manual_seed(dim)
        made, counts = part.Part(2, 3, DEVICE), torch.tensor([[4, 1, 3], [2, 5, 5]])

        def chunk(new, random=random):
            pair = (100 * torch.randn(2, 2, new, 3, dim, generator=random)).to(dtype).transpose(2, 3)
            return dict(zip(("key", "value"), pair.to(DEVICE)))  # not contiguous

        at = torch.arange(5).where(torch.arange(5) < counts[..., None], -1).to(DEVICE)
        made.append(chunk(5), at, counts, skip=torch.zeros_like(counts))
        for position in (6, 7):
            if filling and position == 7:
                made.retire(torch.tensor([[1, 0, 3], [2, 4, 0]], device=DEVICE))
            made.append_one(chunk(1), torch.tensor([[position], [position + 1]], device=DEVICE))
        parts.append(made)
    one, other = parts
    assert torch.equal(one.positions, other.positions) and torch.equal(one._last, other._last)
    assert torch.equal(one.ends, other.ends) and torch.equal(one.ends.cpu(), one.lengths)
    written = one.positions >= 0
    assert written.sum() == counts.sum() + (6 if filling else 12)
    for name in ("key", "value"):
        assert torch.equal(one.fields[name][written], other.fields[name][written])


def test_the_kernel_writes_keys_and_values_of_one_form_alone():
    key, at = torch.zeros(4, 8), torch.zeros(2, 1)
    whole = {"key": key, "value": key}
    assert newest.serves(whole, whole, at)
    for other in ({"key": key}, whole | {"value": key[:, :4]}, whole | {"value": key.double()}, whole | {"scale": key}):
        assert not newest.serves(other, other, at)
    assert not newest.serves(whole, whole | {"key": key.double()}, at) and not newest.serves(
        whole, whole, at[..., None]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "batch, heads, slots, size", [(1, 1, 1, 1), (2, 3, 7, 9), (1, 2, 1500, 1564), (2, 1, 2048, 2048)]
)
def test_the_kernel_evicts_what_the_reference_does(batch, heads, slots, size, dtype):
    torch.manual_seed(slots)
    positions = torch.stack([torch.randperm(size) for _ in range(batch * heads)]).int().to(DEVICE)
    positions[:, :slots].masked_fill_(torch.rand(batch * heads, slots, device=DEVICE) < 0.1, -1)  # empty slots
    positions[:, slots - 1] = size  # but not all
    seen = positions[:, :slots].view(batch, heads, slots)
    for score in (
        torch.randint(3, (batch, heads, slots), device=DEVICE).to(dtype),  # ties
        torch.randn(batch, slots, heads, device=DEVICE, dtype=dtype).mT,
        torch.randn(batch, 1, slots, device=DEVICE, dtype=dtype).expand(batch, heads, slots),
        torch.full((batch, heads, slots), torch.inf, device=DEVICE, dtype=dtype),  # all protected
    ):
        slot = part.weakest(score.masked_fill(seen < 0, torch.inf), seen).flatten()
        want = torch.arange(batch * heads, device=DEVICE) * size + slot
        marked = positions.clone()
        assert torch.equal(weakest.retire(score, marked.flatten(), size), want)
        assert torch.equal(marked.flatten(), positions.flatten().index_fill(0, want, -1))


# Where they are used


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 32), (8, 2, 64), (6, 2, 24)])
@pytest.mark.parametrize("new, slots", [(2, 2), (63, 63), (64, 200), (257, 257), (130, 500)])
def test_column_sums_equal_the_blocked_pass(new, slots, heads, kv_heads, dim, dtype):
    torch.manual_seed(new + slots)
    query = (2 * torch.randn(2, heads, new, dim, device="cuda")).to(dtype)
    key = (2 * torch.randn(2, kv_heads, slots, dim, device="cuda")).to(dtype)
    exact = attention.column_sums(query.double(), key.double())
    torch.testing.assert_close(attention.column_sums(query, key).double(), exact, rtol=1e-5, atol=1e-5)


@on_gpu
def test_column_sums_with_padding_and_holes():
    torch.manual_seed(0)
    new, slots = 100, 150
    query, key = torch.randn(2, 4, new, 32, device="cuda"), torch.randn(2, 2, slots, 32, device="cuda")
    query_positions = torch.arange(slots - new, slots, device="cuda").expand(2, new).clone()
    query_positions[1, :70] = -1  # a row of which only the last 30 queries are real
    key_positions = torch.arange(slots, device="cuda").expand(2, 2, slots).clone()
    key_positions[1, :, -20:] = -1  # and whose segments are shorter
    got = attention.column_sums(query, key, query_positions, key_positions)
    exact = attention.column_sums(query.double(), key.double(), query_positions, key_positions)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert (got[1, :, :, -20:] == 0).all()
    torch.testing.assert_close(got[1].sum(-1), torch.full((2, 2), 30.0, device="cuda"))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("count, taken, dim", [(300, 1000, 24), (5000, 4097, 32)])
def test_taking_rows_is_indexing(count, taken, dim, dtype):
    torch.manual_seed(count + dim)
    flat = (100 * torch.randn(count, 2 * dim, device="cuda")).to(dtype)
    index = torch.randint(count, (2 * taken,), device="cuda")[::2]
    for source in (flat[:, :dim].clone(), flat[:, dim:]):  # the second is not contiguous
        assert torch.equal(layout.take(source, index), source[index])


@on_gpu
def test_taking_rows_keeps_gradients():
    flat = torch.randn(5, 4, device="cuda", requires_grad=True)
    layout.take(flat, torch.tensor([3, 3, 0], device="cuda")).sum().backward()
    assert flat.grad.sum(1).tolist() == [4, 0, 0, 8, 0]


@on_gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 32), (8, 2, 64)])
@pytest.mark.parametrize("new, slots", [(1, 200), (257, 257), (130, 500)])
def test_eviction_errors_equal_those_in_float64(new, slots, heads, kv_heads, dim):
    torch.manual_seed(new + slots)
    query = 2 * torch.randn(2, heads, new, dim, device="cuda")
    key, value = torch.randn(2, 2, kv_heads, slots, dim, device="cuda")
    value[:, :, 1:4] = value[:, :, :1]  # where one of them takes all attention, o - v is small
    exact = attention.eviction_errors(query.double(), key.double(), value.double())
    torch.testing.assert_close(attention.eviction_errors(query, key, value).double(), exact, rtol=1e-4, atol=1e-5)
