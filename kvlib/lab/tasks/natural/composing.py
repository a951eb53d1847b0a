"""A task among the sentences of a text and in the format of a model, of the length that is wanted."""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from kvlib.lab.tasks.code import tail
from kvlib.lab.tasks.natural import texts
from kvlib.lab.tasks.natural.family import Draft, find
from kvlib.lab.tasks.natural.repeated import FIRST, LAST, SPARE
from kvlib.lab.tasks.natural.texts import PARAGRAPH, Text
from kvlib.lab.tasks.natural.words import Draw

SHORTEST = 256  # tokens
CHARACTERS = 8  # a token has fewer of them in any text, with what is left out for holding an answer
MARK = "[the text and the question]"


@dataclass(frozen=True)
class Prompt:
    """Text in three parts, and what a model should write behind them.

    context: what can be read before the question is known, with all that the chat format puts before it.
    question: up to where the answer begins. lead: how it begins; fed when a cache has been compressed, so that no
    answer token is chosen before. answers: each as it would continue the lead; all of them count if there are several.
    length: tokens of all, answers included.
    """

    task: str
    seed: int
    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    length: int

    @property
    def answer(self) -> str:
        """All answers in a row, as the one who is asked might write them."""
        return ",".join(self.answers)

    def ids(self, tokenizer) -> tuple[list[int], list[int], list[int]]:
        """Tokens of context, question and lead, of the text as a whole: the same ids however it is fed.

        A token that reaches from one part into the next belongs to the next.
        """
        whole = tokenizer(
            self.context + self.question + self.lead, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [end for _, end in whole.offset_mapping]
        first = bisect_right(ends, len(self.context))
        second = bisect_right(ends, len(self.context + self.question))
        return whole.input_ids[:first], whole.input_ids[first:second], whole.input_ids[second:]

    def answer_ids(self, tokenizer) -> list[int]:
        """Tokens of the only answer. Raises ValueError if the tokenizer joins its beginning with the lead's end."""
        text = self.question + self.lead
        before, whole = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, text + self.answer))
        if whole[: len(before)] != before:
            raise ValueError(f"{self.task}, seed {self.seed}: a token spans the lead and the answer {self.answer!r}")
        return whole[len(before) :]


def sample(task: str, tokens: int, seed: int, *, tokenizer, text: Text | None = None) -> Prompt:
    """Draw one `Prompt` of at most `tokens` tokens, answers included, and at most 2 % (and 8) fewer.

    text: what hides the facts; the novel if left out, for families of code the held-out code.

    Raises ValueError for an unknown task, a prompt too short, a seed for which there is no text.
    """
    family = find(task)
    if tokens < SHORTEST:
        raise ValueError(f"tokens={tokens}: at least {SHORTEST}")

    def count(pieces: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(pieces, add_special_tokens=False).input_ids] if pieces else []

    drawn = family.make(Draw(random.Random(f"{task} {tokens} {seed}"), seed, tokens, tokenizer))
    head, question, lead = plain_frame(drawn, tokenizer) if family.code else frame(drawn, tokenizer)
    text = text or (texts.code() if family.code else texts.novel())
    ended = question + lead + ",".join(drawn.answers)
    room = tokens - sum(count([head, ended]))
    for _ in range(8):  # tokenizers that merge across pieces need a second try
        rng = random.Random(f"text {tokens} {seed}")
        context = head + (tail(drawn.text, room, count) if drawn.text else hide(drawn, room, rng, text, count))
        length = sum(count([context + ended]))
        spare = tokens - length
        if 0 <= spare <= 8 + tokens // 50:
            return Prompt(task, seed, context, question, lead, drawn.answers, length)
        room += spare
    raise ValueError(f"no prompt of {tokens} tokens could be made for {task!r}, seed {seed}, with this tokenizer")


def plain_frame(drawn: Draft, tokenizer) -> tuple[str, str, str]:
    """What stands before the text, the question and the lead, with nothing but a token that begins every text."""
    return tokenizer.decode(tokenizer("").input_ids), f"\n{drawn.question}", drawn.lead


def frame(drawn: Draft, tokenizer) -> tuple[str, str, str]:
    """The same in the model's chat format, or as a question and an answer if it has none."""
    if tokenizer.chat_template is None:
        begin, _, lead = plain_frame(drawn, tokenizer)
        return f"{begin}{drawn.instruction}", f"{PARAGRAPH}Question: {drawn.question}\nAnswer:", f" {lead}"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    begin, end = rendered.split(MARK)
    return begin + drawn.instruction, PARAGRAPH + drawn.question + end, drawn.lead


def hide(drawn: Draft, room: int, rng: random.Random, text: Text, count: Callable) -> str:
    """The facts among pieces of `text`, together at most `room` tokens; no other piece holds an answer."""
    facts = [(depth, paragraph(fact, text)) for depth, fact in drawn.facts]
    left = room - sum(count([fact for _, fact in facts]))
    if left < FIRST + LAST:
        raise ValueError(f"too few tokens: facts leave room for {left}")
    answers = re.compile("|".join(rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in drawn.answers))
    pieces = [piece for piece in text.start(rng, CHARACTERS * left) if not answers.search(piece)]
    starts = list(accumulate(count(pieces), initial=0))
    whole = bisect_right(starts, left) - 1
    pieces = [*pieces[:whole], beginning(pieces[whole], left - starts[whole], count)]
    starts = [*starts[: whole + 1], left]
    pieces[0] = PARAGRAPH + pieces[0].lstrip()
    begin, end = FIRST + SPARE, left - LAST - SPARE
    first, last = bisect_left(starts, begin), bisect_right(starts, end) - 1
    if first > last:
        raise ValueError("too few tokens: no place for a fact is far enough from both ends")
    for depth, fact in sorted(facts, reverse=True):  # from the end, so that earlier places stay valid
        at = nearest_place(starts, begin + depth * (end - begin), first, last)
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
