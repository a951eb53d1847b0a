"""The numbers of a training run; another model is another entry in `RECIPES`."""

from dataclasses import dataclass

from transformers import LlamaConfig

from kvlib.minilm.tokenizer import BOS, EOS, LENGTH, PAD, SIZE


@dataclass(frozen=True)
class Recipe:
    """Geometry, schedule and seed.

    A step is `sequences` sequences of `length` tokens, whatever the number of GPUs. The first `short_share` of the
    steps cut as many tokens into sequences of `short` tokens, which must divide `length`: attention costs less there,
    and most of what retrieval needs can be learnt.
    """

    layers: int = 12
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 32
    mlp: int = 704
    rope_theta: float = 50_000.0
    length: int = LENGTH
    sequences: int = 16
    short: int = 1024
    short_share: float = 0.6
    steps: int = round(250e6 / 65_536)
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.4  # last share of the steps, in which the rate falls to zero
    weight_decay: float = 0.1
    clip: float = 1.0
    answer_weight: float = 4.0
    seed: int = 0

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=SIZE,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.length,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to zero."""
        left = (self.steps - step) / max(1, round(self.decay * self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup, left)

    @property
    def short_steps(self) -> int:
        return round(self.short_share * self.steps)

    def shape(self, step: int) -> tuple[int, int]:
        """(sequences, their length) of a step."""
        if step < self.short_steps:
            return self.sequences * self.length // self.short, self.short
        return self.sequences, self.length

    def first(self, step: int) -> int:
        """Number of the first sequence of a step; sequences are counted through both phases."""
        short = min(step, self.short_steps)
        return short * self.shape(0)[0] + (step - short) * self.sequences


LAYERS = 16  # of the shipped model: at equal cost in bytes more than 12, and better where two steps are needed
MLP = {12: 704, 16: 512}  # SwiGLU widths of 10.7 and 11.5 M parameters
BASE = {"layers": LAYERS, "mlp": MLP[LAYERS]}
SHORT = {"steps": round(160e6 / 65_536)}

RECIPES = {
    "base": Recipe(**BASE, steps=round(900e6 / 65_536)),
    "pilot12": Recipe(layers=12, mlp=MLP[12], **SHORT),
    "pilot16": Recipe(layers=16, mlp=MLP[16], **SHORT),
    "seed1": Recipe(**BASE, seed=1, **SHORT),
    "seed2": Recipe(**BASE, seed=2, **SHORT),
    "tiny": Recipe(
        layers=2,
        width=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        mlp=64,
        length=512,
        sequences=2,
        short=256,
        steps=8,
        warmup=2,
    ),
}
