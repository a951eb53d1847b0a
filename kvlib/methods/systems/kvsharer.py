"""KVSharer: layers that read the cache of another, unlike layer (Yang et al., 2410.18517)."""

import json
from pathlib import Path

from kvlib import calibration
from kvlib.core.method import Method, register, require, whole

FILE = "kvsharer.json"
ORDERS = ("dissimilar", "similar", "random")


@register("kvsharer")
class KVSharer(Method):
    """Some layers store nothing: in prompts and decoding they attend to the keys and values of an earlier layer.

    Which ones is found by a search (`kvlib.calibration.layer_sharing`): pairs of layers are tried, the least alike
    first, and stay if the model's last hidden states stay close to what they were.

    Follows yangyifei729/KVSharer 39e5c19, `test_llama.ipynb` (code), where `count` is 4. Departures: keys and values of
    layers that share are still computed, and thrown away, so that memory falls and computing does not. A source that
    shares stands for its own source, as there.

    Args:
        pairs: (layer, source) for each layer that shares, the source before it. Or a calibration: the name of a shipped
            model, or a folder that has one.
        count: of a calibration, how many layers share, the first that it has found.
        order: of a calibration, which pairs were tried first: "dissimilar", or the controls "similar" and "random".

    Raises:
        ValueError: for no pairs, sources that are not before their layer, and a layer with two; for a count < 1 and
            another order; in a block, for layers that the model does not have, and for a calibration that is not there,
            is that of another model, or has found fewer pairs.
    """

    pairs: tuple[tuple[int, int], ...] | str | Path
    count: int = 4
    order: str = "dissimilar"
    own_prefill = True

    def __post_init__(self):
        if not isinstance(self.pairs, str | Path):
            fits = isinstance(self.pairs, list | tuple) and self.pairs and all(map(earlier, self.pairs))
            allowed = "pairs of a layer and a source before it, each layer once, or the name or folder of a calibration"
            require("pairs", self.pairs, fits and len(dict(self.pairs)) == len(self.pairs), allowed)
            object.__setattr__(self, "pairs", tuple(map(tuple, self.pairs)))
        require("count", self.count, whole(self.count, 1), "a number of layers >= 1")
        require("order", self.order, self.order in ORDERS, " or ".join(map(repr, ORDERS)))

    def prepare(self, model) -> dict[int, int]:
        """The source of each sharing layer."""
        pairs, layers = self.pairs, model.config.get_text_config().num_hidden_layers
        if isinstance(pairs, str | Path):
            pairs = self.calibrated(model)
        require("pairs", self.pairs, max(map(max, pairs)) < layers, f"the model has layers from 0 to {layers - 1}")
        return dict(pairs)

    def calibrated(self, model) -> list[list[int]]:
        """The first pairs that a calibration of this model has found."""
        file = calibration.find(self.pairs, FILE)
        recorded = json.loads(file.read_text(encoding="utf-8"))
        calibration.require_same(model, recorded["fingerprint"], file)
        found = recorded["orders"][self.order]["pairs"]
        require("count", self.count, self.count <= len(found), f"{file} has {len(found)} pairs")
        return found[: self.count]

    def encode(self, run, layer, key, value, positions):
        return {} if layer.index in run.prepared else super().encode(run, layer, key, value, positions)

    def decode(self, view, part):
        if view.layer_idx not in view.run.prepared:
            return super().decode(view, part)
        source = view.other(view.run.prepared[view.layer_idx])
        return source.key, source.value

    def attend(self, view):
        if view.layer_idx in view.run.prepared:
            view.note_read(view.run.cache.layers[view.run.prepared[view.layer_idx]].row_reads())
        return super().attend(view)


def earlier(pair) -> bool:
    """Is this a layer and one before it?"""
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(whole(x, 0) for x in pair) and pair[1] < pair[0]
