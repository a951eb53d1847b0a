"""TidalDecode: few layers choose tokens, the layers behind them read the same ones (Yang et al., 2410.05076)."""

import json

import torch

from kvlib import calibration
from kvlib.core.method import Reader, highest, register, require, whole

PAPER = (2, 13)  # of 32 layers, for Llama-3-8B and Llama-3.1-8B
CALIBRATION = "tidaldecode.json"
WAYS = ("accuracy", "mass")  # of calibration, the preferred one first


@register("tidaldecode")
class TidalDecode(Reader):
    """Position-persistent sparse attention. Nothing is evicted: a decoded token reads less.

    In every decode step layers before the first selection layer attend to everything; so do selection layers, which
    also choose `budget` tokens; each layer behind one attends to these tokens in the same slots, up to the next
    selection layer. Nothing is carried over to the next step. Prompts, later turns and questions about a document are
    read densely.

    Followed: the authors' code (DerrickYLJ/TidalDecode d67a1bd), with the rule of its first author's fork for the token
    that is being decoded: it is always read, and counts as one of the budget. Departures: later turns of several tokens
    are dense, where the authors' Llama code selects for each of their queries (its Yarn code is dense, too); layers out
    of range are errors, where theirs silently select once.

    Args:
        selection_layers: layers that choose, counted from 0, ascending; at least one layer has to follow the first.
            None: the paper's layers 2 and 13 of 32 at the same depths, at most layer 2 for the first. The paper has no
            rule, chooses the second one by an accuracy sweep for each family of models, and finds a neighbouring layer
            far worse: measure it for your model (`kvlib.calibration.selection_layers`). A string: what was found then,
            for these `heads`, by accuracy if it was measured and else by attention mass; the name of a shipped model
            ("smollm2"), or the folder of a calibration.
        heads: whose choice it is. "query": each query head chooses by its own logits (the paper), and a layer reads as
            many rows as it has query heads times the budget, which can be more than it stores; "group": the query heads
            of a KV head by the sum of their attention; "all": one set for all heads, the best of each head first, then
            the second ones (LessIsMore, 2508.07101).
        sinks: first tokens that are always read.
        recent: share of the budget that the newest tokens have, the one being decoded included; at least that one.
        correction: period in decoded tokens; after so many they are all computed once more, in one dense pass, since
            keys and values of all layers behind the first sparse one follow from what sparse layers have read (the
            paper's cache correction). What was sampled stays. None: never, as in the paper's evaluation. Tokens that
            are left over when a new turn begins stay as they are.

    Raises:
        ValueError: for layers that are not ascending whole numbers, another kind of heads, sinks < 0, recent
            outside of [0, 1], and correction < 1; in a block, for layers that the model does not have, and for a
            calibration that is not there, is that of another model, or has nothing for these heads.
    """

    selection_layers: tuple[int, ...] | str | None = None
    heads: str = "query"
    sinks: int = 0
    recent: float = 0.0
    correction: int | None = None

    def __post_init__(self):
        super().__post_init__()
        layers = self.selection_layers
        if layers is not None and not isinstance(layers, str):
            layers = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
            object.__setattr__(self, "selection_layers", layers)
            fits = all(whole(layer, 0) for layer in layers) and layers and [*layers] == sorted(set(layers))
            require("selection_layers", layers, fits, "numbers of layers from 0 on, ascending, at least one")
        require("heads", self.heads, self.heads in CHOICES, " or ".join(map(repr, CHOICES)))
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")
        share = isinstance(self.recent, int | float) and not isinstance(self.recent, bool) and 0 <= self.recent <= 1
        require("recent", self.recent, share, "a share of the budget in [0, 1]")
        period = self.correction is None or whole(self.correction, 1)
        require("correction", self.correction, period, "a number of tokens >= 1, or None")

    def prepare(self, model) -> tuple[int, ...]:
        """The selection layers of this model."""
        layers = model.config.get_text_config().num_hidden_layers
        if self.selection_layers is None:
            first = max(0, min(PAPER[0], layers - 2))
            second = PAPER[1] * layers // 32
            return (first, second) if second > first + 1 else (first,)
        chosen = self.calibrated(model) if isinstance(self.selection_layers, str) else self.selection_layers
        allowed = f"a model of {layers} layers has them from 0 to {layers - 1}, and one has to follow the first"
        require("selection_layers", chosen, chosen[-1] < layers and chosen[0] < layers - 1, allowed)
        return chosen

    def calibrated(self, model) -> tuple[int, ...]:
        """The selection layers that a calibration of this model has found for these heads."""
        file = calibration.find(self.selection_layers, CALIBRATION)
        recorded = json.loads(file.read_text(encoding="utf-8"))
        calibration.require_same(model, recorded["fingerprint"], file)
        ways = recorded["choices"].get(self.heads, {})
        found = next((ways[way]["selection_layers"] for way in WAYS if way in ways), None)
        require("heads", self.heads, found is not None, f"{file} has layers for {' and '.join(recorded['choices'])}")
        return tuple(found)

    def select(self, view):
        layers, shared = view.run.prepared, view.step.shared
        if view.layer_idx in layers:
            shared["slots"] = self.choose(view)
            return None
        return shared["slots"] if view.layer_idx > layers[0] else None

    def finish(self, run):
        if self.correction and not self.everything and run.step.decoding and run.step.index % self.correction == 0:
            run.reread(self.correction)

    def choose(self, view) -> torch.Tensor:
        """Slots that the layers behind this one read, `(batch, kv_heads or query_heads, k)`, -1 = none."""
        positions = view.positions[:, :1]  # nothing is evicted: all heads and layers have the same tokens in each slot
        budget = view.per_prompt("budget in tokens", lambda view: self.tokens(view, self.budget))
        count = torch.minimum(budget, view.tokens)
        recent = (self.recent * count).long().clamp(min=1)
        sinks = view.clamp("sinks", self.sinks, 0, count - recent)
        newest = positions >= view.per_row(view.step.ends) - view.per_row(recent)
        score = CHOICES[self.heads](view).masked_fill(newest | (positions < view.per_row(sinks)), torch.inf)
        return highest(score, positions, count).expand(-1, max(score.shape[1], view.key.shape[1]), -1)


def by_query_head(view) -> torch.Tensor:
    """Logits `(batch, query_heads, slots)`: their order is that of attention, and far from the largest they differ."""
    dtype = torch.promote_types(view.query.dtype, torch.float32)
    query = view.query.unflatten(1, (-1, view.groups)).squeeze(3)
    return torch.einsum("bhgd,bhkd->bhgk", query.to(dtype), view.key.to(dtype)).flatten(1, 2)


def by_group(view) -> torch.Tensor:
    """Attention, summed over the query heads of each KV head, `(batch, kv_heads, slots)`."""
    return view.weights.sum(2)


def by_all_heads(view) -> torch.Tensor:
    """One score `(batch, 1, slots)`: minus the place in the list of every head's first choice, its second ones, ..."""
    logits = by_query_head(view).masked_fill(view.positions[:, :1] < 0, -torch.inf)
    rank = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    heads = torch.arange(logits.shape[1], device=logits.device)[:, None]
    place = (rank * logits.shape[1] + heads).amin(1, keepdim=True)
    return -place.to(torch.float64)  # float32 has no place of its own for each token of a long text


CHOICES = {"query": by_query_head, "group": by_group, "all": by_all_heads}
