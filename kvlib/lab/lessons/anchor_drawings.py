"""Drawings of AnchorCoder on a few lines of code, small enough to be checked by hand, from what decodes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from kvlib.lab.lessons.drawing import EVICTED
from kvlib.lab.plotting import COLORS
from kvlib.methods.anchorcoder import AnchorCoder
from kvlib.methods.anchors import lines, moves, visible

ANCHOR, OWN = COLORS["anchorcoder"], "#a6dbc8"
KINDS = {  # what a key is to a query
    "later": "#ffffff",
    "freed": EVICTED,
    "kept": "#c7dcef",
    "own line": OWN,
    "mark": ANCHOR,
}


def begins(marked: torch.Tensor) -> torch.Tensor:
    """Where the line of every token begins, `(tokens,)`. marked: `(tokens,)`, anchors and BOS."""
    positions = torch.arange(len(marked))[None]
    return lines(marked[None], positions, torch.zeros(1, dtype=torch.int64))[0][0]


def kinds(marked: torch.Tensor, full: bool = False) -> torch.Tensor:
    """What each key is to each query, `(tokens, tokens)`: indices into `KINDS`.

    Args:
        marked: `(tokens,)`, anchors and BOS. full: a layer in which nothing is freed.
    """
    at, start = torch.arange(len(marked))[None], begins(marked)[:, None]
    seen, names = visible(at, marked[None], at, start.T)[0], list(KINDS)
    found = torch.full(seen.shape, names.index("later"))
    found[at <= at.T] = names.index("kept" if full else "freed")
    found[seen & (at >= start)] = names.index("own line")
    found[seen & (at < start)] = names.index("mark")
    return found


def mask(axes, labels: Sequence[str], marked: torch.Tensor, full: bool | Sequence[bool] = False) -> None:
    """What the queries of a layer see: rows are queries, columns keys.

    Args:
        labels: of the tokens. full: is the layer full; of a layer that reads a second one as well: is each of them?
    """
    parts = [full] if isinstance(full, bool) else list(full)
    picture = torch.cat([kinds(marked, part) for part in parts], dim=1).numpy()
    look = {"cmap": ListedColormap(list(KINDS.values())), "vmin": -0.5, "vmax": len(KINDS) - 0.5}
    axes.imshow(picture, interpolation="nearest", aspect="equal", **look)
    for edge in range(1, max(picture.shape)):
        width = 2.5 if edge % len(labels) == 0 else 0.6
        axes.axvline(edge - 0.5, color="black" if width > 1 else "white", linewidth=width)
        if edge < len(labels):
            axes.axhline(edge - 0.5, color="white", linewidth=width)
    text = {"family": "monospace", "fontsize": 7}
    axes.set_xticks(range(picture.shape[1]), [*labels] * len(parts), rotation=90, **text)
    axes.set_yticks(range(len(labels)), labels, **text)
    axes.tick_params(length=0, pad=1)
    axes.grid(False)


def legend(figure, full: bool = False, **place) -> None:
    """What the colours of `mask` say, beneath the figure unless told otherwise. full: is a full layer shown?"""
    names = {"mark": "mark of an earlier line", "own line": "own line so far"}
    names |= {"kept": "kept, as in any cache"} if full else {}
    names |= {"freed": "freed: no later line sees it"}
    patches = [Patch(facecolor=KINDS[kind], label=name) for kind, name in names.items()]
    figure.legend(handles=patches, **{"loc": "outside lower center", "ncols": len(patches), **place})


def places(axes, labels: Sequence[str], marked: torch.Tensor, heads: int) -> None:
    """At which token's place each head sees the key of each anchor (MHPE); an anchor's own place is a cross."""
    at = torch.arange(len(marked))
    turned = moves(marked[None], at[None], begins(marked)[None], heads)[0]  # (heads, tokens)
    alone = turned.eq(0).all(0)  # a mark without a line of its own stays where it is
    for end in (marked & ~alone).nonzero().flatten().tolist():
        axes.plot(end + turned[:, end], range(heads), "o", color=ANCHOR, markersize=6)
        axes.plot([end] * heads, range(heads), "x", color="#949494", markersize=5)
        axes.axvline(end + 0.5, color="#555555", linewidth=0.8)
    axes.set_yticks(range(heads), range(heads))
    axes.set_xticks(range(len(labels)), labels, rotation=90, family="monospace", fontsize=8)
    axes.tick_params(length=0)
    axes.set(ylabel="head", xlim=(-0.5, len(labels) - 0.5), ylim=(heads - 0.5, -0.5))


def schedule(axes, methods: dict[str, AnchorCoder], layers: int) -> None:
    """Which layers keep everything, which keep lines' anchors, and which read a second layer; a row per method."""
    picture = np.array([[2.0 if method.full(layer) else 1.0 for layer in range(layers)] for method in methods.values()])
    axes.pcolormesh(picture, cmap=ListedColormap([OWN, ANCHOR]), edgecolor="white", linewidth=2, vmin=1, vmax=2)
    for row, method in enumerate(methods.values()):
        for layer in range(layers):
            second = method.beyond is not None and layer > method.beyond
            text = "S" if layer == method.source else f"+{method.source}" if second else ""
            color = "white" if method.full(layer) else "black"
            axes.text(layer + 0.5, row + 0.5, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_yticks(np.arange(len(methods)) + 0.5, methods)
    axes.set_xticks(np.arange(layers) + 0.5, range(layers))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    axes.grid(False)
    handles = [
        Patch(facecolor=ANCHOR, label="full: keeps every token"),
        Patch(facecolor=OWN, label="TAA: anchors and the current line"),
        Patch(facecolor="none", label="S: source of LAA   +4: reads layer 4 as well"),
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def enriched(axes, table: pd.DataFrame, classes: Sequence[str], selections: dict[str, str]) -> None:
    """How much more attention than their share classes of tokens get, with the extremes among texts, on a log axis.

    Args:
        table: as of `sparsity.by_class`. classes: from the top down. selections: which ones -> their labels.
    """
    looks = zip(selections.items(), ("#949494", COLORS["uncomp"], COLORS["vatp"]), "xso", (-0.2, 0.0, 0.2))
    for (selection, label), color, marker, shift in looks:
        rows = table[table["selection"] == selection].set_index("class").reindex(classes)
        errors = [rows["enrichment"] - rows["low"], rows["high"] - rows["enrichment"]]
        places = np.arange(len(classes)) + shift
        look = {"linestyle": "", "color": color, "marker": marker, "markersize": 5, "elinewidth": 1, "label": label}
        axes.errorbar(rows["enrichment"], places, xerr=errors, **look)
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set(xscale="log", ylim=(len(classes) - 0.5, -0.5))
    axes.set_yticks(range(len(classes)), classes)
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
