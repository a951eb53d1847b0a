"""What methods keep of a prompt."""

import pandas as pd
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


def overlaps(kept: dict[str, torch.Tensor]) -> pd.DataFrame:
    """How alike are keep-sets? 2 |A ∩ B| / (|A| + |B|) (Dice), mean over heads: 1 for equal sets, 0 for disjoint ones.

    Args:
        kept: name -> `(layers, kv_heads, tokens)` bool, the same tokens for all.

    Raises:
        ValueError: if a set is empty.
    """
    masks = torch.stack(list(kept.values())).double().flatten(1, 2)  # (methods, heads, tokens)
    sizes = masks.sum(-1)
    if (sizes == 0).any():
        raise ValueError("an empty keep-set is like no other")
    common = torch.einsum("aht,bht->abh", masks, masks)
    return pd.DataFrame((2 * common / (sizes[:, None] + sizes)).mean(-1), index=list(kept), columns=list(kept))
