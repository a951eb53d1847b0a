"""Column sums and eviction errors against the N x N matrix, their memory, and visibility."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.core import attention


def eager(query, key, query_positions, key_positions, scaling):
    """The definition: all weights of all rows, padding and empty slots left out, summed over queries."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    logits = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * scaling
    slots, rows = key_positions.repeat_interleave(group, dim=1)[:, :, None], query_positions[:, None, :, None]
    weights = logits.masked_fill((slots < 0) | (slots > rows), -torch.inf).softmax(-1)
    weights = weights.masked_fill(rows < 0, 0)
    return weights.sum(2).view(batch, key.shape[1], group, -1)


def inputs(batch, kv_heads, group, old, new, pads, gaps, dtype, seed=0):
    """Queries and keys after `old` stored tokens: rows with padding, heads with holes where tokens were evicted."""
    random = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, kv_heads * group, new, 8, generator=random, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, old + new, 8, generator=random, dtype=torch.float64)
    counts = new - torch.tensor([pads * row for row in range(batch)]).clamp(max=new)
    columns = torch.arange(new) - (new - counts)[:, None]
    query_positions = (old + gaps + columns).where(columns >= 0, -1)
    key_positions = torch.full((batch, kv_heads, old + new), -1)
    for row in range(batch):
        for head in range(kv_heads):
            stored = max(0, old - (row + head if gaps else 0))
            own = query_positions[row][query_positions[row] >= 0]
            text = torch.cat([torch.arange(old + gaps)[gaps : gaps + stored], own])
            key_positions[row, head, : len(text)] = text
    return query.to(dtype), key.to(dtype), query_positions, key_positions


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.integers(1, 12),
    st.integers(0, 5), st.integers(0, 3), st.integers(1, 14), st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_column_sums_are_those_of_the_matrix(batch, kv_heads, group, old, new, pads, gaps, block, seed):
    query, key, query_positions, key_positions = inputs(
        batch, kv_heads, group, old, new, pads, gaps, torch.float64, seed
    )
    sums = attention.column_sums(query, key, query_positions, key_positions, 0.5, block)
    expected = eager(query, key, query_positions, key_positions, 0.5)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-15)
    counted = (query_positions >= 0).sum(1)[:, None, None].double()
    torch.testing.assert_close(sums.sum(-1), counted.expand(sums.shape[:3]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("old, new", [(0, 40), (25, 40), (25, 1)])
def test_column_sums_without_positions_are_plain_causal(dtype, tolerance, old, new):
    query, key, query_positions, key_positions = inputs(2, 2, 3, old, new, 0, 0, dtype)
    expected = eager(query.double(), key.double(), query_positions, key_positions, 8**-0.5)
    for block in (None, 1, 7, 64):
        sums = attention.column_sums(query, key, block=block)
        assert sums.dtype == dtype
        torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_column_sums_of_half_precision_are_taken_in_float32(dtype):
    query, key, *_ = inputs(1, 2, 2, 0, 3000, 0, 0, dtype)
    key[:, :, 0] *= 4  # all look at the first token: in float16 ulp(2048) = 2 and the sum would stop growing
    sums = attention.column_sums(query, key)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, attention.column_sums(query.double(), key.double()).float(), rtol=1e-4, atol=1e-4)


def test_column_sums_of_nothing_are_nothing():
    # The first chunk of a row may be all padding.
    query, key = torch.randn(1, 4, 3, 8), torch.empty(1, 2, 0, 8)
    sums = attention.column_sums(query, key, torch.full((1, 3), -1), torch.empty(1, 2, 0, dtype=torch.int64))
    assert sums.shape == (1, 2, 2, 0)


def peak_memory(function, *arguments):
    """The most bytes that a call holds at a time beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return torch.tensor([size for _, size in changes]).cumsum(0).max()


def test_column_sums_need_blocks_and_not_the_matrix():
    heads, tokens = 8, 4096
    query, key = torch.randn(2, 1, heads, tokens, 8)
    # A block of 16 MiB exists as logits and as weights; the mask is a byte per logit. The matrix would be 512 MiB.
    assert 16 * 2**20 < peak_memory(attention.column_sums, query, key) < 56 * 2**20


# Eviction errors


def errors_by_hand(query, key, value, query_positions, key_positions, scaling):
    """The definition, query by query and key by key: a / (1 - a) x ||o - v||, a at most 1 - 1e-6."""
    batch, heads, new, _ = query.shape
    group = heads // key.shape[1]
    total = torch.zeros(batch, key.shape[1], group, key.shape[2], dtype=torch.float64)
    for row in range(batch):
        for h in range(heads):
            keys, values, places = (x[row, h // group] for x in (key, value, key_positions))
            for i in range(new):
                seen = [k for k, at in enumerate(places.tolist()) if 0 <= at <= query_positions[row, i]]
                if len(seen) < 2:
                    continue
                weights = (keys[seen] @ query[row, h, i] * scaling).softmax(0)
                output = weights @ values[seen]
                for k, weight in zip(seen, weights.clamp(max=1 - 1e-6)):
                    error = weight / (1 - weight) * torch.linalg.vector_norm(output - values[k])
                    total[row, h // group, h % group, k] += error
    return total


def values_for(key, dim=5):
    random = torch.Generator().manual_seed(7)
    return torch.randn(*key.shape[:3], dim, generator=random, dtype=torch.float64).to(key.dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 6), st.integers(1, 8),
    st.integers(0, 5), st.integers(0, 3), st.integers(1, 9), st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_eviction_errors_are_those_of_the_definition(batch, kv_heads, group, old, new, pads, gaps, block, seed):
    query, key, query_positions, key_positions = inputs(
        batch, kv_heads, group, old, new, pads, gaps, torch.float64, seed
    )
    arguments = query, key, values_for(key), query_positions, key_positions, 0.5
    errors = attention.eviction_errors(*arguments, block)
    torch.testing.assert_close(errors, errors_by_hand(*arguments), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("old, new", [(0, 20), (12, 20), (12, 1)])
def test_eviction_errors_without_positions_are_plain_causal(dtype, tolerance, old, new):
    query, key, query_positions, key_positions = inputs(2, 2, 3, old, new, 0, 0, dtype)
    value = values_for(key)
    expected = errors_by_hand(query.double(), key.double(), value.double(), query_positions, key_positions, 8**-0.5)
    for block in (None, 1, 7, 64):
        errors = attention.eviction_errors(query, key, value, block=block)
        assert errors.dtype == dtype
        torch.testing.assert_close(errors.double(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("logit", [4, 8, 12, 16, 25, 60, 200])
def test_eviction_errors_of_a_sink_are_as_exact_in_float32(logit):
    """At 16 the sink's weight is 1 - 1e-6: 1 - a as a difference would have one digit, and o - v none."""
    query = torch.zeros(1, 1, 9, 8)
    key, value = torch.zeros(1, 1, 9, 8), values_for(torch.zeros(1, 1, 9, 8))
    query[..., 0], key[:, :, 0, 0] = 1.0, logit
    errors = attention.eviction_errors(query, key, value, scaling=1.0)
    exact = attention.eviction_errors(query.double(), key.double(), value.double(), scaling=1.0)
    torch.testing.assert_close(errors.double(), exact, rtol=1e-5, atol=1e-9)
    if logit < 16:  # by the other way round: what the others make up is what the output becomes without the sink
        rest = torch.stack([value[0, 0, 1 : i + 1].double().mean(0) for i in range(1, 9)])
        alone = [torch.linalg.vector_norm(o - value[0, 0, 0].double()) for o in rest]
        weights = [1 / (1 + i * torch.tensor(-float(logit), dtype=torch.float64).exp()) for i in range(1, 9)]
        expected = sum(a * distance for a, distance in zip(weights, alone))
        torch.testing.assert_close(exact[0, 0, 0, 0], expected, rtol=1e-9, atol=0)


def test_eviction_errors_clip_the_weight():
    """A weight beyond 1 - 1e-6 counts as that: the error falls with 1 - a instead of staying."""
    query, key = torch.zeros(1, 1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    value = torch.tensor([[[[0.0, 0.0], [3.0, 4.0]]]], dtype=torch.float64)
    query[..., 0] = 1
    for logit, expected in ((0, 2.5), (13, 5.0), (20, 5.0 * 2.061e-9 * 999999)):
        key[:, :, 0, 0] = logit
        assert attention.eviction_errors(query, key, value, scaling=1.0)[0, 0, 0, 0] == pytest.approx(
            expected, rel=1e-3
        )


def test_eviction_moves_outputs_by_the_eviction_error():
    """T16: evict each token in turn and attend again."""
    query, key, *_ = inputs(1, 1, 3, 9, 1, 0, 0, torch.float64)
    value = values_for(key)

    def output(keys, values):
        return (query[0] @ keys.transpose(-1, -2) * 0.5).softmax(-1) @ values

    errors = attention.eviction_errors(query, key, value, scaling=0.5)
    for evicted in range(10):
        stay = [k for k in range(10) if k != evicted]
        moved = output(key[0, :, stay], value[0, :, stay]) - output(key[0], value[0])
        torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=-1)[:, 0], errors[0, 0, :, evicted])


def test_nothing_to_evict_is_no_error():
    query, key = torch.randn(1, 4, 3, 8), torch.empty(1, 2, 0, 8)  # a chunk that is all padding
    none = torch.full((1, 3), -1), torch.empty(1, 2, 0, dtype=torch.int64)
    assert attention.eviction_errors(query, key, key, *none).shape == (1, 2, 2, 0)
    query, key = torch.randn(2, 1, 1, 1, 8)  # a prompt of one token
    assert attention.eviction_errors(query, key, key).tolist() == [[[[0.0]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eviction_errors_of_half_precision_are_taken_in_float32(dtype):
    query, key, *_ = inputs(1, 2, 2, 0, 300, 0, 0, dtype)
    key[:, :, 0] *= 4
    value = values_for(key)
    errors = attention.eviction_errors(query, key, value)
    assert errors.dtype == torch.float32
    exact = attention.eviction_errors(query.double(), key.double(), value.double())
    torch.testing.assert_close(errors, exact.float(), rtol=1e-4, atol=1e-5)


def test_eviction_errors_need_blocks_and_not_the_matrix():
    query, key, value = torch.randn(3, 1, 8, 4096, 8)
    # A block of 16 MiB exists as logits and weights, and as distances in float64 and in float32.
    assert 64 * 2**20 < peak_memory(attention.eviction_errors, query, key, value) < 104 * 2**20
