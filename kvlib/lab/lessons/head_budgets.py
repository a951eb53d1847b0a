"""How lessons show methods that give heads different budgets: their looks, and what each head of a cache stores."""

from dataclasses import dataclass

import pandas as pd
import torch

import kvlib
from kvlib.lab import tasks
from kvlib.lab.lessons.asking import ask
from kvlib.lab.plotting import COLORS, series
from kvlib.methods.uncomp import UNComp

VARIANTS = {  # configuration -> what tells it from the line of its family
    "uncomp (spread=0.0)": {"label": "uniform budgets", "color": "#6f6f6f", "marker": "o", "linestyle": "--"},
    "uncomp_random": {"label": "groups by lot", "color": COLORS["random"], "marker": "x", "linestyle": ":"},
    "uncomp_reversed": {"label": "groups reversed", "marker": "v", "markerfacecolor": "white", "linestyle": "-."},
    "uncomp_continuous": {"label": "UNComp, no groups", "marker": "s", "markerfacecolor": "white", "linestyle": ":"},
    "uncomp_stage (spread=0.0)": {"label": "stages alone", "marker": "^", "linestyle": ":"},
    "uncomp_stage": {"label": "UNComp, stages", "marker": "d", "markerfacecolor": "white", "linestyle": "--"},
    "adakv (window=8)": {"label": "Ada-KV", "color": "#a6761d", "marker": "h", "linestyle": "--"},
    "snapkv (window=8)": {"label": "SnapKV, window 8"},
    "vatp (host=snapkv)": {"label": "VATP on SnapKV"},
}

CHOSEN = {  # what a configuration of UNComp has in its name -> who has chosen budgets of heads, marker and colour
    "uncomp_random": ("by lot", "x", "#7f7f7f"),
    "uncomp_reversed": ("reversed", "v", "#000000"),
    "spread=0.0": ("uniform", "o", "#000000"),
    "statistic": ("by another statistic", "s", "#8a6d00"),
    "uncomp": ("by truncated entropy", "P", COLORS["uncomp"]),
}


def look(configuration: str) -> dict:
    """Keyword arguments of `axes.plot`: `series`, with names for what lessons compare UNComp with.

    All that budgets heads by entropy has UNComp's colour.
    """
    method, _, variant = configuration.partition(" ")
    if method.startswith("uncomp"):
        base = series(f"uncomp {variant}".strip()) | {
            "label": f"{method} {variant}".strip().replace("uncomp", "UNComp")
        }
    else:
        base = series(configuration)
    changed = VARIANTS.get(configuration, {})
    if "color" in changed:
        base |= {"markerfacecolor": changed["color"]}
    return base | changed


def chosen(configuration: str) -> dict:
    """Keyword arguments of `axes.plot` for a configuration of UNComp as a point, labelled by who chooses budgets."""
    label, marker, color = next(look for part, look in CHOSEN.items() if part in configuration)
    return {"label": label, "marker": marker, "color": color, "linestyle": "", "markersize": 6}


def tokens_stored(run) -> torch.Tensor:
    """Tokens of the first row in every KV head of a run's cache, `(layers, kv_heads)`."""
    return torch.stack([layer.lengths[0] for layer in run.cache.layers])


def given(model, snapshot, heads: torch.Tensor, methods: dict) -> dict[str, float]:
    """What some KV heads store of a prompt under each method, as a multiple of the mean over all KV heads.

    Args:
        heads: bool `(layers, kv_heads)`. methods: name -> method that can start from a snapshot.
    """
    found = {}
    for name, method in methods.items():
        with method(model) as run:
            run.fork(snapshot)
            stored = tokens_stored(run).double()
        found[name] = (stored[heads].mean() / stored.mean()).item()
    return found


@dataclass(frozen=True)
class Favoured(UNComp):
    """`UNComp` with uniform budgets but for some KV heads, which have `factor` times the mean.

    The others of their layers share what is left, alike and rounded down, so that layers store what they do otherwise.

    Args:
        heads: (layer, KV head) of each; some head of every layer has to be left.
    """

    spread: float = 0.0
    heads: tuple[tuple[int, int], ...] = ()
    factor: float = 1.0

    def budgets(self, view):
        budgets = super().budgets(view).clone()
        own = [head for layer, head in self.heads if layer == view.layer_idx]
        if own:
            mean, count = budgets[:, :1].clone(), budgets.shape[1]
            favoured = (self.factor * mean).long()
            budgets[:] = (count * mean - len(own) * favoured) // (count - len(own))
            budgets[:, own] = favoured
        return budgets


def right(model, tokenizer, prompts: list, methods: dict) -> pd.DataFrame:
    """The score of every prompt, a row each, under every method, a column each; the question is read before evictions.

    Args:
        prompts: with one answer each. methods: name -> method that can start from a snapshot.
    """
    rows = []
    for prompt in prompts:
        context, question, lead = prompt.ids(tokenizer)
        snapshot = kvlib.snapshot(model, torch.tensor([context + question], device=model.device))
        count = len(prompt.answer_ids(tokenizer)) + 1  # one more shows whether the answer ends there
        answers = {name: ask(model, tokenizer, snapshot, method, lead, count)[0] for name, method in methods.items()}
        rows.append({name: tasks.score(prompt, answer) for name, answer in answers.items()})
    return pd.DataFrame(rows)
