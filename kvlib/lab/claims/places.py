"""Prompts of the families whose answers stand where a method keeps tokens whatever they say.

python -m kvlib.lab.claims.places       write data/answer_places.csv anew (minutes)

A method that forces the first tokens to stay, or keeps a recent window, answers these without choosing anything.
"""

import re
from collections.abc import Iterator
from functools import cache

import pandas as pd
from transformers import AutoTokenizer

from kvlib import checksums, paths
from kvlib.lab import tasks
from kvlib.lab.claims.samples import Missing

FILE = paths.DATA / "answer_places.csv"
FIRST = 20  # tokens, as many as VATP forces to stay
PLACES = {
    "start": f"answers in the first {FIRST} tokens",
    "end": "answers in the line before the question",
}
LENGTH, SAMPLES = 2048, 200


def places(prompt: tasks.Prompt, tokenizer) -> Iterator[str]:
    """The places in which a word of the answer, of four characters or more, stands."""
    ids = tokenizer(prompt.text[: 40 * FIRST], add_special_tokens=False).input_ids[:FIRST]  # the rest need not be read
    context = prompt.context.rstrip("\n")
    texts = {"start": tokenizer.decode(ids, skip_special_tokens=True), "end": context[context.rfind("\n") + 1 :]}
    for place, text in texts.items():
        if words(text) & words(prompt.answer):
            yield place


def words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text))


def found(names, numbers, length: int = LENGTH) -> pd.DataFrame:
    """Columns place, length, task, sample: a row for every place of every such prompt."""
    tokenizer = AutoTokenizer.from_pretrained(paths.MODELS / "minilm")
    rows = [
        (place, length, task, number)
        for task in names
        for number in numbers
        for place in places(tasks.sample(task, length, number, tokenizer=tokenizer), tokenizer)
    ]
    return pd.DataFrame(rows, columns=["place", "length", "task", "sample"])


@cache
def recorded() -> pd.DataFrame:
    """`found` as it is stored, for the families of the result tables."""
    return pd.read_csv(FILE)


def prompts(place: str, length: int) -> list[tuple[str, int]]:
    """The (task, sample) whose answer stands in that place, of prompts of that length.

    Raises:
        Missing: for a length of which none are recorded.
    """
    table = recorded()
    if length not in set(table["length"]):
        raise Missing(f"{FILE.name} has no prompts of {length} tokens")
    chosen = table[(table["length"] == length) & (table["place"] == place)]
    return list(chosen[["task", "sample"]].itertuples(index=False, name=None))


if __name__ == "__main__":
    found(tasks.FAMILIES, range(SAMPLES)).sort_values(["place", "task", "sample"]).to_csv(FILE, index=False)
    checksums.record(FILE)
