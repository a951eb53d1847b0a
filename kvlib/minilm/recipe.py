"""The numbers of a training run; another model is another entry in `RECIPES`."""

from dataclasses import dataclass

from transformers import LlamaConfig

from kvlib.minilm.schedule import Schedule
from kvlib.minilm.tokenizer import BOS, EOS, PAD, SIZE


@dataclass(frozen=True)
class Recipe(Schedule):
    """Geometry, beside schedule and seed."""

    layers: int = 12
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 32
    mlp: int = 704
    rope_theta: float = 50_000.0

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
