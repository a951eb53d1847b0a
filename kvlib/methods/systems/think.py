"""ThinK: keys lose the channels that queries use least (Xu et al., 2407.21018)."""

import torch

from kvlib.core.method import Method, register, require, whole
from kvlib.methods.systems import body


@register("think")
class ThinK(Method):
    """Every token stays, but keys lose `ratio` of their channels, and with them half as large a share of their bytes.

    A channel counts as much as the mean of q^2 over the last `window` queries times the mean of k^2 over all keys, of
    each KV head; q^2 is averaged over the query heads of a group. At the end of a prompt the int(ratio x head_dim) that
    count least go, from all keys but those of the newest `recent` tokens. Values, and the keys of decoded tokens, stay
    as they are. Keys and queries are multiplied over the channels that are left, at the scale of all of them.

    Follows SalesforceAIResearch/ThinK d200577, `kv_pruning_utils.py` (code); the mean over a group is that of kvpress
    0.5.5 (code), where channels are zeros that stay in memory. Departures: neither SnapKV nor H2O before it, as in
    kvpress; the channels of a row are chosen once, when its first keys lose some, and a later turn's older keys lose
    the same; while keys are read, zeros stand in for what they lack, which gives the same logits; of channels that
    count the same the later ones go.

    Args:
        ratio: of the channels, in [0, 1).
        window: queries that tell which channels count.
        recent: newest tokens of a prompt whose keys stay whole.

    Raises:
        ValueError: for a ratio outside [0, 1), a window < 1 and recent < 0.
    """

    ratio: float = 0.4
    window: int = 32
    recent: int = 32

    def __post_init__(self):
        fits = isinstance(self.ratio, int | float) and 0 <= self.ratio < 1
        require("ratio", self.ratio, fits, "the share of channels that keys lose, in [0, 1)")
        require("window", self.window, whole(self.window, 1), "a number of queries >= 1")
        require("recent", self.recent, whole(self.recent, 0), "a number of tokens >= 0")

    def compress(self, view):
        layer, tail = view.layer, view.layer.tail
        counts = (tail.lengths - self.recent).clamp(min=0)
        if not (most := int(counts.max())):
            return
        fields, at = view.fields(tail), tail.position_rectangle()
        channels = self.channels(view, fields["key"], at)
        if layer.body is not None:
            chosen = (layer.body.lengths > 0)[..., None].to(at.device)
            channels = layer.rows["channels"].where(chosen, channels)
        layer.rows["channels"] = channels
        narrow = fields["key"][:, :, :most].gather(-1, channels[:, :, None].expand(-1, -1, most, -1))
        body.move(layer, {"key": narrow, "value": fields["value"][:, :, :most]}, counts)

    def channels(self, view, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The channels that stay, ascending, `(batch, kv_heads, kept)`."""
        dtype, size = torch.promote_types(key.dtype, torch.float32), key.shape[-1]
        query, asked = view.recent_queries(self.window)
        query = query.to(dtype).square().masked_fill((asked < 0)[:, None, :, None], 0).sum(2)
        key = key.to(dtype).square().masked_fill((positions < 0)[..., None], 0).sum(2)  # sums have the order of means
        score = query.unflatten(1, (-1, view.groups)).sum(2) * key
        kept = score.sort(dim=-1, descending=True, stable=True).indices[..., : size - int(size * self.ratio)]
        return kept.sort(dim=-1).values

    def decode(self, view, part):
        stored = view.fields(part)
        if part is view.layer.tail:
            return stored["key"], stored["value"]
        key, at = stored["key"], view.layer.rows["channels"][:, :, None].expand(stored["key"].shape)
        return key.new_zeros(*key.shape[:3], view.new_key.shape[-1]).scatter_(-1, at, key), stored["value"]
