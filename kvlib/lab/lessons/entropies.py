"""Matrix entropy of every head of a model on a text, and what it goes with: depth, other texts, the heads that copy."""

import numpy as np
import pandas as pd
import torch

from kvlib.calibration.head_groups import windows
from kvlib.lab.lessons.value_norms import rank_correlation
from kvlib.lab.statistics import RESAMPLES
from kvlib.lab.tasks.natural import texts
from kvlib.methods.entropy import entropy, participation_ratio, spectrum, truncation

TENSORS = ("query", "key", "value")


def excerpts(tokenizer, tokens: int, seed: int = 0) -> dict[str, list[int]]:
    """Three texts as ids: where a novel begins, where held-out code begins, and tokens drawn by lot."""
    found = {
        name: windows("".join(text().pieces), tokenizer, 1, tokens)[0][0].tolist()
        for name, text in {"prose": texts.novel, "code": texts.code}.items()
    }
    words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    found["random"] = np.random.default_rng(seed).choice(words, tokens).tolist()
    return found


def spectra(snapshot, tensor: str = "query") -> torch.Tensor:
    """Eigenvalues of every head's centred unit rows, `(layers, heads, head_dim)`, descending, float64 on the CPU.

    Args:
        snapshot: of one prompt. tensor: "query" or "key", both rotated, or "value"; the last two have KV heads.
    """
    place = TENSORS.index(tensor)
    return torch.stack([spectrum(layer[place][0]).cpu() for layer in snapshot.layers])


def statistics(spectra: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ranks heads in `kvlib.methods.head_groups`, from spectra `(..., head_dim)`: name -> `(...)`, in nats.

    The participation ratio is a number of directions.
    """
    k = truncation(spectra.shape[-1])
    return {
        "truncated": entropy(spectra, k),
        "full": entropy(spectra),
        "renormalised": entropy(spectra, k, renormalised=True),
        "participation": participation_ratio(spectra.diag_embed()),
    }


def depth_trend(found: torch.Tensor) -> float:
    """Rank correlation of layers' means with depth, from `(layers, heads)`: 1 if they rise from layer to layer."""
    return rank_correlation(found.mean(1), torch.arange(len(found))).item()


def within_layers(found: torch.Tensor) -> torch.Tensor:
    """A number of every head `(layers, heads)` less its layer's mean, flat: what depth has no part in."""
    return (found - found.mean(1, keepdim=True)).flatten()


def correlation(first: torch.Tensor, second: torch.Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Rank correlation over heads, and its 95 % interval by a percentile bootstrap over heads.

    Args:
        first, second: of as many heads, of any shape.

    Returns:
        (value, low, high)
    """
    first, second = (x.flatten().double().cpu() for x in (first, second))
    draws = np.random.default_rng(seed).integers(len(first), size=(RESAMPLES, len(first)))
    resampled = rank_correlation(first[draws], second[draws]).numpy()
    return rank_correlation(first, second).item(), *np.quantile(resampled, [0.025, 0.975]).tolist()


def place(score: torch.Tensor, chosen: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Where chosen heads stand among all by a score, and how often as many heads by lot stand as far from the middle.

    Args:
        score: one number per head, of any shape. chosen: bool of that shape, at least one head and not all.

    Returns:
        (mean place, from 0, the lowest score, to 1, the highest; two-sided p-value of a permutation test)
    """
    places = score.flatten().argsort().argsort().double().numpy() / (score.numel() - 1)
    chosen, rng = chosen.flatten().numpy(), np.random.default_rng(seed)
    mean, count = places[chosen].mean(), int(chosen.sum())
    lots = places[rng.random((RESAMPLES, len(places))).argpartition(count, axis=1)[:, :count]].mean(1)
    further = (abs(lots - 0.5) >= abs(mean - 0.5) - 1e-12).sum()
    return float(mean), (1 + int(further)) / (1 + RESAMPLES)


def beside_copying(found: dict[str, torch.Tensor], looked: torch.Tensor, seed: int = 0) -> pd.DataFrame:
    """What statistics of heads have to do with copying.

    Args:
        found: statistic -> `(layers, heads)`. looked: attention on the token to be copied, of that shape; a head with
            half of its attention there copies.

    Returns:
        A row per statistic: correlation, low, high over all heads (`correlation`); place and p of the copying ones
        (`place`); within and "p within", the same with the layer's mean taken off.
    """
    copies, rows = looked >= 0.5, {}
    for name, x in found.items():
        inside = place(within_layers(x), copies.flatten(), seed)
        numbers = (*correlation(x, looked, seed), *place(x, copies, seed), *inside)
        rows[name] = dict(zip(("correlation", "low", "high", "place", "p", "within", "p within"), numbers))
    return pd.DataFrame.from_dict(rows, orient="index")
