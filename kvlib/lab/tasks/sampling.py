"""Drawing a prompt from a seed, and judging what a model writes after it."""

import random
import re

from kvlib.lab.tasks.catalogue import REAL_CODE, SHORTEST, Draft, Sample, find
from kvlib.lab.tasks.composing import Filler, compose, filler
from kvlib.lab.tasks.words import Draw


def draft(task: str, tokens: int, draw: Draw, **options) -> Draft:
    """What `task` states and asks in a prompt of about `tokens` tokens, questions in random order."""
    drawn = find(task).make(draw, tokens, **options)
    draw.rng.shuffle(drawn.questions)
    return drawn


def sample(task: str, tokens: int, seed: int, *, tokenizer, split: str = "test", text: Filler | None = None, **options):
    """Draw one `Sample` whose prompt and answer have together at most `tokens` tokens, and at most 2 % (and 8) fewer.

    options go to the task (`depth` of a needle). `text` replaces the split's own filler.
    Raises ValueError for an unknown task, a prompt too short, an option out of range.
    """
    family = find(task)
    if tokens < SHORTEST:
        raise ValueError(f"tokens={tokens}: at least {SHORTEST}")

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    room = tokens
    for _ in range(8):  # tokenizers that merge across lines need a second try, ours does not
        rng = random.Random(f"{task} {tokens} {seed} {split}")
        if family.group in REAL_CODE:
            options |= {"room": room, "tokenizer": tokenizer, "split": split, "count": count}
            prompt, answer = family.make(seed, tokens, **options)
            question = prompt[prompt.rstrip("\n").rindex("\n") + 1 :]
        else:
            drawn = draft(task, tokens, Draw(rng, split), **options)
            question, answer = drawn.questions[0]
            inside = room - len(tokenizer(question).input_ids) - sum(count([answer]))
            prompt = compose(drawn, inside, rng, text or filler(split), count) + question
        length = len(tokenizer(prompt).input_ids)
        spare = tokens - length - sum(count([answer]))
        if 0 <= spare <= 8 + tokens // 50:
            return Sample(task, prompt, answer, question, seed, length)
        room += spare
    raise ValueError(f"no prompt of {tokens} tokens could be made for {task!r} with this tokenizer and filler")


def ends(rest: str) -> bool:
    """Whether text that continues with `rest` ends its last word there: 48213, not 482130."""
    return re.match(r"\w", rest) is None


def correct(sample: Sample, generated: str) -> bool:
    """Whether what was generated starts with the answer and the answer ends there."""
    return generated.startswith(sample.answer) and ends(generated[len(sample.answer) :])


def share_of_lines(sample: Sample, generated: str) -> float:
    """Share of the answer's lines that were generated before the first wrong one; 1 when `correct`."""
    if correct(sample, generated):
        return 1.0
    wanted = sample.answer.split("\n")
    right = [line == said for line, said in zip(wanted[:-1], generated.split("\n"))]
    return [*right, False].index(False) / len(wanted)


def judge(answer: list[int], chosen: list[int], tokenizer) -> float:
    """`share_of_lines` of greedy decoding, from the model's first choices at each token of the answer and after it.

    `chosen` has one token more than `answer`. Up to the first difference greedy decoding would have fed the same
    tokens; what comes later does not count. The same text in other tokens counts as wrong.
    """
    right = next((i for i, pair in enumerate(zip(answer, chosen)) if pair[0] != pair[1]), len(answer))
    if right == len(answer) and ends(tokenizer.decode([chosen[right]])):
        return 1.0
    return tokenizer.decode(answer[:right]).count("\n") / (tokenizer.decode(answer).count("\n") + 1)
