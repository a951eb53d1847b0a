"""UNComp's groups of heads by the entropy of their queries, counted from 0: the lowest entropy, the smallest budget.

Followed: menik1126/UNComp b3e9f7b. The release counts over windows of a calibration text how often a head falls into
each group (`release`); ours is the mean of its ranks (`clean`), close to the mean of entropies that the paper's second
version is reported to have. On one prompt, without calibration, `by_rank` of one of `STATISTICS` is all of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from kvlib import calibration
from kvlib.core.method import require, whole
from kvlib.methods.entropy import density, entropy, participation_ratio, spectrum, truncation

CALIBRATION = "uncomp.json"
STATISTICS = {  # of rotated queries `(..., tokens, head_dim)`, `(..., tokens)` of which are real: `(...)`, ranks heads
    "truncated": lambda query, real: entropy(spectrum(query, real), truncation(query.shape[-1])),
    "full": lambda query, real: entropy(spectrum(query, real)),
    "renormalised": lambda query, real: entropy(spectrum(query, real), truncation(query.shape[-1]), renormalised=True),
    "participation": lambda query, real: participation_ratio(density(query, real)),
}


def per_kv_head(entropies: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean over the query heads of each KV head, `(..., kv_heads)`, from `(..., query_heads)`; ours.

    The release types query heads and stores keys and values once for each of them.
    """
    return entropies.unflatten(-1, (kv_heads, -1)).mean(-1)


def group_sizes(heads: int, groups: int) -> list[int]:
    """Heads in each group, as equal as can be; those left over go to the outermost groups, the lowest first.

    The release has the same sizes: 11, 10, 11 for 3 groups of 32 heads; 7, 6, 6, 6, 7 for 5.

    Raises:
        ValueError: for no group, and for more groups than heads.
    """
    require("groups", groups, whole(groups, 1) and groups <= heads, f"a number of groups from 1 to {heads} heads")
    outermost_first = sorted(range(groups), key=lambda group: min(group, groups - 1 - group))
    left, odd = heads % groups, heads % groups % 2 * (groups % 2)
    larger = outermost_first[: left - odd] + outermost_first[-1:] * odd
    return [heads // groups + (group in larger) for group in range(groups)]


def ranks(score: torch.Tensor) -> torch.Tensor:
    """Place of each head among all of `(..., heads)`, 0 the lowest; of equal ones the first head has the lower one."""
    return score.argsort(dim=-1, stable=True).argsort(dim=-1)


def by_rank(score: torch.Tensor, groups: int) -> torch.Tensor:
    """The group of each head `(..., heads)`, int64: heads in ascending order of their score, cut into equal groups."""
    of_rank = [group for group, size in enumerate(group_sizes(score.shape[-1], groups)) for _ in range(size)]
    return torch.tensor(of_rank, device=score.device)[ranks(score)]


def clean(entropies: torch.Tensor, groups: int) -> torch.Tensor:
    """The group of each head `(..., heads)` by its mean rank over windows, from `(windows, ..., heads)`."""
    return by_rank(ranks(entropies).double().mean(0), groups)


def release(entropies: torch.Tensor, groups: int) -> torch.Tensor:
    """As `clean`, by the release's rule: from the lowest on, each group takes the heads that most windows put there.

    Those that a lower group has taken are gone; of equal ones the first are taken. With two groups this is the
    release's count of windows in which a head is in the upper half.
    """
    labels = by_rank(entropies, groups)
    found = torch.full_like(labels[0], -1)
    for group, size in enumerate(group_sizes(labels.shape[-1], groups)):
        votes = (labels == group).sum(0).masked_fill(found >= 0, -1)
        found.scatter_(-1, votes.argsort(dim=-1, descending=True, stable=True)[..., :size], group)
    return found


RULES = {"clean": clean, "release": release}


@dataclass(frozen=True)
class Measured:
    """What `python -m kvlib.calibration.head_groups` has measured of a model.

    Attributes:
        entropy: corpus -> truncated entropy of rotated queries in nats, `(windows, layers, query_heads)`, float64.
        layer_scores: corpus -> `layer_scores` of the full entropy, `(windows, layers)`, float64.
        kv_heads. head_dim. k: eigenvalues that count in `entropy`.
    """

    entropy: dict[str, torch.Tensor]
    layer_scores: dict[str, torch.Tensor]
    kv_heads: int
    head_dim: int
    k: int

    def groups(
        self, count: int, rule: str = "clean", stored: bool = True, over_layers: bool = False, corpus: str | None = None
    ) -> torch.Tensor:
        """The group of each head, `(layers, kv_heads)`, int64.

        Args:
            count: groups. rule: "clean" or "release".
            stored: type KV heads; False types query heads, `(layers, query_heads)`.
            over_layers: groups of all heads of the model, instead of within each layer; ours.
            corpus: whose windows; None: all.

        Raises:
            ValueError: for another rule or corpus, and for more groups than heads.
        """
        require("rule", rule, rule in RULES, " or ".join(map(repr, RULES)))
        require("corpus", corpus, corpus in (None, *self.entropy), " or ".join(map(repr, self.entropy)))
        entropies = torch.cat([*self.entropy.values()]) if corpus is None else self.entropy[corpus]
        entropies = per_kv_head(entropies, self.kv_heads) if stored else entropies
        if over_layers:
            return RULES[rule](entropies.flatten(1), count).view(entropies.shape[1:])
        return RULES[rule](entropies, count)


def read(file: Path) -> Measured:
    """A calibration, whosever it is."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    measured = (
        {name: torch.tensor(corpus[what], dtype=torch.float64) for name, corpus in recorded["corpora"].items()}
        for what in ("entropy", "layer_scores")
    )
    return Measured(*measured, recorded["kv_heads"], recorded["head_dim"], recorded["k"])


def load(source: str | Path, model) -> Measured:
    """The calibration of this model. source: the name of a shipped model, or a folder.

    Raises:
        ValueError: if there is none, or it is that of another model.
    """
    file = calibration.find(source, CALIBRATION)
    calibration.require_same(model, json.loads(file.read_text(encoding="utf-8"))["fingerprint"], file)
    return read(file)
