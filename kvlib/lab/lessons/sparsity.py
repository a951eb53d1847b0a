"""How concentrated attention is on code, and on which tokens it lies: the study of AnchorCoder (2411.06680), with
controls.

The first token alone can make any row look sparse, and so does the own line: each number is taken over all that a query
sees, without the first token, and over earlier lines alone (`selections`). A row is divided by what is selected of it.
"""

import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import pandas as pd
import torch

from kvlib.methods.anchorcoder import SETTINGS, AnchorCoder, sees
from kvlib.methods.anchors import plant

CLASSES = ("first", "anchor", "newline", "indentation", "identifier", "operator", "bracket", "keyword", "other")
FIRST_ROW, EVERY = 32, 16  # earlier rows are too short to say something, and neighbours say the same


# Attention


class Rows(NamedTuple):
    """Attention of some queries in one layer.

    weights: `(query_heads, rows, slots)`, sums to 1. seen: `(rows, slots)` bool. at: `(slots,)`, which token a slot
    holds; of a layer that reads a second one every token has two. queries: `(rows,)`, which tokens ask.
    """

    weights: torch.Tensor
    seen: torch.Tensor
    at: torch.Tensor
    queries: torch.Tensor


@dataclass(frozen=True)
class Watched(AnchorCoder):
    """AnchorCoder, and what every `every`-th query looks at, from query `first` on."""

    first: int = FIRST_ROW
    every: int = EVERY
    rows: list[Rows] = field(default_factory=list)

    def attend(self, view):
        seen_by = slice(self.first, None, self.every)
        reading, seen = self.read(view)
        all_seen = sees(view, full=True) if seen is None else seen
        query, key = reading.query[0, :, seen_by], reading.key[0].repeat_interleave(view.groups, dim=0)
        visible = all_seen[0, 0, seen_by]
        weights = (query @ key.mT * view.scaling).masked_fill(~visible, -torch.inf).softmax(-1)
        places = (visible, reading.positions[0, 0], view.query_positions[0, seen_by])
        self.rows.append(Rows(weights, *places))
        return super().attend(view)


@torch.no_grad()
def watch(
    model, ids: Sequence[int], method: AnchorCoder | None = None, first: int = FIRST_ROW, every: int = EVERY
) -> list[Rows]:
    """Attention of every layer while a text is read in one pass.

    Args:
        ids: the text's tokens. method: None for full attention.
    """
    full = AnchorCoder(anchor=0, per=1, spread=False)  # where all is seen, anchors are tokens like others
    watched = Watched(**asdict(method or full), first=first, every=every)
    with watched(model):
        model(torch.tensor([ids], device=model.device), logits_to_keep=1)
    return watched.rows


def study(model, tokenizer, texts: dict[str, str], tokens: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Concentration and enrichment on the beginnings of Python texts.

    A model that was trained with anchors (`config.anchorcoder`) reads them with anchors, and as it was trained.

    Args:
        texts: name -> text. tokens: of each, anchors not counted.

    Returns:
        tables as of `concentration` and `enrichment`, with a column text.
    """
    settings, found = getattr(model.config.get_text_config(), SETTINGS, None), []
    for name, text in texts.items():
        ids, classes = (x[:tokens] for x in token_classes(text, tokenizer, by_line=bool(settings)))
        if settings:
            ids = plant(ids, settings["anchor"], settings["ends"], settings["longest"])
            classes = with_anchors(classes, ids, settings["anchor"])
        layers, lines = watch(model, ids, AnchorCoder() if settings else None), line_numbers(classes)
        tables = concentration(layers, lines), enrichment(layers, classes, lines)
        found.append([table.assign(text=name) for table in tables])
    return tuple(pd.concat(tables, ignore_index=True) for tables in zip(*found))


# Concentration


def gini(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Gini coefficient of the weights that are seen: 0 if they are equal, 1 - 1/n if one of n has everything.

    Args:
        weights: `(..., rows, slots)`, not negative. seen: `(rows, slots)` bool.

    Returns:
        `(..., rows)` in float64; NaN where nothing is seen.
    """
    ascending = weights.double().where(seen, 0).sort(-1).values  # what is not seen comes first, and weighs nothing
    slots, count = weights.shape[-1], seen.sum(-1, keepdim=True)
    rank = torch.arange(1, slots + 1, device=weights.device) - (slots - count)
    return ((2 * rank - count - 1) * ascending).sum(-1) / (count[..., 0] * ascending.sum(-1))


def largest(weights: torch.Tensor, seen: torch.Tensor, count: int = 2) -> torch.Tensor:
    """Share of the `count` largest of the weights that are seen; arguments and result as of `gini`."""
    weights = weights.double().where(seen, 0)
    return weights.topk(min(count, weights.shape[-1]), dim=-1).values.sum(-1) / weights.sum(-1)


def selections(rows: Rows, lines: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which slots count: name -> `(rows, slots)` bool.

    Args:
        lines: `(tokens,)`, the number of the line that each token stands in.
    """
    late = rows.seen & (rows.at > 0)
    earlier = late & (lines[rows.at.clamp(min=0)] < lines[rows.queries][:, None])
    return {"all": rows.seen, "without the first": late, "earlier lines": earlier}


def concentration(layers: Iterable[Rows], lines: torch.Tensor) -> pd.DataFrame:
    """Gini and the two largest weights of every head, means over rows.

    Returns:
        columns layer, head, selection, gini; corrected, gini · n / (n - 1), which reaches 1 however short rows are;
        two, the share of the two largest weights.
    """
    found = []
    for layer, rows in enumerate(layers):
        for selection, seen in selections(rows, lines).items():
            count, each = seen.sum(-1).double(), gini(rows.weights, seen)
            measured = {
                "gini": each,
                "corrected": each * count / (count - 1),
                "two": largest(rows.weights, seen),
            }
            several = count > 1  # one weight is no distribution
            means = pd.DataFrame({name: x[:, several].nanmean(-1).tolist() for name, x in measured.items()})
            found.append(means.rename_axis("head").reset_index().assign(layer=layer, selection=selection))
    return pd.concat(found, ignore_index=True)[["layer", "head", "selection", *measured]]


def enrichment(layers: Iterable[Rows], classes: Sequence[str], lines: torch.Tensor) -> pd.DataFrame:
    """How much attention each class of tokens receives, and how much it would if all that is seen got the same.

    Args:
        classes: of every token, as `token_classes` gives them; the first token is its own class.

    Returns:
        columns layer, selection, class, mass, expected: shares of a row, means over rows and heads; enrichment, mass
        over expected. Classes that are not selected are left out.
    """
    number = torch.tensor([CLASSES.index(name) for name in classes])
    found = []
    for layer, rows in enumerate(layers):
        member = torch.nn.functional.one_hot(number[rows.at.clamp(min=0).cpu()], len(CLASSES)).double()
        for selection, seen in selections(rows, lines).items():
            some = seen.any(-1)
            weights, seen = rows.weights[:, some].double().where(seen[some], 0), seen[some].double()
            mass = (weights / weights.sum(-1, keepdim=True)) @ member
            expected = (seen / seen.sum(-1, keepdim=True)) @ member
            shares = {"mass": mass.nanmean((0, 1)).tolist(), "expected": expected.mean(0).tolist()}
            found.append(pd.DataFrame({"class": CLASSES, **shares}).assign(layer=layer, selection=selection))
    table = pd.concat(found, ignore_index=True).query("expected > 0").reset_index(drop=True)
    table["enrichment"] = table["mass"] / table["expected"]
    return table[["layer", "selection", "class", "mass", "expected", "enrichment"]]


def by_class(table: pd.DataFrame, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """Enrichment of each class, over all layers or some together: columns selection, class, mass, expected,
    enrichment, and low and high, its extremes among the texts.

    Args:
        table: as `study` gives it.
    """
    rows = table if layers is None else table[table["layer"].isin([*layers])]
    each = rows.groupby(["selection", "class", "text"], sort=False)[["mass", "expected"]].mean()
    ratio = (each["mass"] / each["expected"]).groupby(["selection", "class"], sort=False)
    means = each.groupby(["selection", "class"], sort=False).mean()
    means = means.assign(enrichment=means["mass"] / means["expected"], low=ratio.min(), high=ratio.max())
    return means.reset_index()


# Tokens of code


def token_classes(text: str, tokenizer, by_line: bool = False) -> tuple[list[int], list[str]]:
    """Tokens of a Python text and what each of them is, one of `CLASSES`.

    A token that spans several things is what most of its characters are, whitespace not counted; one of whitespace
    alone is a newline if it has one, else indentation if it begins a line. Strings, comments and numbers are "other".

    Args:
        by_line: each line is tokenised by itself, as where anchors are planted between them.

    Raises:
        tokenize.TokenError, SyntaxError: for a text that is no Python.
    """
    kinds, start = character_classes(text), 0
    ids = list(tokenizer("").input_ids)
    classes = ["first"] * len(ids)
    for piece in re.findall(r"[^\n]*\n|[^\n]+", text) if by_line else [text]:
        cut = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += cut.input_ids
        classes += [class_of(kinds[start + first : start + last]) for first, last in cut.offset_mapping]
        start += len(piece)
    return ids, ["first", *classes[1:]]


def class_of(kinds: list[str | None]) -> str:
    """What a token is whose characters are of these kinds."""
    inked = Counter(kind for kind in kinds if kind not in (None, "newline", "indentation"))
    if inked:
        return inked.most_common(1)[0][0]  # of equally many the one that comes first
    return next((kind for kind in ("newline", "indentation") if kind in kinds), "other")


def character_classes(text: str) -> list[str | None]:
    """What every character belongs to; None for blanks inside a line."""
    kinds = [None if character.isspace() else "other" for character in text]
    for match in re.finditer(r"^[ \t]+|\n", text, re.MULTILINE):
        kinds[slice(*match.span())] = ["newline" if match[0] == "\n" else "indentation"] * len(match[0])
    begins = [0, *(match.end() for match in re.finditer("\n", text))]
    depth = 0  # of f-strings, whose inside is text here, whether or not the tokenizer of this Python looks into it
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
        if name in ("NAME", "OP") and not depth:
            kind = "keyword" if keyword.iskeyword(token.string) else "identifier"
            if name == "OP":
                kind = "bracket" if token.string in "()[]{}" else "operator"
            (line, first), (_, last) = token.start, token.end
            kinds[begins[line - 1] + first : begins[line - 1] + last] = [kind] * len(token.string)
    return kinds


def with_anchors(classes: Iterable[str], ids: Iterable[int], anchor: int) -> list[str]:
    """Classes of the tokens `ids`, anchors among them, from those of the tokens without anchors."""
    plain = iter(classes)
    return ["anchor" if token == anchor else next(plain) for token in ids]


def line_numbers(classes: Sequence[str]) -> torch.Tensor:
    """In which line each token stands, `(tokens,)`; a line ends with its anchor, or its newline in a text without."""
    end = "anchor" if "anchor" in classes else "newline"
    ended = torch.tensor([name == end for name in classes])
    return ended.cumsum(0) - ended.long()
