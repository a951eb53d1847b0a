"""What each score makes of a prompt: those of the methods that run, taken from what they have added up."""

import torch

import kvlib

# What a host reads in place of attention, by a short name: the method of `kvlib.methods.vatp`, and the sinks forced.
SCORES = {
    "attention": ("forced_sinks", 0),
    "attention, 20 sinks": ("forced_sinks", 20),
    "product": ("vatp", 0),
    "product, 20 sinks": ("vatp", 20),  # this is VATP
}


def importance(model, snapshot, method: str, host: str = "h2o", **arguments) -> torch.Tensor:
    """What a method of `kvlib.methods.vatp` has added up at the end of the prompt, `(layers, kv_heads, tokens)`.

    Nothing is protected in it, neither sinks nor recent tokens: it is what the host ranks outside of these.

    Args:
        host: "h2o" or "scissorhands", which keep what they have added up.
    """
    tokens = snapshot.positions.shape[1]
    with kvlib.method(method, budget=tokens, host=host, **arguments)(model) as run:  # the whole prompt: nothing goes
        run.fork(snapshot)
    return torch.stack([layer.tail.rectangle(layer.tail.state["attention"])[0] for layer in run.cache.layers]).cpu()


def forced(score: torch.Tensor, sinks: int) -> torch.Tensor:
    """A copy of `score` `(..., tokens)` in which the first tokens come before all others."""
    score = score.clone()
    score[..., :sinks] = torch.inf
    return score


def all_scores(model, snapshot, seed: int = 0) -> dict[str, torch.Tensor]:
    """`random` and every entry of SCORES for one prompt, `(layers, kv_heads, tokens)` each."""
    found = {name: importance(model, snapshot, name) for name in dict.fromkeys(name for name, _ in SCORES.values())}
    chance = torch.rand(found["vatp"].shape, generator=torch.Generator().manual_seed(seed))
    return {"random": chance} | {label: forced(found[name], sinks) for label, (name, sinks) in SCORES.items()}


def best(score: torch.Tensor, budget: float) -> torch.Tensor:
    """The tokens that a score keeps, bool of its shape: int(budget · tokens), at least one; ties go to the earlier."""
    count = max(1, int(budget * score.shape[-1]))
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
