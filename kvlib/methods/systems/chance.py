"""Chance that follows from where a token stands, so that neither padding nor chunks nor other rows change it."""

import torch


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, which spreads every bit of an int64 over all of them."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = _shifted(x, shift).bitwise_xor_(x).mul_(factor)
    return _shifted(x, 31).bitwise_xor_(x)


def uniform(x: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), neither end among them, in float64 from int64 numbers, which it mixes."""
    return _shifted(mixed(x), 12).double().add_(0.5).mul_(2.0**-52)


def _shifted(x: torch.Tensor, shift: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch copies the sign."""
    return (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)
