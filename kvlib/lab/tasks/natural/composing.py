"""A task among the sentences of a text and in the format of a model, of the length that is wanted."""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate

from kvlib.lab.tasks.catalogue import Family
from kvlib.lab.tasks.code import tail
from kvlib.lab.tasks.natural import texts
from kvlib.lab.tasks.natural.draft import Draft
from kvlib.lab.tasks.natural.repeated import FIRST, LAST, SPARE
from kvlib.lab.tasks.natural.texts import PARAGRAPH, Text
from kvlib.lab.tasks.natural.words import Draw
from kvlib.lab.tasks.prompt import Prompt, begin, counter, fitted

SHORTEST = 256  # tokens
CHARACTERS = 8  # a token has fewer of them in any text, with what is left out for holding an answer
MARK = "[the text and the question]"
NEVER = "(?!)"  # matches no text


def in_prose(family: Family, tokens: int, seed: int, *, tokenizer, text: Text | None = None) -> Prompt:
    """Facts among the sentences of the novel, or of `text`, in the model's format."""
    drawn = drafted(family, tokens, seed, tokenizer)
    return placed(family, tokens, seed, tokenizer, drawn, frame(drawn, tokenizer), text or texts.novel())


def in_code(family: Family, tokens: int, seed: int, *, tokenizer, text: Text | None = None) -> Prompt:
    """Facts among the lines of the held-out code, or of `text`."""
    drawn = drafted(family, tokens, seed, tokenizer)
    return placed(family, tokens, seed, tokenizer, drawn, plain_frame(drawn, tokenizer), text or texts.code())


def drafted(family: Family, tokens: int, seed: int, tokenizer) -> Draft:
    return family.make(Draw(random.Random(f"{family.make.__name__} {tokens} {seed}"), seed, tokens, tokenizer))


def placed(
    family: Family, tokens: int, seed: int, tokenizer, drawn: Draft, framed: tuple[str, str, str], text: Text
) -> Prompt:
    """The prompt of a draft. framed: what stands before the text, the question, the lead."""
    (head, question, lead), count = framed, counter(tokenizer)
    ended = question + lead + ",".join(drawn.answers)

    def build(room: int) -> Prompt:
        rng = random.Random(f"text {tokens} {seed}")
        context = head + (tail(drawn.text, room, count) if drawn.text else hide(drawn, room, rng, text, count))
        return Prompt(family.name, seed, context, question, lead, drawn.answers, sum(count([context + ended])))

    return fitted(tokens, tokens - sum(count([head, ended])), build)


def plain_frame(drawn: Draft, tokenizer) -> tuple[str, str, str]:
    """What stands before the text, the question and the lead, with nothing but a token that begins every text."""
    return begin(tokenizer), f"\n{drawn.question}", drawn.lead


def frame(drawn: Draft, tokenizer) -> tuple[str, str, str]:
    """The same in the model's chat format, or as a question and an answer if it has none."""
    if tokenizer.chat_template is None:
        begun = begin(tokenizer) + drawn.instruction
        return begun, f"{PARAGRAPH}Question: {drawn.question}\nAnswer:", f" {drawn.lead}"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, behind = rendered.split(MARK)
    return before + drawn.instruction, PARAGRAPH + drawn.question + behind, drawn.lead


def hide(drawn: Draft, room: int, rng: random.Random, text: Text, count: Callable) -> str:
    """The facts among pieces of `text`, together at most `room` tokens; no other piece holds an answer."""
    facts = [(depth, paragraph(fact, text)) for depth, fact in drawn.facts]
    left = room - sum(count([fact for _, fact in facts]))
    if left < FIRST + LAST:
        raise ValueError(f"too few tokens: facts leave room for {left}")
    answers = re.compile("|".join(rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in drawn.answers) or NEVER)
    pieces = [piece for piece in text.start(rng, CHARACTERS * left) if not answers.search(piece)]
    starts = list(accumulate(count(pieces), initial=0))
    whole = bisect_right(starts, left) - 1
    pieces = [*pieces[:whole], beginning(pieces[whole], left - starts[whole], count)]
    starts = [*starts[: whole + 1], left]
    pieces[0] = PARAGRAPH + pieces[0].lstrip()
    nearest, farthest = FIRST + SPARE, left - LAST - SPARE
    first, last = bisect_left(starts, nearest), bisect_right(starts, farthest) - 1
    if first > last:
        raise ValueError("too few tokens: no place for a fact is far enough from both ends")
    for depth, fact in sorted(facts, reverse=True):  # from the end, so that earlier places stay valid
        at = nearest_place(starts, nearest + depth * (farthest - nearest), first, last)
        if fact.startswith(PARAGRAPH):
            pieces[at] = PARAGRAPH + pieces[at].lstrip()
        pieces.insert(at, fact)
    return "".join(pieces)


def beginning(piece: str, room: int, count: Callable) -> str:
    """As many whole words of it as fit into `room` tokens."""
    words = re.findall(r"\s*\S+", piece)
    fitting = list(accumulate(words))
    return next((text for text, size in reversed([*zip(fitting, count(fitting))]) if size <= room), "")


def paragraph(fact: str, text: Text) -> str:
    """A fact with the white space before it."""
    return (PARAGRAPH if "\n" in fact and text.gap == " " else text.gap) + fact


def nearest_place(starts: list[int], wanted: float, first: int, last: int) -> int:
    """The place from `first` to `last` whose start is nearest to `wanted`."""
    return min(range(first, last + 1), key=lambda i: abs(starts[i] - wanted))
