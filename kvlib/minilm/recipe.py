"""The numbers of a training run; another model is another entry in `RECIPES`."""

from dataclasses import dataclass

from transformers import LlamaConfig

from kvlib.minilm.tokenizer import BOS, EOS, LENGTH, PAD, SIZE


@dataclass(frozen=True)
class Recipe:
    """Geometry, schedule and seed. A step is `sequences` sequences of `length` tokens, whatever the number of GPUs."""

    layers: int = 12
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    mlp: int = 704
    rope_theta: float = 50_000.0
    length: int = LENGTH
    sequences: int = 16
    steps: int = 3_815  # 250 M tokens
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
            head_dim=self.width // self.heads,
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


RECIPES = {
    "pilot": Recipe(),
    "tiny": Recipe(layers=2, width=32, heads=2, kv_heads=1, mlp=64, length=512, sequences=2, steps=8, warmup=2),
}
