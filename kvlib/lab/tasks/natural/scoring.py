"""Whether what a model wrote is the answer, or which share of the answers it holds."""

import re

from kvlib.lab.tasks.natural.composing import Prompt
from kvlib.lab.tasks.natural.family import find


def score(prompt: Prompt, written: str) -> float:
    """1 or 0 if the answer is one: whether the text begins with it. Otherwise the share of answers that occur in it.

    An answer that ends in a letter or digit has to end there: 48213, not 482130.
    """
    if find(prompt.task).metric == "exact":
        return float(bool(whole(prompt.answer).match(written)))
    return sum(bool(whole(answer.strip()).search(written)) for answer in prompt.answers) / len(prompt.answers)


def whole(answer: str) -> re.Pattern:
    """The answer, and not as a part of longer words."""
    before, behind = (r"(?<!\w)" if answer[0].isalnum() else "", r"(?!\w)" if answer[-1].isalnum() else "")
    return re.compile(before + re.escape(answer) + behind)


def judge(prompt: Prompt, answer: list[int], chosen: list[int], tokenizer) -> float:
    """`score` of greedy decoding, from the model's first choices at each token of the one answer and after it.

    `chosen` has one token more than `answer`. Up to the first difference greedy decoding would have fed the same
    tokens, so the text up to there and the token chosen instead is what it writes.
    """
    right = next((i for i, pair in enumerate(zip(answer, chosen)) if pair[0] != pair[1]), len(answer))
    return score(prompt, tokenizer.decode([*answer[:right], chosen[right]]))


def new_tokens(prompt: Prompt, tokenizer) -> int:
    """Tokens to write where several answers are asked for: twice what they take."""
    return 2 * len(tokenizer(prompt.answer, add_special_tokens=False).input_ids) + 8
