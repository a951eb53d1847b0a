"""How much of a layer's attention lies on the tokens that another layer would choose, from one dense trace of a text.

TidalDecode's sparse layers read what the latest selection layer has chosen. The paper finds out by an accuracy sweep
which layers should choose; here it follows from what their choices hold of the attention behind them, for any number of
layers.
"""

from dataclasses import dataclass, field
from itertools import combinations, pairwise

import torch

from kvlib.core.method import Method
from kvlib.methods.tidaldecode import CHOICES, TidalDecode

POSITIONS = 8  # decoded at the end of a text
SelectionLayers = tuple[int, ...]


@dataclass(frozen=True)
class Tracer(Method):
    """Full attention that notes for a decoded token, layer by layer, what it attends to and what it would choose.

    Attributes:
        methods: whose choices are noted, by name.
        noted: per layer the attention `(query_heads, tokens)` and by name the slots `(query_heads, k)`, of one row.
    """

    methods: dict[str, TidalDecode]
    noted: list = field(default_factory=list)

    def attend(self, view):
        if view.step.decoding:
            attention = view.weights.flatten(1, 2)[0]
            slots = {name: method.choose(view)[0] for name, method in self.methods.items()}
            repeated = {name: x.repeat_interleave(len(attention) // len(x), dim=0) for name, x in slots.items()}
            self.noted.append((attention, repeated))
        return super().attend(view)


@torch.no_grad()
def attention_mass(
    model, ids: torch.Tensor, budget: float | int, positions: int = POSITIONS
) -> dict[str, torch.Tensor]:
    """For each kind of `heads` the matrix `M`, `(layers, layers)` in float64 on the CPU.

    `M[i, j]` is the share of layer j's attention that lies on the tokens that layer i chooses, the mean over query
    heads and over the last `positions` tokens, which are decoded one by one behind the others. All layers attend to
    everything, so that one pass serves every choice; in TidalDecode itself sparse layers change what later ones see.

    Args:
        ids: `(1, tokens)`. budget: as of TidalDecode.
    """
    tracer = Tracer({heads: TidalDecode(budget, heads=heads) for heads in CHOICES})
    found = {heads: [] for heads in CHOICES}
    with tracer(model) as run:
        model(ids[:, :-positions], logits_to_keep=1)
        for token in ids[:, -positions:].split(1, dim=1):
            tracer.noted.clear()
            model(token, past_key_values=run.cache)
            attention = torch.stack([attention for attention, _ in tracer.noted])
            for heads, steps in found.items():
                steps.append(held(attention, torch.stack([slots[heads] for _, slots in tracer.noted])))
    return {heads: torch.stack(steps).mean(0) for heads, steps in found.items()}


def held(attention: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`M` of one token; attention is `(layers, query_heads, tokens)`, slots are `(layers, query_heads, k)`."""
    rows = [attention.gather(-1, chosen.expand(len(attention), -1, -1)).sum(-1).mean(-1) for chosen in slots]
    return torch.stack(rows).double().cpu()


def candidates(layers: int, count: int = 2, first: int = 2, free: bool = False) -> list[SelectionLayers]:
    """All choices of `count` selection layers of which the first is given, ascending.

    With `free` all choices that leave as many layers sparse, wherever the first one stands: a layer before it reads
    everything, as a selection layer does, so that they read the same number of bytes.

    Raises:
        ValueError: if no layer would be sparse.
    """
    dense = first + count
    if not (count >= 1 and first >= 0 and layers > dense):
        raise ValueError(f"{count} selection layers from layer {first} on: a model of {layers} has no layer left")
    return [
        (start, *later)
        for start in (range(dense) if free else [first])
        for later in combinations(range(start + 1, layers), dense - start - 1)
    ]


def score(mass: torch.Tensor, chosen: SelectionLayers) -> float:
    """What sparse layers find of their attention in the choice of the latest selection layer before them, the mean."""
    layers = len(mass)
    spans = pairwise((*chosen, layers))
    return float(sum(mass[at, at + 1 : end].sum() for at, end in spans)) / (layers - chosen[0] - len(chosen))
