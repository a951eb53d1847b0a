"""KIVI: keys in few bits per channel, values in few bits per token (Liu et al., 2402.02750)."""

import math

import torch

from kvlib.core.method import Method, register, require, whole
from kvlib.methods.systems import body


@register("kivi")
class KIVI(Method):
    """Codes of 2 or 4 bits, between the lowest and the highest of a group; the newest tokens stay as they are.

    code = round((x - lowest) / step), step = (highest - lowest) / (2^bits - 1), with lowest and step in 16 bits. A
    group is `group` consecutive tokens of one channel of the keys, and `group` channels of one token of the values:
    keys have a few channels that are large in all tokens, values have none. Whenever `residual` tokens are there as
    they came, they are encoded, so that the newest n mod `residual` of n are not. A prompt is read exactly and encoded
    at its end; what comes after it reads what is stored.

    Follows jy-yuan/KIVI 876b4d2, `models/llama_kivi.py` and `quant/new_pack.py`; group and residual are those of its
    `mem_spd_test.py` (code), `example.py` has a residual of 32. Departures: values follow the rule of the keys, so that
    of 128, 256, ... tokens none stays as it came, where theirs always keep the newest `residual` values in full; codes
    are those of the lowest and the step as rounded to 16 bits, always float16; values of heads whose width is no
    multiple of the group have the largest group that divides both; what is stored is decoded as a whole to be read,
    without a kernel for codes.

    Args:
        bits: of a code, 2 or 4.
        group: tokens of a group of keys, and channels of one of values.
        residual: tokens that are encoded together.

    Raises:
        ValueError: for other bits, groups that fill no bytes, and a residual that is no multiple of the group.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    evicts_in_decode = True

    def __post_init__(self):
        require("bits", self.bits, whole(self.bits, 2) and self.bits in (2, 4), "2 or 4")
        fills = whole(self.group, 1) and self.group * self.bits % 8 == 0
        require("group", self.group, fills, f"tokens whose codes of {self.bits} bits fill whole bytes")
        fits = whole(self.residual, 1) and self.residual % self.group == 0
        require("residual", self.residual, fits, f"a multiple of the group, {self.group} tokens")

    def compress(self, view):
        layer, tail = view.layer, view.layer.tail
        groups = tail.lengths // self.residual * (self.residual // self.group)
        if not (most := int(groups.max())):
            return
        taken = most * self.group
        chunk = {name: x[:, :, :taken].unflatten(2, (most, -1)) for name, x in view.fields(tail).items()}
        body.move(layer, encoded(chunk["key"], chunk["value"], self.bits), groups, self.group)

    def decode(self, view, part):
        stored = view.fields(part)
        if part is view.layer.tail:
            return stored["key"], stored["value"]
        return tuple(x.to(view.new_key.dtype).flatten(2, 3) for x in decoded(stored, self.bits))


def encoded(key: torch.Tensor, value: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """What is stored of groups of tokens, keys and values `(batch, kv_heads, groups, group, head_dim)`.

    Returns:
        codes `(batch, kv_heads, groups, group x bits / 8, head_dim)`, of tokens that follow each other in one byte, and
        lowest entries and steps: of keys `(..., 1, head_dim)`, of values `(..., group, channel groups, 1)`.
    """
    width = math.gcd(key.shape[3], value.shape[-1])
    code, low, step = codes(key, 3, bits)
    stored = {"key": packed(code, bits), "key_low": low, "key_step": step}
    code, low, step = codes(value.unflatten(-1, (-1, width)), -1, bits)
    return stored | {"value": packed(code.flatten(-2), bits), "value_low": low, "value_step": step}


def decoded(stored: dict[str, torch.Tensor], bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(batch, kv_heads, groups, group, head_dim)` in float32 from what `encoded` has made."""
    key, value = (unpacked(stored[name], bits) for name in ("key", "value"))
    value = value.unflatten(-1, (stored["value_low"].shape[-2], -1))
    value = value * stored["value_step"].float() + stored["value_low"].float()
    return key * stored["key_step"].float() + stored["key_low"].float(), value.flatten(-2)


def codes(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes as whole numbers, shaped like `x`, and float16 lowest entries and steps, of size 1 along `dim`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.aminmax(dim=dim, keepdim=True)
    most = torch.finfo(torch.float16).max
    low, step = (y.clamp(-most, most).half() for y in (low, (high - low) / (2**bits - 1)))
    code = (x - low.to(x)) / step.where(step > 0, 1).to(x)
    return code.round().clamp(0, 2**bits - 1).to(torch.uint8), low, step  # rounding to 16 bits may leave some outside


def packed(code: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `(..., tokens, head_dim)`, `8 / bits` tokens in a byte, the first in its lowest bits."""
    code = code.unflatten(-2, (-1, 8 // bits))
    return sum(code[..., i, :] << (bits * i) for i in range(8 // bits))


def unpacked(code: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as `packed` was given them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=code.device)
    return ((code[..., None, :] >> shifts[:, None]) & (2**bits - 1)).flatten(-3, -2)
