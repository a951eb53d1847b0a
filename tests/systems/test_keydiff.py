"""KeyDiff against its formula, written out token by token."""

import tiny
import torch

import kvlib


def by_hand(keys: torch.Tensor) -> list[float]:
    """Minus the cosine of each key `(tokens, head_dim)` and the mean of unit keys."""
    units = [key / key.norm() for key in keys]
    mean = sum(units) / len(units)
    return [-float(unit @ mean / mean.norm()) for unit in units]


def test_keeps_the_keys_that_are_least_like_the_mean():
    model = tiny.model("llama-gqa")
    ids, mask = tiny.pad([tiny.tokens(30), tiny.tokens(21, seed=1)])
    with kvlib.method("full")(model) as run:
        model(ids, attention_mask=mask)
        keys = [layer.tail.rectangle(layer.tail.fields["key"]).clone() for layer in run.cache.layers]
        positions = [layer.position_rectangle() for layer in run.cache.layers]
    with kvlib.method("keydiff", budget=9)(model) as run:
        model(ids, attention_mask=mask)
    for layer, (key, at) in enumerate(zip(keys, positions)):
        for row in range(2):
            for head in range(key.shape[1]):
                real = key[row, head][at[row, head] >= 0]
                score = by_hand(real)
                best = sorted(range(len(score)), key=lambda i: -score[i])[:9]
                assert run.kept(layer)[row, head].tolist() == sorted(best)
