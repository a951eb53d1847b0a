"""Exercises of 02_uncomp."""

import math

import torch

from kvlib.lab.checks import expect, number
from kvlib.methods.entropy import entropy, spectrum

MODELS = {"Llama-3-8B": (32, 8), "Llama-2-7B": (32, 32), "SmolLM2": (9, 3)}  # name -> query heads, KV heads


def check_native_share(function) -> None:
    """`function(kept, prompt, query_heads, kv_heads)`: what a set per query head takes, a share of the native cache."""
    for (name, (query_heads, kv_heads)), (kept, prompt) in (
        (model, sizes) for model in MODELS.items() for sizes in ((384, 8096), (512, 4096), (1000, 600))
    ):
        found = number(function(kept, prompt, query_heads, kv_heads), "native_share")
        each, group = min(kept, prompt) / prompt, query_heads / kv_heads
        hints = {
            each: "; that is a share of a cache with a copy for each query head, which no model stores",
            each / group: "; a group of query heads shares one KV head, so their sets take more and not less",
            kept / prompt * group: "; no head keeps more tokens than the prompt has",
            100 * each * group: "; a share of 1 is asked for, not percent",
            each * query_heads: "; the native cache has a set for each KV head",
        }
        expected = each * group
        hint = next((hint for wrong, hint in hints.items() if abs(found - wrong) < 1e-9), "")
        message = f"{name}, {kept} of {prompt} tokens: {expected:.4f} is expected, found {found:.4f}{hint}"
        expect(abs(found - expected) < 1e-9, message)
    print("native_share is right")


def check_matrix_entropy(function) -> None:
    """`function(tokens, k)`: truncated entropy in nats of `(tokens, d)`, by the steps of the lesson."""
    generator = torch.Generator().manual_seed(0)
    for n, d, k in ((40, 8, 2), (40, 8, 8), (5, 8, 3), (5, 8, 8)):
        scales = torch.linspace(3, 0.5, d, dtype=torch.float64)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales + 2
        before, case = x.clone(), f"{n} tokens, d = {d}, k = {k}"
        found = number(function(x, k), "matrix_entropy")
        expect(torch.equal(x, before), "matrix_entropy changes its argument, work on a copy")
        expect(not math.isnan(found), f"{case}: NaN; eigenvalues can be 0, or a little below by rounding: 0 ln 0 is 0")
        centred = x - x.mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True)
        expected = truncated(unit, k)
        wrong = {
            "; tokens are centred first": truncated(x / x.norm(dim=1, keepdim=True), k),
            "; rows are divided by their norms": truncated(centred, k),
            "; centre first, then divide by the norms": truncated(*recentred(x), k),
            "; the k eigenvalues are not divided by their sum": entropy(spectrum(x), k, renormalised=True).item(),
            "; in nats: the natural logarithm": expected / math.log(2),
            "; not divided by ln d": expected / math.log(d),
            "; the k largest eigenvalues": entropy(spectrum(x).flip(-1), k).item(),
            "; only the k largest eigenvalues count": entropy(spectrum(x)).item(),
            "; eigenvalues, not singular values": truncated_singular(unit, k),
            "; the mean over tokens, not the sum": entropy(spectrum(x) * n, k).item(),
            "; that is the effective rank, the entropy is its logarithm": math.exp(expected),
            "; an entropy has a minus in front": -expected,
        }
        hint = next((hint for hint, other in wrong.items() if abs(found - other) < 1e-8), "")
        message = f"{case}: {expected:.6f} is expected, found {found:.6f}{hint}"
        expect(abs(found - expected) < 1e-8, message)
    print("matrix_entropy is right")


def truncated(rows: torch.Tensor, k: int) -> float:
    """Entropy of the k largest eigenvalues of the second moment of rows as they are, divided by its trace."""
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).flip(-1)
    return entropy(values / values.sum(), k).item()


def truncated_singular(rows: torch.Tensor, k: int) -> float:
    values = torch.linalg.svdvals(rows)
    return entropy(values / values.sum(), min(k, len(values))).item()


def recentred(x: torch.Tensor) -> tuple[torch.Tensor]:
    """Rows divided by their norms first, and centred then."""
    unit = x / x.norm(dim=1, keepdim=True)
    return (unit - unit.mean(0),)
