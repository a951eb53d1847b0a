"""The arms of the ablation: what is planted, which attention, which weights are trained.

All arms of a model read the same source bytes in the same order. Layers follow the released model of 16 layers (full
ones 0, 4, 8, 12; the second layer is 4, read behind 12), for any depth: see `second_layer`.
"""

from dataclasses import dataclass

from kvlib.minilm.schedule import Schedule

ANCHOR = {"minilm": "<ANCHOR>", "smollm2": "<empty_output>"}  # reserved tokens: no matrix changes its size
BASES = tuple(ANCHOR)
LONGEST = 96  # tokens of a line that get an anchor of their own
TOKENS = 30e6  # of an arm, anchors included
FIXED = 11  # tokens between anchors that do not mind lines: as many anchors as lines on the training text


@dataclass(frozen=True)
class Arm:
    """One model to train.

    anchors: "lines", "fixed" (every `FIXED` tokens) or "none". per, spread: as in `kvlib.methods.anchorcoder`; second:
    do the last layers read a second one (LAA)? whole: train all weights, not adapters of low rank.
    """

    base: str
    anchors: str = "lines"
    per: int | None = 1
    spread: bool = False
    second: bool = False
    whole: bool = False
    seed: int = 0

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            sequences=8,
            steps=round(TOKENS / 32_768),
            lr=RATES[self.base] / (5 if self.whole else 1),
            warmup=50,
            decay=0.5,
            weight_decay=0.0,
            seed=self.seed,
        )


# Learning rates of adapters: with 10 M tokens D2 of minilm needs .6828 bits a character at 1e-3 and .6839 at 3e-3, on
# the held-out code of a curve. A fifth of it for all weights, as is usual.
RATES = {"minilm": 2e-3, "smollm2": 1e-3}

FULL = {"spread": True, "second": True}  # the paper's method
ARMS = {
    "minilm-D1": Arm("minilm", "none"),
    "minilm-D2": Arm("minilm"),
    "minilm-T-4": Arm("minilm", per=4),
    "minilm-TM-4": Arm("minilm", per=4, spread=True),
    "minilm-TL-4": Arm("minilm", per=4, second=True),
    "minilm-TML-4": Arm("minilm", per=4, **FULL),
    "minilm-TML-6": Arm("minilm", per=6, **FULL),
    "minilm-TML-8": Arm("minilm", per=8, **FULL),
    "minilm-T0": Arm("minilm", per=None, **FULL),
    "minilm-FIX-4": Arm("minilm", "fixed", per=4, **FULL),
    "minilm-AnLLM": Arm("minilm", per=None),
    "minilm-TML-4-whole": Arm("minilm", per=4, whole=True, **FULL),
    "minilm-D2-whole": Arm("minilm", whole=True),
    "minilm-D2-seed1": Arm("minilm", seed=1),
    "minilm-TML-4-seed1": Arm("minilm", per=4, seed=1, **FULL),
    "smollm2-D1": Arm("smollm2", "none"),
    "smollm2-D2": Arm("smollm2"),
    "smollm2-T-6": Arm("smollm2", per=6),
    "smollm2-TML-6": Arm("smollm2", per=6, **FULL),
}
SHIPPED = ("minilm-TML-4", "smollm2-TML-6")


def settings(arm: Arm, tokenizer, layers: int) -> dict | None:
    """What `config.anchorcoder` says of a model trained as this arm; None without anchors."""
    if arm.anchors == "none":
        return None
    lines = arm.anchors == "lines"
    source, beyond = second_layer(arm.per, layers) if arm.second else (None, None)
    return {
        "anchor": tokenizer.convert_tokens_to_ids(ANCHOR[arm.base]),
        "ends": line_ends(tokenizer) if lines else [],
        "per": arm.per,
        "source": source,
        "beyond": beyond,
        "spread": arm.spread,
        "longest": LONGEST if lines else FIXED,
    }


def second_layer(per: int | None, layers: int) -> tuple[int, int]:
    """Which layer is read again, and behind which one: about a quarter and three quarters of the depth.

    The former is a full layer, but not the first one, if there are full layers.
    """
    wanted = layers // 4
    full = range(per, layers, per) if per else [wanted]
    return min(full, key=lambda layer: abs(layer - wanted)), 3 * layers // 4


def line_ends(tokenizer) -> list[int]:
    """Ids of the tokens with a newline in them. Where text is read line by line only "\\n" and its like occur."""
    return [token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])]
