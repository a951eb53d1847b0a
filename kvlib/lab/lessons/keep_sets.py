"""What methods keep of a prompt, and what the model then answers."""

from itertools import chain

import pandas as pd
import torch

import kvlib
from kvlib.lab import tasks


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


def answers(model, tokenizer, task: str, tokens: int, samples, methods: dict) -> pd.DataFrame:
    """What the model writes where the answer belongs: a row per sample, the right answer, a column per method."""
    rows = {}
    for number in samples:
        drawn = tasks.sample(task, tokens, number, tokenizer=tokenizer)
        prefill = kvlib.snapshot(model, torch.tensor([[*chain(*drawn.ids(tokenizer))]], device=model.device))
        rows[number] = {"answer": drawn.answer}
        for name, method in methods.items():
            with method(model) as run:
                cache, made = run.fork(prefill), [prefill.logits.argmax(-1)]
                for _ in drawn.answer_ids(tokenizer)[1:]:
                    made.append(model(made[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
            rows[number][name] = tokenizer.decode(torch.cat(made))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sample")
