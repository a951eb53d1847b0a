"""What methods keep of a prompt."""

import torch


def kept_mask(run) -> torch.Tensor:
    """Which tokens of the first row each head keeps, `(layers, kv_heads, tokens)` bool."""
    layers = [run.kept(layer)[0].cpu() for layer in range(len(run.cache.layers))]
    mask = torch.zeros(len(layers), len(layers[0]), int(run.cache.tokens[0]), dtype=torch.bool)
    for layer, kept in enumerate(layers):
        for head, tokens in enumerate(kept):
            mask[layer, head, tokens[tokens >= 0]] = True
    return mask


def kept_by(model, snapshot, methods: dict) -> dict[str, torch.Tensor]:
    """What each method keeps of a prompt that was read once: name -> `(layers, kv_heads, tokens)` bool."""
    kept = {}
    for name, method in methods.items():
        with method(model) as run:
            run.fork(snapshot)
            kept[name] = kept_mask(run)
    return kept
