"""Matrix entropy of tokens: how many directions of feature space they fill (UNComp, Xiong et al., 2410.03090).

Everything is a statistic of one spectrum. Followed: menik1126/UNComp b3e9f7b, `uncomp/utils/entropy_utils.py`: tokens
of a head are centred, every row is divided by its norm, and the eigenvalues of the second moment, of trace 1, are the
probabilities of a von Neumann entropy. Departures: the release adds 1e-10 to every eigenvalue (`spectrum(x) + 1e-10`
gives its numbers); a token that equals the mean has no direction and is dropped, and tokens that are all equal have
entropy 0, where the release raises an error for all heads.
"""

import torch
import torch.nn.functional as F

from kvlib.core.method import require, whole

PART = 4096  # rows: a product of so few columns keeps a GPU busy only if its rows are shared out
ROUNDING = 16  # epsilons of the longest row: a centred row as short as that is what rounding the mean has left


def density(tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Second moment of centred unit rows with trace 1, or 0 if no row is left: `(..., n, n)`, n = min(tokens, d).

    With fewer tokens than features it is the Gram matrix of the rows, whose eigenvalues other than 0 are the same.

    Args:
        tokens: `(..., tokens, d)` of any dtype, computed in float32 or better.
        real: bool, broadcast to `(..., tokens)`; False for padding, which may hold anything. None: all are real.
    """
    rows = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    count, padding = rows.shape[-2], None
    if real is not None and not bool(real.all()):
        count, padding = real.sum(-1)[..., None, None].clamp(min=1), ~real[..., None]
        rows = rows.masked_fill(padding, 0)
    centred = rows - rows.sum(-2, keepdim=True) / count
    centred = centred if padding is None else centred.masked_fill_(padding, 0)
    length, longest = centred.norm(dim=-1, keepdim=True), rows.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
    has_direction = length > ROUNDING * torch.finfo(rows.dtype).eps * longest
    unit = centred.div_(length).masked_fill_(~has_direction, 0)
    moment = products(unit) if rows.shape[-2] >= rows.shape[-1] else unit @ unit.mT
    return moment / has_direction.sum(-2, keepdim=True).clamp(min=1)


def products(rows: torch.Tensor) -> torch.Tensor:
    """`rows.mT @ rows`: of more than `PART` rows the sum over parts of so many."""
    if rows.shape[-2] <= PART:
        return rows.mT @ rows
    parts = F.pad(rows, (0, 0, 0, -rows.shape[-2] % PART)).unflatten(-2, (-1, PART))
    return (parts.mT @ parts).sum(-3)


def spectrum(tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Eigenvalues of `density(tokens, real)` `(..., d)`, descending, float64: their sum is 1, or 0 if no row is left.

    The release takes its singular values in float64 for float32 input, too: what rounding adds to eigenvalues that are
    0 would otherwise be seen in the entropy.
    """
    values = torch.linalg.eigvalsh(density(tokens, real).double()).clamp(min=0).flip(-1)
    return F.pad(values, (0, tokens.shape[-1] - values.shape[-1]))


def truncation(d: int) -> int:
    """How many eigenvalues count in UNComp's truncated entropy: the release's 32 of 128, a quarter of any other d."""
    return max(1, d // 4)


def entropy(spectrum: torch.Tensor, k: int | None = None, renormalised: bool = False) -> torch.Tensor:
    """von Neumann entropy −Σ λ ln λ in nats, `(...)`; divided by ln d it is the release's, from 0 to 1.

    Args:
        spectrum: `(..., d)`, descending.
        k: eigenvalues that count, the largest ones; None: all d.
        renormalised: divide those by their sum, so that they are probabilities again. The release does not: its
            truncated entropy rises with the full one while nearly all mass lies in the first k, and then falls.

    Raises:
        ValueError: unless 1 <= k <= d.
    """
    d = spectrum.shape[-1]
    require("k", k, k is None or (whole(k, 1) and k <= d), f"a number of eigenvalues from 1 to {d}")
    kept = spectrum[..., :k]
    if renormalised:
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
    return torch.special.entr(kept).sum(-1)


def effective_rank(spectrum: torch.Tensor, k: int | None = None, renormalised: bool = False) -> torch.Tensor:
    """exp(`entropy`), `(...)`: the number of directions, if all were filled alike; 1 for equal tokens."""
    return entropy(spectrum, k, renormalised).exp()


def participation_ratio(density: torch.Tensor) -> torch.Tensor:
    """(Σ λ)² / Σ λ², `(...)`, from 1 to d; 1 for equal tokens. The exponential of the Rényi entropy of order 2, ours.

    Args:
        density: `(..., n, n)`, of which no eigenvalues are needed: their sum is its trace, that of their squares the
            square of its Frobenius norm.
    """
    total, squares = density.diagonal(dim1=-2, dim2=-1).sum(-1), density.square().sum((-2, -1))
    return torch.where(squares > 0, total.square() / squares, 1)
