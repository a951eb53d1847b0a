"""Exercises of 04_tidaldecode."""

import itertools

import torch

from kvlib.calibration.attention_mass import candidates, score
from kvlib.lab.checks import expect, number

SHAPES = {  # name -> layers, query heads, KV heads, tokens seen
    "a small model": (4, 4, 2, 100),
    "SmolLM2": (30, 9, 3, 2048),
    "Llama-3.1-8B": (32, 32, 8, 131072),
    "a short prompt": (4, 4, 2, 8),
}


def check_share_read(function) -> None:
    """`function(layers, dense, query_heads, kv_heads, tokens, k, heads)`: share of the cache that a step reads."""
    for (name, shape), dense, k, heads in itertools.product(SHAPES.items(), (1, 4), (10, 205), ("query", "group")):
        layers, query_heads, kv_heads, tokens = shape
        if dense > layers:
            continue
        found = number(function(layers, dense, query_heads, kv_heads, tokens, k, heads), "share_read")
        each = min(k, tokens)
        sets = query_heads if heads == "query" else kv_heads

        def share(dense_layers, rows, layers=layers, tokens=tokens, kv_heads=kv_heads):
            return (dense_layers * tokens * kv_heads + (layers - dense_layers) * rows) / (layers * tokens * kv_heads)

        hints = {
            share(dense, query_heads * each if heads == "group" else kv_heads * each): (
                f"; with heads={heads!r} there is one set per {'query' if heads == 'query' else 'KV'} head"
            ),
            share(dense, each): "; that is one head's set, every head has one",
            share(dense, sets * k): "; a layer has no more tokens than were seen",
            share(0, sets * each): "; the dense layers and the selection layers read everything",
            100 * share(dense, sets * each): "; a share of 1 is asked for, not percent",
        }
        expected = share(dense, sets * each)
        hint = next((hint for wrong, hint in hints.items() if abs(found - wrong) < 1e-9), "")
        message = (
            f"{name}, {dense} dense layers, k = {k}, heads={heads!r}: {expected:.4f} is expected, found {found:.4f}"
        )
        expect(abs(found - expected) < 1e-9, message + hint)
    print("share_read is right")


def check_choose_by_group(function) -> None:
    """`function(logits, k)`: per KV head the newest token and the k - 1 with most attention, summed over its heads."""
    generator = torch.Generator().manual_seed(0)
    for kv_heads, group, tokens, k in ((2, 4, 60, 20), (2, 3, 20, 6), (3, 1, 12, 4), (2, 3, 9, 1)):
        logits = 2 * torch.randn(kv_heads, group, tokens, generator=generator, dtype=torch.float64)
        logits[:, 0] *= 4  # heads whose logits differ in scale
        logits[..., -1] = -9.0  # the newest token would not be chosen
        before, case = logits.clone(), f"{kv_heads} KV heads, groups of {group}, {tokens} tokens, k = {k}"
        found = function(logits, k)
        expect(found is not None and found is not ..., f"choose_by_group returned {found!r}: is there a `return`?")
        expect(torch.equal(logits, before), "choose_by_group changes its argument, work on a copy")
        shape = tuple(found.shape)
        message = f"{case}: shape {shape}, expected (kv_heads, k) = {(kv_heads, k)}"
        per_head = shape == (kv_heads, group, k) != (kv_heads, k)
        message += "; that is a set per query head" if per_head else ""
        message += "; the newest token is one of the k" if shape == (kv_heads, k + 1) else ""
        expect(shape == (kv_heads, k), message)
        sets = [{*row} for row in found.tolist()]
        expect(all(len(chosen) == k for chosen in sets), f"{case}: a token stands twice in a set")
        expect(all(tokens - 1 in chosen for chosen in sets), f"{case}: the newest token is always read")
        weights = logits.softmax(-1)
        wrong = {
            "": weights.sum(1),
            "; logits are summed before the softmax, and the head with the largest scale decides": logits.sum(1),
            "; that is the largest attention of a head, asked for was the sum": weights.amax(1),
            "; that is the first head of the group alone": weights[:, 0],
            "; these are the tokens with the least attention": -weights.sum(1),
            "; the softmax is over tokens, the last dimension": logits.softmax(1).sum(1),
        }
        if group == 1 or k == 1:  # where several of them are right
            wrong = {"": weights.sum(1)}
        hints = [hint for hint, ranking in wrong.items() if sets == with_newest(ranking, k)]
        expected = [sorted(chosen) for chosen in with_newest(weights.sum(1), k)]
        message = f"{case}: {expected} is expected, found {[sorted(chosen) for chosen in sets]}{''.join(hints)}"
        expect("" in hints, message)
    print("choose_by_group is right")


def with_newest(ranking: torch.Tensor, k: int) -> list[set]:
    """The newest token and the k - 1 best of the others, a set per row of `(rows, tokens)`."""
    newest = ranking.shape[-1] - 1
    return [{newest, *row.topk(k - 1).indices.tolist()} for row in ranking[:, :-1]]


def check_best_layers(function) -> None:
    """`function(mass, count)`: layer 2 and `count - 1` later ones that together leave most mass to sparse layers."""
    generator = torch.Generator().manual_seed(0)
    for layers, count in ((8, 2), (8, 3), (10, 3), (12, 4), (6, 1)):
        mass = torch.rand(layers, layers, generator=generator, dtype=torch.float64)
        before = mass.clone()
        found = function(mass, count)
        expect(found is not None and found is not ..., f"best_layers returned {found!r}: is there a `return`?")
        expect(torch.equal(mass, before), "best_layers changes its argument, work on a copy")
        expect(isinstance(found, tuple | list), f"best_layers returned {found!r}, not layers")
        found = tuple(map(int, found))
        case = f"{layers} layers, {count} of them choose"
        ascending = list(found) == sorted({*found}) and all(2 <= layer < layers for layer in found)
        expect(ascending, f"{case}: {found} are not different layers from 2 to {layers - 1}, ascending")
        expect(len(found) == count, f"{case}: {found} are {len(found)}")
        expect(found[0] == 2, f"{case}: {found} begins with layer {found[0]}, the first one is given: layer 2")
        scores = {chosen: score(mass, chosen) for chosen in candidates(layers, count)}
        best = max(scores, key=scores.get)
        message = f"{case}: {found} leave {scores[found]:.4f} of their attention to the sparse layers, {best} leave "
        hint = "; layers chosen one after another are not the best together" if count > 2 else ""
        expect(scores[found] >= scores[best] - 1e-12, f"{message}{scores[best]:.4f}{hint}")
    print("best_layers is right")


def check_own_choice(function, texts, *, solved: bool = True) -> None:
    """`function(attention)`: a score per token whose best ones hold more attention of later layers than LessIsMore's.

    Args:
        texts: name -> (steps of `kvlib.lab.lessons.selections.trace`, the layer that chooses).
        solved: whether a score that does so is known for this model; if not, what the two hold is only printed.
    """
    for name, (steps, layer) in texts.items():
        held = {"mine": 0.0, "theirs": 0.0}
        for attention, chosen in steps:
            own = attention[layer].clone()
            mine = function(own)
            expect(mine is not None and mine is not ..., f"my_choice returned {mine!r}: is there a `return`?")
            tokens, shape = attention.shape[-1], tuple(mine.shape)
            expect(shape == (tokens,), f"my_choice: shape {shape}, expected (tokens,) = {(tokens,)}: one set for all")
            expect(torch.equal(own, attention[layer]), "my_choice changes its argument, work on a copy")
            expect(bool(mine.isfinite().all()), "my_choice: inf or NaN; no token may be forced")
            theirs = chosen["all"][layer, 0]
            best = torch.zeros(tokens, dtype=torch.bool)
            best[[*with_newest(mine[None], int(theirs.sum()))[0]]] = True
            for which, kept in {"mine": best, "theirs": theirs}.items():
                held[which] += (attention[layer + 1 :] * kept).sum(-1).mean().item() / len(steps)
        mine, theirs = (f"{held[which]:.2%}" for which in held)
        message = f"{name}: your set holds {mine} of the later layers' attention, the one by ranks {theirs}"
        expect(not solved or held["mine"] > held["theirs"], message)
        print(message)
