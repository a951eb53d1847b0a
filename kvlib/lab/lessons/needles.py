"""The needle that UNComp's authors hide and the score that they give, on pages of our novel.

Followed: menik1126/UNComp b3e9f7b, its needle test. Departures: the page is of *Moby-Dick*, in the model's chat format
and with the question before the answer; words are compared as they are, without stemming.
"""

import re
from collections import Counter

import pandas as pd

from kvlib.lab.lessons.asking import ask
from kvlib.lab.lessons.prefills import prefill
from kvlib.lab.tasks.catalogue import Family
from kvlib.lab.tasks.natural import texts
from kvlib.lab.tasks.natural.composing import SHORTEST, frame, in_prose, placed
from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.prompt import Prompt

QUESTION = "What is the best thing to do in San Francisco?"
PREFIX = "The best thing to do in San Francisco is"
ANSWER = " eat a sandwich and sit in Dolores Park on a sunny day"
NEEDLE = f"{PREFIX}{ANSWER}."
SPARE = 3  # tokens that an answer may have beside the needle's: it may begin with "to" and end with a full stop


def rouge1(written: str, needle: str) -> float:
    """F1 of the words that two texts have in common, times 100: ROUGE-1 as the release scores needles.

    A word is a run of letters a to z and digits, in lower case, and counts as often as it occurs in both.
    """
    said, wanted = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (written, needle))
    total, common = said.total() + wanted.total(), (said & wanted).total()
    return 200 * common / total if total else 0.0


def hidden(tokenizer, tokens: int, depth: float, seed: int = 0) -> Prompt:
    """The authors' needle on a page of the novel, and the question for it; the answer's first words are the lead.

    Args:
        tokens: of prompt and answer, at most. depth: from 0, near the page's beginning, to 1. seed: of the page.
    """
    drawn = Draft([(depth, NEEDLE)], QUESTION, PREFIX, (ANSWER,))
    family = Family("authors_needle", "synthetic", "exact", 0.0, lambda draw: drawn, in_prose, SHORTEST)
    return placed(family, tokens, seed, tokenizer, drawn, frame(drawn, tokenizer), texts.novel())


def found(model, tokenizer, prompts: dict, methods: dict) -> pd.DataFrame:
    """What each method leaves of needles: the question is read before anything is evicted, but for the lead.

    Args:
        prompts: (tokens, depth) -> prompt with one answer. methods: name -> method that can start from a snapshot.

    Returns:
        a row per prompt and method: tokens, depth, method, answer, of at most SPARE tokens more than the right one;
        found, whether that is in it; rouge, `rouge1` of what lead and answer make, against the right sentence.
    """
    rows = []
    for (tokens, depth), prompt in prompts.items():
        context, question, lead = prompt.ids(tokenizer)
        snapshot, count = prefill(model, context + question), len(prompt.answer_ids(tokenizer)) + SPARE
        begun = (prompt.question + prompt.lead).splitlines()[-1]
        for name, method in methods.items():
            answer, _ = ask(model, tokenizer, snapshot, method, lead, count)
            row = {"tokens": tokens, "depth": depth, "method": name, "answer": answer}
            row["found"] = prompt.answer.strip() in answer
            rows.append(row | {"rouge": rouge1(begun + answer, begun + prompt.answer)})
    return pd.DataFrame(rows)
