"""Matrix entropy: an oracle by SVD and loops, closed forms, what it does not depend on and what it does."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.methods.entropy import density, effective_rank, entropy, participation_ratio, spectrum, truncation

DOUBLE = {"dtype": torch.float64}
seeds = st.integers(0, 10_000)
sizes = {"tokens": st.integers(2, 40), "d": st.integers(2, 20)}  # either side of the matrix is the smaller one


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def uneven(seed, *shape):
    """Tokens whose directions are not filled alike, away from the origin, of different norms."""
    scale = torch.arange(1, shape[-1] + 1, **DOUBLE) ** -1.0
    return (draw(seed, *shape) * scale + draw(seed + 1, shape[-1])) * (1 + draw(seed + 2, *shape[:-1], 1).abs())


def with_spectrum(values):
    """Tokens with these eigenvalues: ± a basis vector, in proportion to whole numbers."""
    basis = torch.eye(len(values), **DOUBLE)
    return torch.cat([x.expand(count, -1) for row, count in zip(basis, values) for x in (row, -row)])


def oracle(tokens, centred=True, unit=True):
    """Probabilities of directions: squared singular values of the unit rows, descending, by numpy."""
    tokens = tokens.numpy()
    rows = [row - (tokens.mean(0) if centred else 0) for row in tokens]
    rows = [row / np.linalg.norm(row) if unit else row for row in rows]
    values = np.linalg.svd(np.stack(rows), compute_uv=False) ** 2
    return values / values.sum()


def shannon(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


@given(**sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_it_is_the_shannon_entropy_of_squared_singular_values(tokens, d, seed):
    x = uneven(seed, tokens, d)
    found, values = spectrum(x), oracle(x)
    assert found.shape == (d,) and float(found.sum()) == pytest.approx(1)
    assert found.tolist() == pytest.approx([*values, *[0] * (d - len(values))], abs=1e-10)
    for k in range(1, d + 1):
        assert float(entropy(found, k)) == pytest.approx(shannon(values[:k]), abs=1e-10)
        again = shannon(values[:k] / values[:k].sum())
        assert float(entropy(found, k, renormalised=True)) == pytest.approx(again, abs=1e-10)
        assert float(effective_rank(found, k, renormalised=True)) == pytest.approx(math.exp(again), abs=1e-8)
    assert float(entropy(found)) == pytest.approx(shannon(values), abs=1e-10)
    assert float(effective_rank(found)) == pytest.approx(math.exp(shannon(values)), abs=1e-8)
    assert float(participation_ratio(density(x))) == pytest.approx(1 / sum(values**2), abs=1e-8)


@given(**sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_smaller_side_is_taken_and_both_agree(tokens, d, seed):
    x = uneven(seed, tokens, d)
    assert density(x).shape == (min(tokens, d),) * 2
    padded = torch.cat([torch.full((d, d), torch.nan, **DOUBLE), x])  # so many rows that features are the smaller side
    real = torch.arange(d + tokens) >= d
    assert density(padded, real).shape == (d, d)
    torch.testing.assert_close(spectrum(padded, real), spectrum(x), rtol=0, atol=1e-12)


@given(seed=seeds, d=st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_tokens_on_a_line_have_entropy_0(seed, d):
    x = draw(seed, 30, 1) * draw(seed + 1, d)
    assert float(entropy(spectrum(x))) == pytest.approx(0, abs=1e-9)
    assert float(participation_ratio(density(x))) == pytest.approx(1)


@pytest.mark.parametrize("d", [2, 32, 128])
def test_tokens_in_all_directions_alike_have_entropy_ln_d(d):
    x = with_spectrum([1] * d)
    assert float(entropy(spectrum(x))) == pytest.approx(math.log(d), abs=1e-12)
    assert float(effective_rank(spectrum(x))) == pytest.approx(d) == float(participation_ratio(density(x)))


@given(m=st.integers(1, 16), k=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
def test_a_flat_spectrum_on_m_directions(m, k):
    found = spectrum(with_spectrum([1] * m + [0] * (16 - m)))
    assert float(entropy(found, k)) == pytest.approx(min(1, k / m) * math.log(m), abs=1e-12)
    assert float(entropy(found, k, renormalised=True)) == pytest.approx(math.log(min(k, m)), abs=1e-12)


def test_the_truncated_entropy_of_power_laws():
    """Not renormalised it falls on both sides of α = 1, while all others rise with every spectrum that is flatter."""
    laws = [torch.arange(1, 129, **DOUBLE) ** -alpha for alpha in (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)]
    laws = torch.stack([law / law.sum() for law in laws])
    k = truncation(128)
    assert k == 32 and truncation(3) == 1
    truncated, renormalised = (4, 6.84, 10.7), (32.0, 28.3, 17.7, 8.57, 4.35, 1.40)
    assert entropy(laws, k).tolist() == pytest.approx([1.213, 1.922, 2.366, 2.064, 1.463, 0.334], abs=5e-4)
    assert effective_rank(laws, k)[1:3].tolist() == pytest.approx(truncated[1:], rel=5e-3)
    assert effective_rank(laws, k, renormalised=True).tolist() == pytest.approx(renormalised, rel=5e-3)
    assert entropy(laws).tolist() == pytest.approx([4.852, 4.673, 3.849, 2.567, 1.583, 0.334], abs=5e-4)


@given(**sizes, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_what_it_does_not_depend_on(tokens, d, seed):
    x = uneven(seed, tokens, d)
    expected = spectrum(x)
    rotation = torch.linalg.qr(draw(seed + 3, d, d)).Q
    permutation = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    for same in (x[permutation], x * 37.0, x * 1e-6, x + 5 * draw(seed + 4, d), x @ rotation):
        torch.testing.assert_close(spectrum(same), expected, rtol=0, atol=1e-9)


def test_what_it_depends_on():
    """Positions (each row turned by an angle of its own), centring, and the norms of rows."""
    x = uneven(5, 200, 16)
    expected = float(entropy(spectrum(x)))
    first, second = x.chunk(2, dim=-1)
    angle = torch.arange(200.0, **DOUBLE)[:, None] * torch.logspace(0, -3, 8, **DOUBLE)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    assert float(entropy(spectrum(turned))) > expected + 0.2
    for other in (oracle(x, centred=False), oracle(x, unit=False)):
        assert abs(shannon(other) - expected) > 0.05
    assert shannon(oracle(x)) == pytest.approx(expected, abs=1e-10)


@given(**sizes, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_it_grows_with_k_up_to_the_directions_there_are(tokens, d, seed):
    x = uneven(seed, tokens, d)
    found = spectrum(x)
    assert found.tolist() == sorted(found.tolist(), reverse=True) and float(found[-1]) >= 0
    for renormalised in (False, True):
        values = [float(entropy(found, k, renormalised)) for k in range(1, d + 1)]
        assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))
    assert float(entropy(found)) <= math.log(min(d, tokens - 1)) + 1e-9
    assert float(participation_ratio(density(x))) <= float(effective_rank(found)) + 1e-9


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), heads=st.integers(1, 3), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_rows_of_a_padded_batch_are_as_alone(lengths, heads, seed):
    width, d = max(lengths) + 2, 8
    x = torch.full((len(lengths), heads, width, d), torch.nan, **DOUBLE)
    rows = [uneven(seed + i, heads, length, d) for i, length in enumerate(lengths)]
    for i, row in enumerate(rows):
        x[i, :, width - row.shape[1] :] = row
    real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    found = spectrum(x, real[:, None])
    for i, row in enumerate(rows):
        for head in range(heads):
            torch.testing.assert_close(found[i, head], spectrum(row[head]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_tokens(dtype):
    """Equal tokens have entropy 0, one at the mean does not count, and neither touches other heads."""
    x = uneven(0, 2, 20, 8).to(dtype)
    alone = spectrum(x[1])
    for constant in (1.0, 0.0, 0.1, 1000.3):
        x[0] = constant
        found = spectrum(x)
        assert float(entropy(found[0])) == 0 and torch.equal(found[1], alone)
        assert float(effective_rank(found[0])) == float(participation_ratio(density(x[0]))) == 1
        assert float(entropy(found[0], 2, renormalised=True)) == 0
    symmetric = torch.cat([x[1], -x[1]])
    with_mean = torch.cat([symmetric, torch.zeros(1, 8, dtype=dtype)])
    torch.testing.assert_close(spectrum(with_mean), spectrum(symmetric), rtol=0, atol=1e-6)
    shifted = with_mean.double() + 0.1  # where the mean is rounded
    torch.testing.assert_close(spectrum(shifted), spectrum(symmetric.double()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [6, 7, 8, 14, 40])
def test_products_of_parts_are_those_of_all_rows(tokens, monkeypatch):
    """Whether parts fit or not, padding or none: against singular values of all rows at once."""
    monkeypatch.setattr("kvlib.methods.entropy.PART", 7)
    x = uneven(3, 2, tokens, 5)
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, :2] = False
    found = spectrum(x, real)
    for row, first in enumerate((0, 2)):
        assert found[row].tolist() == pytest.approx(oracle(x[row, first:]).tolist()[:5] + [0] * (5 - tokens + first))


def test_no_token_has_entropy_0():
    found = spectrum(torch.full((2, 5, 4), torch.nan), torch.zeros(2, 5, dtype=torch.bool))
    assert entropy(found).tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
@pytest.mark.parametrize("tokens", [60, 4096, 9000])  # more than a part, and no multiple of it
def test_precision(dtype, within, tokens):
    """Sums are in float32 or better, whatever tokens are stored in; norms of half precision would overflow."""
    x = (uneven(1, 4, tokens, 64) * 300).to(dtype)
    found, exact = spectrum(x), spectrum(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(-1), torch.ones(4, **DOUBLE), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy(found), entropy(exact), rtol=0, atol=10 * within)
    torch.testing.assert_close(entropy(found, 16), entropy(exact, 16), rtol=0, atol=within)


def test_bad_input():
    found = spectrum(draw(0, 10, 4))
    for k in (0, 5, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"k=.*: a number of eigenvalues from 1 to 4"):
            entropy(found, k)
