"""Excerpts of held-out text and of prompts that lessons read, and tokens as they can be shown."""

import json

from kvlib import paths
from kvlib.lab import tasks

QUESTION = 128  # tokens, at most, of a question and how its answer begins
SHORTEST = 400  # tokens of a prompt in which every task finds room


def heldout_code(file: str) -> str:
    """The text of one file of the shipped held-out code, which the models were not trained on."""
    with (paths.DATA / "heldout" / "code.jsonl").open(encoding="utf-8") as lines:
        texts = {entry["file"]: entry["text"] for entry in map(json.loads, lines)}
    if file not in texts:
        raise ValueError(f"no held-out file {file!r}; there are: {', '.join(sorted(texts))}")
    return texts[file]


def page(tokenizer, task: str, seed: int, tokens: int) -> list[int]:
    """The first tokens of a prompt of `kvlib.lab.tasks.sample`, all before its question."""
    context, _, _ = tasks.sample(task, max(SHORTEST, tokens + QUESTION), seed, tokenizer=tokenizer).ids(tokenizer)
    if len(context) < tokens:
        raise ValueError(f"{task}: the question takes more than {QUESTION} tokens")
    return context[:tokens]


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
