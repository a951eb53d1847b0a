"""Exercises of 01b_vatp_parts."""

import numpy as np
import torch

import kvlib
from kvlib.core.support import attention_modules
from kvlib.lab.checks import expect, number, tiny_model
from kvlib.lab.lessons.attention_maps import attention_map
from kvlib.lab.lessons.scoring import importance
from kvlib.lab.lessons.value_norms import norms
from kvlib.lab.statistics import detectable_shift


def check_chance(function) -> None:
    """`function(n, k, r)`: the overlap of two sets of k of n tokens, r of them the same and the others random."""
    for n, k, r in ((512, 102, 51), (512, 410, 205), (100, 40, 0), (100, 40, 40), (64, 64, 8)):
        found = number(function(n, k, r), "chance")
        common = r + (k - r) * (k - r) / (n - r) if k > r else r
        hints = {
            k / n: "; the recent tokens are the same for certain",
            common: "; that is a number of tokens, not a share of k",
            (r + (k - r) ** 2 / n) / k: "; the others are chosen from n - r tokens",
            (common - r) / k: "; the recent tokens count too",
        }
        hint = next((hint for wrong, hint in hints.items() if abs(found - wrong) < 1e-9), "")
        message = f"n = {n}, k = {k}, r = {r}: {common / k:.4f} is expected, found {found:.4f}{hint}"
        expect(abs(found - common / k) < 1e-9, message)
    print("chance is right")


def check_prompts_needed(function) -> None:
    """`function(first, second)`: how many prompts show their mean difference in four of five experiments."""
    generator = np.random.default_rng(0)
    for prompts, right, moved, gained in ((1600, 0.25, 60, 0.7), (400, 0.6, 50, 0.3), (200, 0.5, 8, 1.0)):
        second = (generator.random(prompts) < right).astype(float)
        first, chosen = second.copy(), generator.permutation(prompts)[:moved]
        first[chosen] = generator.random(moved) < gained
        difference, deviation = (first - second).mean(), (first - second).std(ddof=1)
        expected = next(n for n in range(2, 10**7) if detectable_shift(n, deviation) <= abs(difference))
        found = number(function(first, second), "prompts_needed")
        z, unpaired = 1.96 + 0.84, (first.var(ddof=1) + second.var(ddof=1)) / difference**2
        hints = {
            z**2 * unpaired: "; the prompts are the same: what counts is how much the *difference* varies",
            z * deviation / abs(difference): "; the square is missing: four times the prompts halve the interval",
            (1.96 * deviation / difference) ** 2: "; with 1.96 alone every second experiment misses it",
            prompts: "; not how many there were, but how many it takes",
        }
        near = [hint for wrong, hint in hints.items() if abs(found - wrong) <= 0.01 * wrong + 1]
        case = f"{prompts} prompts, {100 * difference:+.2f} points, {int((first != second).sum())} answers differ"
        message = f"{case}: about {expected} are needed, prompts_needed says {found:g}{''.join(near)}"
        expect(found > 0, f"{message}; a number of prompts is positive")
        expect(abs(found - expected) <= 0.01 * expected + 1, message)
        expect(found == int(found), f"{case}: {found:g} is no whole number of prompts")
    print("prompts_needed is right")


@torch.no_grad()
def check_halves(projected: str, lifted: str) -> None:
    """Two methods of `kvlib.methods.vatp`: A ‖W_O v‖₁ with nothing added, (A + 1e-4) ‖v‖₁ without the projection."""
    model, ids = tiny_model(), torch.randint(5, 60, (1, 90), generator=torch.Generator().manual_seed(1))
    snapshot = kvlib.snapshot(model, ids)
    sums = torch.stack([attention_map(snapshot, layer).sum(1) for layer in range(len(snapshot.layers))])
    kv_heads = snapshot.layers[0][1].shape[1]
    sums = sums.unflatten(1, (kv_heads, -1))  # (layers, KV heads, group, tokens)
    plain = norms(snapshot)[:, :, None]
    projections = [m.o_proj.weight.unflatten(1, (*sums.shape[1:3], -1)) for m in attention_modules(model)]
    stored = [value[0] for _, _, value, _ in snapshot.layers]
    after = torch.stack([torch.einsum("ohgd,htd->hgto", *pair).abs().sum(-1) for pair in zip(projections, stored)])
    added = sums + 1e-4 * ids.shape[1]
    cases = {
        "A": sums,
        "A ‖v‖₁": sums * plain,
        "A ‖W_O v‖₁": sums * after,
        "(A + 1e-4) ‖v‖₁": added * plain,
        "(A + 1e-4) ‖W_O v‖₁, both steps at once": added * after,
        "‖v‖₁ alone": plain.expand_as(sums),
        "‖W_O v‖₁ alone": after,
    }
    for name, wanted in ((projected, "A ‖W_O v‖₁"), (lifted, "(A + 1e-4) ‖v‖₁")):
        expect(name in kvlib.METHODS, f'no method {name!r}: is the class decorated with @kvlib.register("{name}")?')
        found = importance(model, snapshot, name).double()
        names = [case for case, score in cases.items() if torch.allclose(found, score.sum(2), rtol=1e-5)]
        expect(names == [wanted], f"{name} ranks by {' or '.join(names) or 'something else'}, not by {wanted}")
    print(f"{projected} and {lifted} are one step each")
