"""Whether what a model wrote is the answer, or how much of it."""

import re

from kvlib.lab.evaluation.metrics import code_similarity
from kvlib.lab.tasks.catalogue import find
from kvlib.lab.tasks.prompt import Prompt


def score(prompt: Prompt, written: str) -> float:
    """Score of a text that continues the prompt, by the family's metric: 1 is right, and all answers.

    An answer that ends in a letter or digit has to end there: 48213, not 482130.
    """
    metrics = {"exact": share_of_lines, "share": share_of_answers, "similarity": similarity}
    return metrics[find(prompt.task).metric](prompt, written)


def share_of_lines(prompt: Prompt, written: str) -> float:
    """1 if the text begins with the answer. Otherwise the share of its lines that come before the first wrong one."""
    if whole(prompt.answer).match(written):
        return 1.0
    wanted = prompt.answer.removesuffix("\n").split("\n")
    right = [line == said for line, said in zip(wanted[:-1], written.split("\n"))]
    return [*right, False].index(False) / len(wanted)


def share_of_answers(prompt: Prompt, written: str) -> float:
    """Share of the answers that occur anywhere in the text."""
    return sum(bool(whole(answer.strip()).search(written)) for answer in prompt.answers) / len(prompt.answers)


def similarity(prompt: Prompt, written: str) -> float:
    return code_similarity(written, prompt.answer)


def whole(answer: str) -> re.Pattern:
    """The answer, and not as a part of longer words."""
    before = r"(?<!\w)" if re.match(r"\w", answer[0]) else ""
    behind = r"(?!\w)" if re.match(r"\w", answer[-1]) else ""
    return re.compile(before + re.escape(answer) + behind)


def judge(prompt: Prompt, chosen: list[int], tokenizer) -> float:
    """`score` of greedy decoding, from the model's first choices at each token of the answer and after it.

    `chosen` has one token more than the answer. Up to the first difference greedy decoding would have fed the same
    tokens, so the text up to there and the token chosen instead is what it writes.
    """
    answer = prompt.answer_ids(tokenizer)
    right = next((i for i, pair in enumerate(zip(answer, chosen)) if pair[0] != pair[1]), len(answer))
    return score(prompt, tokenizer.decode([*answer[:right], chosen[right]]))


def new_tokens(prompt: Prompt, tokenizer) -> int:
    """Tokens to write where several answers are asked for: twice what they take."""
    return 2 * len(tokenizer(prompt.answer, add_special_tokens=False).input_ids) + 8
