"""A plain 8-bit cache: the storage that every other one has to beat."""

import torch

from kvlib.core.method import Method, register

LEVELS = 127  # on each side of 0
FIELDS = ("key", "value")


@register("int8")
class Int8(Method):
    """Keys and values in 8 bits, symmetric, with one 16-bit scale for each token, head, and key or value; ours.

    code = round(x / scale), where the largest entry of the vector has code 127. A prompt is read exactly and encoded at
    its end; later tokens are encoded when they arrive, and read as they are stored.
    """

    scaled = True

    def encode(self, run, layer, key, value, positions):
        if layer.tail is None or "key_scale" not in layer.tail.fields:
            return super().encode(run, layer, key, value, positions)
        return codes(key, value)

    def decode(self, view, part):
        stored, dtype = view.fields(part), view.new_key.dtype
        if "key_scale" not in stored:
            return stored["key"], stored["value"]
        wide = torch.promote_types(dtype, torch.float32)
        return tuple((stored[name].to(wide) * stored[f"{name}_scale"].to(wide)).to(dtype) for name in FIELDS)

    def compress(self, view):
        tail = view.layer.tail
        if "key_scale" not in tail.fields:
            for name, x in codes(*(view.fields(tail)[name] for name in FIELDS)).items():
                tail.put(tail.fields, name, x)


def codes(key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored of keys and values `(..., head_dim)`: int8 codes and float16 scales `(..., 1)`."""
    stored = {}
    for name, x in zip(FIELDS, (key, value)):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (x.abs().amax(-1, keepdim=True) / LEVELS).half()
        code = (x / scale.where(scale > 0, 1).to(x.dtype)).round().clamp(-LEVELS, LEVELS)  # the scale is rounded, too
        stored |= {name: code.to(torch.int8), f"{name}_scale": scale}
    return stored
