"""Perplexity of a text under a cache method: loss of the tokens that follow a compressed context.

    KVLIB_DATA=FOLDER python -m kvlib.lab.evaluation.perplexity    wikitext-2 and a book, with the shipped models

The text is tokenised once and cut into windows. Of each window the first `context` tokens are prefilled, in one pass
that all configurations share, and compressed; the `targets` tokens behind them are then fed with the method active, and
their losses are added up. Losses of the context are not counted: there nothing has been evicted yet.

Feeding: methods that evict while decoding, or that attend in their own way, get one token a pass, as in generation.
For all others the targets go through the model in a single pass, which gives the same losses (tested).
`context=1` with a method that evicts to a number of tokens is the protocol of the PG-19 runs of TidalDecode: no
prefill, every token decoded (2410.05076); `losses` gives the values behind a running perplexity.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.lab.evaluation import benchmarks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.prompts import Prompts, compressed, device_name, losses, one_by_one, window_of

FULL = (Configuration("full", 1.0),)
LN_2 = math.log(2)
TEXTS = ("wikitext-2", "moby-dick")
COMPARED = (
    *FULL,
    *(Configuration(m, b) for b in (0.05, 0.2) for m in ("random", "streaming_llm", "h2o", "snapkv", "knorm")),
    *(Configuration("streaming_llm", b, '{"sinks": 0}') for b in (0.05, 0.2)),
)


@dataclass(frozen=True)
class Window:
    """Token ids of a piece of text: what is prefilled, and what is predicted. characters: those of the targets."""

    context: list[int]
    targets: list[int]
    characters: int


def perplexity(
    model,
    tokenizer,
    text: str,
    configurations: Sequence[Configuration] = FULL,
    *,
    name: str,
    text_name: str,
    context: int = 1024,
    targets: int = 256,
    windows: int = 16,
    stride: int | None = None,
    batch: int = 1,
) -> pd.DataFrame:
    """One row per window and configuration; `summary` makes nats per token and bits per character of them.

    Args:
        name, text_name: the model's and the text's names for the table.
        context: tokens prefilled, the BOS token included if the tokenizer begins texts with one: every window gets it.
        targets: tokens predicted per window.
        windows: how many, spread evenly over the text.
        stride: tokens from one window's start to the next one's instead, beginning at the start of the text; `windows`
            is then the most there can be. `stride=targets` predicts every token once.
        batch: windows per prefill.

    Returns:
        columns model, text, context, method, budget, arguments, window, nats (sum over the targets), tokens, characters
        (of the targets), stored_bytes (K and V after the context), full_bytes, clamped, protocol, torch, device.

    Raises:
        ValueError: for lengths that are not positive, a text too short for a window, windows longer than the model's,
            and a tokenizer that cannot tell which characters its tokens are.
    """
    cut = cut_windows(tokenizer, text, context, targets, windows, stride)
    limit = window_of(model)
    if limit is not None and context + targets - 1 > limit:  # the last target is predicted, but never fed
        raise ValueError(f"context={context} and targets={targets}: the model's window is {limit} tokens")
    rows = []
    for first in range(0, len(cut), batch):
        for row in evaluate_windows(model, cut[first : first + batch], configurations, first):
            rows.append({"model": name, "text": text_name, "context": context, **row})
    protocol = f"{context} tokens compressed, the next {targets} teacher-forced"
    return pd.DataFrame(rows).assign(protocol=protocol, torch=torch.__version__, device=device_name(model))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per model, text, configuration and protocol: windows, nats_per_token, perplexity and bits_per_character.

    Sums over the windows, divided: each token weighs the same. Only bits per character can be compared between models
    with different tokenizers.
    """
    keys = ["model", "text", "method", "budget", "arguments", "protocol"]
    groups = table.groupby(keys, sort=False)
    total = groups[["nats", "tokens", "characters"]].sum()
    nats_per_token = total["nats"] / total["tokens"]
    return pd.DataFrame(
        {
            "windows": groups.size(),
            "nats_per_token": nats_per_token,
            "perplexity": nats_per_token.map(math.exp),
            "bits_per_character": total["nats"] / LN_2 / total["characters"],
        }
    ).reset_index()


# Cutting


def cut_windows(
    tokenizer, text: str, context: int, targets: int, windows: int, stride: int | None = None
) -> list[Window]:
    """The windows of a text; arguments and errors as in `perplexity`.

    Tokens are those of the whole text, wherever windows begin. A character that is split over several tokens counts
    with the last of them, and a space that the tokenizer drops with the token before it, so that no character counts
    twice and, over windows that cover the text, none is left out.
    """
    for argument, value in {"context": context, "targets": targets, "windows": windows, "stride": stride}.items():
        if value is not None and value < 1:
            raise ValueError(f"{argument}={value}: at least 1")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters a token is: use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, begins = encoded.input_ids, [begin for begin, _ in encoded.offset_mapping] + [len(text)]
    bos = first_tokens(tokenizer)
    span = context - len(bos) + targets
    if len(ids) < span or context < len(bos):
        raise ValueError(f"the text has {len(ids)} tokens, context={context} and targets={targets} need {span}")
    result = []
    for begin in places(len(ids), span, windows, stride):
        middle, end = begin + span - targets, begin + span
        result.append(Window(bos + ids[begin:middle], ids[middle:end], begins[end] - begins[middle]))
    return result


def first_tokens(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: BOS or nothing."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def places(tokens: int, span: int, windows: int, stride: int | None) -> list[int]:
    """Where windows of `span` tokens begin in a text of `tokens`: evenly spread, or every `stride` tokens."""
    last = tokens - span
    if stride is not None:
        return list(range(0, last + 1, stride))[:windows]
    return sorted({round(last * i / max(1, windows - 1)) for i in range(windows)})


def evaluate_windows(model, cut: Sequence[Window], configurations, first: int) -> Iterator[dict]:
    """The rows of some windows, numbered from `first`, whose contexts are prefilled together."""
    ids = torch.tensor([window.context for window in cut], device=model.device)
    targets = torch.tensor([window.targets for window in cut], device=model.device)
    prompts = Prompts(model, ids)
    for configuration in configurations:
        method = configuration.make()
        with compressed(prompts, method) as read:
            total = losses(read.feed, read.logits, targets, one_by_one(method)).sum(1).tolist()
        for row, window in enumerate(cut):
            yield {
                **asdict(configuration),
                "window": first + row,
                "nats": total[row],
                "tokens": len(window.targets),
                "characters": window.characters,
                "stored_bytes": read.stored[row],
                "full_bytes": read.full[row],
                "clamped": read.clamped[row],
            }


def main(argv: list[str] | None = None) -> None:
    """Write data/results/00_kv_cache_texts.parquet: `COMPARED` on 16 windows of each text, for minilm."""
    argparse.ArgumentParser("python -m kvlib.lab.evaluation.perplexity", description=main.__doc__).parse_args(argv)
    model, tokenizer = kvlib.load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tables = []
    for text in tqdm(TEXTS, disable=None):
        whole = benchmarks.load(text)[0]["text"]
        tables.append(perplexity(model, tokenizer, whole, COMPARED, name="minilm", text_name=text, batch=8))
    file = paths.RESULTS / "00_kv_cache_texts.parquet"
    pd.concat(tables).to_parquet(file, compression="zstd", index=False)
    checksums.record(file)


if __name__ == "__main__":
    main()
