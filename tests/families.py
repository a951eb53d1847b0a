"""Tiny random models of any family in transformers, as they come."""

import torch
import transformers

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def build(cls: str, dtype: torch.dtype = torch.float64, **changes):
    """A new model of the class, random but always the same."""
    cls = getattr(transformers, cls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**SIZE, **changes}))
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval().requires_grad_(False)
