"""Excerpts of held-out text and of prompts that lessons read, and tokens as they can be shown."""

import json

import kvlib
from kvlib import paths


def heldout_code(file: str) -> str:
    """The text of one file of the shipped held-out code, which the models were not trained on."""
    with (paths.DATA / "heldout" / "code.jsonl").open(encoding="utf-8") as lines:
        texts = {entry["file"]: entry["text"] for entry in map(json.loads, lines)}
    if file not in texts:
        raise ValueError(f"no held-out file {file!r}; there are: {', '.join(sorted(texts))}")
    return texts[file]


def read_code(model, tokenizer, file: str, scored: int, later: int):
    """Snapshots of the first `scored` tokens of a held-out file, and of these and the `later` tokens behind them.

    The file is read from its first function on.

    Raises:
        ValueError: for a file with fewer tokens.
    """
    text = heldout_code(file)
    text = text[max(text.find("def "), 0) :]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=scored + later).input_ids.to(model.device)
    if ids.shape[1] < scored + later:
        raise ValueError(f"{file} has {ids.shape[1]} tokens from its first function on, {scored + later} are needed")
    return kvlib.snapshot(model, ids[:, :scored]), kvlib.snapshot(model, ids)


def token_labels(tokenizer, ids) -> list[str]:
    r"""Tokens as they can be written beside an axis: a space is `·`, a newline `\n`."""
    return [tokenizer.decode([i]).replace("\n", r"\n").replace(" ", "·") for i in ids]


def answer_places(prompt, tokenizer) -> list[int]:
    """Where the answer stands in a prompt of `kvlib.lab.tasks.sample`: positions of its tokens in the context."""
    text = prompt.context + prompt.question + prompt.lead
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    start = prompt.context.index(prompt.answer.strip())
    end = start + len(prompt.answer.strip())
    return [place for place, (first, last) in enumerate(spans) if first < end and last > start]
