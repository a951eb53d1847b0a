"""What the lessons compute beside the library: attention maps, damage done by evictions, what methods keep.

Everything that looks at attention starts from a `kvlib.snapshot` of one prompt and works in float64.
"""

import json
import re

import pandas as pd
import torch

import kvlib
from kvlib import paths
from kvlib.core import attention
from kvlib.lab import tasks


def heldout_code(file: str) -> str:
    """The text of one file of the shipped held-out code, which the models were not trained on."""
    with (paths.DATA / "heldout" / "code.jsonl").open(encoding="utf-8") as lines:
        texts = {entry["file"]: entry["text"] for entry in map(json.loads, lines)}
    if file not in texts:
        raise ValueError(f"no held-out file {file!r}; there are: {', '.join(sorted(texts))}")
    return texts[file]


def token_labels(tokenizer, ids) -> list[str]:
    r"""Tokens as they can be written beside an axis: a space is `·`, a newline `\n`."""
    return [tokenizer.decode([i]).replace("\n", r"\n").replace(" ", "·") for i in ids]


# Attention


def attention_map(snapshot, layer: int, last: int | None = None) -> torch.Tensor:
    """Softmax attention of all queries, or the `last` ones: `(query_heads, queries, tokens)` in float64."""
    query, key, _, scaling = expanded(snapshot, layer)
    query, tokens = query[:, -(last or key.shape[1]) :], key.shape[1]
    hidden = torch.ones(query.shape[1], tokens, dtype=torch.bool).triu(1 + tokens - query.shape[1])
    return (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)


def attention_received(snapshot) -> torch.Tensor:
    """Share of all attention that each token receives, `(layers, query_heads, tokens)`; sums to 1 over the tokens."""
    rows = [
        attention.column_sums(query.double(), key.double(), scaling=scaling)
        for query, key, _, scaling in snapshot.layers
    ]
    return torch.cat(rows).flatten(1, 2).cpu() / snapshot.positions.shape[1]


def expanded(snapshot, layer: int):
    """Query, key, value `(query_heads, tokens, head_dim)` of the first row in float64 on the CPU, and the scaling.

    Keys and values of a group stand once per query head.
    """
    query, key, value, scaling = snapshot.layers[layer]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return (*(x[0].double().cpu() for x in (query, key, value)), scaling)


def show_heads(axes, share: torch.Tensor):
    """Draw a share per head, `(layers, heads)`, in percent on a logarithmic scale, with numbers; returns the image."""
    image = axes.imshow((100 * share).numpy(), norm="log", clim=(1, 100), rasterized=True, aspect="auto")
    for layer, row in enumerate((100 * share).tolist()):
        for head, value in enumerate(row):
            color = "white" if value < 15 else "black"
            axes.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=9, color=color)
    axes.set(xlabel="head", xticks=range(share.shape[1]), yticks=range(share.shape[0]))
    axes.grid(False)
    return image


# Evicting one token


def remove_each(query, key, value, scaling) -> torch.Tensor:
    """What happens to the attention output when token j is not there, for every j in turn.

    Row j of keys and values is left out and the softmax is taken over the others.

    Args:
        query: `(head_dim,)`; key, value: `(tokens, head_dim)`.

    Returns:
        o' − o, `(tokens, head_dim)`.
    """
    output = (key @ query * scaling).softmax(0) @ value
    changes = []
    for j in range(len(key)):
        others = torch.arange(len(key)) != j
        changes.append((key[others] @ query * scaling).softmax(0) @ value[others] - output)
    return torch.stack(changes)


def eviction_errors(snapshot, layer: int, last: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to each token, the exact error of evicting it alone, and the size of the output: means over queries.

    Args:
        last: how many of the last queries.

    Returns:
        a and ‖o' − o‖₂ = a / (1 − a) · ‖o − v‖₂, `(query_heads, tokens)`; ‖o‖₂ `(query_heads, 1)`.
    """
    value = expanded(snapshot, layer)[2]
    weights = attention_map(snapshot, layer)[:, -last:]  # (query_heads, queries, tokens)
    output = weights @ value
    errors = weights / (1 - weights) * torch.cdist(output, value)
    return weights.mean(1), errors.mean(1), output.norm(dim=-1).mean(1, keepdim=True)


def best_kept(score: torch.Tensor, errors: torch.Tensor, share: float) -> torch.Tensor:
    """Of the `share` of tokens whose loss would hurt most, how many `score` keeps in as many places: `(heads,)`."""
    count = max(1, int(share * errors.shape[-1]))
    wanted = torch.zeros_like(errors).scatter_(-1, errors.topk(count).indices, 1)
    return wanted.gather(-1, score.topk(count).indices).sum(-1) / count


# What methods keep


def kept_mask(run) -> torch.Tensor:
    """Which tokens of the first row each head keeps, `(layers, kv_heads, tokens)` bool."""
    layers = [run.kept(layer)[0].cpu() for layer in range(len(run.cache.layers))]
    mask = torch.zeros(len(layers), len(layers[0]), int(run.cache.layers[0].tokens[0]), dtype=torch.bool)
    for layer, kept in enumerate(layers):
        for head, tokens in enumerate(kept):
            mask[layer, head, tokens[tokens >= 0]] = True
    return mask


def looking_heads(snapshot, tokens: list[int], count: int) -> list[tuple[int, int, torch.Tensor]]:
    """The KV heads in which the last query attends most to `tokens`: `(layer, head, attention to each)`, most first.

    Of a group of query heads it is the one that attends most.
    """
    kv_heads, found = snapshot.layers[0][1].shape[1], []
    for layer in range(len(snapshot.layers)):
        attention_to = attention_map(snapshot, layer, last=1)[:, 0, tokens]  # (query_heads, tokens)
        groups = attention_to.view(kv_heads, -1, len(tokens))
        for head, group in enumerate(groups):
            found.append((layer, head, group[group.sum(1).argmax()]))
    return sorted(found, key=lambda entry: -entry[2].sum())[:count]


def answer_at_start(sample: tasks.Sample, tokenizer, tokens: int) -> bool:
    """Does a word of the answer, of four characters or more, stand within the first `tokens` tokens of the prompt?"""
    ids = tokenizer(sample.prompt[: 40 * tokens]).input_ids[:tokens]  # the rest need not be read
    start, answer = (
        set(re.findall(r"\w{4,}", text)) for text in (tokenizer.decode(ids, skip_special_tokens=True), sample.answer)
    )
    return bool(start & answer)


def answers(model, tokenizer, task: str, tokens: int, samples, methods: dict) -> pd.DataFrame:
    """What the model writes where the answer belongs: a row per sample, the right answer, a column per method."""
    rows = {}
    for number in samples:
        drawn = tasks.sample(task, tokens, number, tokenizer=tokenizer)
        prefill = kvlib.snapshot(model, tokenizer(drawn.prompt, return_tensors="pt").input_ids.to(model.device))
        rows[number] = {"answer": drawn.answer}
        for name, method in methods.items():
            with method(model) as run:
                cache, made = run.fork(prefill), [prefill.logits.argmax(-1)]
                for _ in tokenizer(drawn.answer, add_special_tokens=False).input_ids[1:]:
                    made.append(model(made[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
            rows[number][name] = tokenizer.decode(torch.cat(made))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sample")
