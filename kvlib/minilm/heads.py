"""Where each head's attention goes, by kind of key token and by position, and which heads have an attention sink."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kvlib.core.support import attention_modules

KINDS = ("bos", "newline", "end", "punctuation", "blank", "digit", "word")
FIRST_ROW = 32  # rows that see few tokens say nothing about where attention goes
RECENT = 32
SINK = 0.3  # share of a head's attention on four fixed positions above which they are called a sink


def text_kind(text: str) -> str:
    """The kind of a token by its text; bytes that are no whole character and special tokens count as words."""
    if "\n" in text:
        return "newline"
    if text.isspace():
        return "blank"
    if text.strip().isdecimal():
        return "digit"
    return "punctuation" if re.fullmatch(r"\s*[^\w\s\ufffd]+\s*", text) else "word"


def decode(tokenizer, token: int) -> str:
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def token_kinds(tokenizer, windows: torch.Tensor) -> torch.Tensor:
    """Index into KINDS of each token, in the shape `(windows, length)` of the ids; position 0 is "bos" whatever it is.

    Kinds follow from the tokens' text, except "end", the tokenizer's end-of-text token.
    """
    ids, places = windows.unique(return_inverse=True)
    names = ["end" if i == tokenizer.eos_token_id else text_kind(decode(tokenizer, i)) for i in ids.tolist()]
    kinds = torch.tensor([KINDS.index(name) for name in names], device=windows.device)[places]
    kinds[:, 0] = KINDS.index("bos")
    return kinds


def statistics(probabilities: torch.Tensor, ids: torch.Tensor, kinds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the attention of each head of one layer goes in one window.

    All but `top_kind` and `top_id` are means over the query rows from FIRST_ROW on: shares of attention, and nats.

    Args:
        probabilities: `(heads, N, N)`, row = query, column = key; causal, rows sum to 1.
        ids: `(N,)` token ids; kinds: `(N,)` indices into KINDS, "bos" at position 0 and only there.

    Returns:
        `(heads,)` tensors:
        each of KINDS: mass on the tokens of that kind; together 1.
        first_four: on positions 0 to 3. first_newline: on the window's first newline, 0 if it has none.
        self, previous: on the query's own position, and on the one before.
        recent: on the RECENT positions that end with the query's own.
        top_one, top_four: on the 1 or 4 positions of the window that receive most.
        top_kind, top_id: index into KINDS, and id, of the token at the top position.
        entropy: of a row, in nats.

    Raises:
        ValueError: if there is no row from FIRST_ROW on.
    """
    if len(ids) <= FIRST_ROW:
        raise ValueError(f"a window of {len(ids)} tokens has no query row from {FIRST_ROW} on")
    rows = probabilities[:, FIRST_ROW:]
    # A share of all rows, not only of those that see the position: seen by few rows, the last lines' local attention
    # would look like a sink, and the shares of four positions could add up to more than 1.
    received = rows.mean(1)  # (heads, N)
    by_kind = received @ F.one_hot(kinds, len(KINDS)).to(received.dtype)
    newline = kinds == KINDS.index("newline")
    top = received.topk(4)
    near = [nearby(probabilities, distance) for distance in range(RECENT)]
    return {
        **dict(zip(KINDS, by_kind.unbind(1))),
        "first_four": received[:, :4].sum(1),
        "first_newline": received[:, newline & (newline.cumsum(0) == 1)].sum(1),
        "self": near[0],
        "previous": near[1],
        "recent": torch.stack(near).sum(0),
        "top_one": top.values[:, 0],
        "top_four": top.values.sum(1),
        "top_kind": kinds[top.indices[:, 0]],
        "top_id": ids[top.indices[:, 0]],
        "entropy": torch.special.entr(rows).sum(-1).mean(1),
    }


def nearby(probabilities: torch.Tensor, distance: int) -> torch.Tensor:
    """Mean mass of the rows from FIRST_ROW on at so many positions before the query, `(heads,)`."""
    return probabilities.diagonal(-distance, 1, 2)[:, FIRST_ROW - distance :].mean(1)


@contextmanager
def watching(model, look: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Inside, each layer's attention `(batch, query heads, N, N)` is shown to `look(layer, probabilities)`, then freed.

    The model computes it with transformers' "eager" attention; the implementation it had comes back in any case.
    """

    def hook(module, args, output):
        look(module.layer_idx, output[1])
        return output[0], None

    modules, before, hooks = attention_modules(model), model.config._attn_implementation, []
    try:
        model.set_attn_implementation("eager")
        hooks += [module.register_forward_hook(hook) for module in modules]
        yield
    finally:
        for handle in hooks:
            handle.remove()
        model.set_attn_implementation(before)


@torch.no_grad()
def window_statistics(model, ids: torch.Tensor, kinds: torch.Tensor) -> pd.DataFrame:
    """`statistics` of one window `(N,)` with a row for each layer and head."""
    layers = []

    def look(layer: int, probabilities: torch.Tensor) -> None:
        values = statistics(probabilities[0].float(), ids, kinds)
        columns = {name: value.double().cpu().numpy() for name, value in values.items()}
        layers.append(pd.DataFrame({"layer": layer, "head": range(probabilities.shape[1]), **columns}))

    with watching(model, look):
        model.base_model(input_ids=ids[None], use_cache=False)
    return pd.concat(layers)


def whole(windows: torch.Tensor, pad: int | None) -> torch.Tensor:
    """The windows that neither begin nor end with padding.

    Raises:
        ValueError: if there is none.
    """
    if pad is not None:
        windows = windows[(windows[:, [0, -1]] != pad).all(1)]
    if not len(windows):
        raise ValueError("no window without padding")
    return windows


def attention_report(model, tokenizer, windows: torch.Tensor) -> pd.DataFrame:
    """Where the attention of each head goes in windows of text; one row per layer and query head.

    Args:
        model: in evaluation mode; in float32, because a half-precision model rounds its probabilities.
        windows: `(windows, N)` ids, each beginning with BOS. Those that are padded are left out.

    Returns:
        layer, head, and the columns of `statistics` averaged over windows, except top_kind, the most frequent kind of
        the top position over the windows, and top_token, the most frequent text there as `repr` writes it.

    Raises:
        ValueError: if no window is whole, or if they are not longer than FIRST_ROW.
    """
    windows = whole(windows, tokenizer.pad_token_id).to(model.device)
    pairs = zip(windows, token_kinds(tokenizer, windows))
    each = pd.concat([window_statistics(model, *pair) for pair in tqdm(pairs, "attention", len(windows))])
    each["top_kind"] = each["top_kind"].map(lambda kind: KINDS[int(kind)])
    each["top_token"] = each.pop("top_id").map(lambda token: repr(decode(tokenizer, int(token))))
    groups = each.groupby(["layer", "head"])
    tops = groups[["top_kind", "top_token"]].agg(most_common)
    return groups.mean(numeric_only=True).join(tops).reset_index()


def most_common(values: pd.Series) -> str:
    """The most frequent value, of equally frequent ones the first in the alphabet; "" if there is none."""
    return next(iter(values.mode()), "")


def sinks(report: pd.DataFrame, threshold: float = SINK) -> pd.DataFrame:
    """The rows of an `attention_report` with over `threshold` on four fixed positions, the greatest share first."""
    found = report[report["top_four"] > threshold]
    return found.sort_values("top_four", ascending=False, kind="stable", ignore_index=True)


def compare(reports: dict[str, pd.DataFrame], threshold: float = SINK) -> pd.DataFrame:
    """One row per model: how many heads and layers have a sink and where, and the mean of each kind over all heads.

    Columns: model; sink_heads, sink_layers: how many; sink_share: of all heads; layers: those with sinks, as text;
    sink_token: the most common top token of the heads with sinks; largest_bos: of all heads; each of KINDS: mean.
    """
    return pd.DataFrame([{"model": name, **summary(report, threshold)} for name, report in reports.items()])


def summary(report: pd.DataFrame, threshold: float) -> dict:
    """One row of `compare`."""
    found = sinks(report, threshold)
    layers = sorted(found["layer"].unique())
    return {
        "sink_heads": len(found),
        "sink_layers": len(layers),
        "sink_share": len(found) / len(report),
        "layers": ", ".join(map(str, layers)),
        "sink_token": most_common(found["top_token"]),
        "largest_bos": report["bos"].max(),
        **report[list(KINDS)].mean().to_dict(),
    }
