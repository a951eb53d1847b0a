"""A prompt in three parts, its tokens, and how it gets the length that is wanted."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """Text in three parts, and what a model should write behind them.

    context: what can be read before the question is known, with all that the model's format puts before it.
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
    def text(self) -> str:
        """All that is fed, with the text of the token that begins every prompt: tokenise without special tokens."""
        return self.context + self.question + self.lead

    @property
    def answer(self) -> str:
        """All answers in a row, as the one who is asked might write them."""
        return ",".join(self.answers)

    def ids(self, tokenizer) -> tuple[list[int], list[int], list[int]]:
        """Tokens of context, question and lead, of the text as a whole: the same ids however it is fed.

        A token that reaches from one part into the next belongs to the next.
        """
        whole = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in whole.offset_mapping]
        first = bisect_right(ends, len(self.context))
        second = bisect_right(ends, len(self.context + self.question))
        return whole.input_ids[:first], whole.input_ids[first:second], whole.input_ids[second:]

    def answer_ids(self, tokenizer) -> list[int]:
        """Tokens of the only answer. Raises ValueError if the tokenizer joins its beginning with the lead's end."""
        before = self.question + self.lead
        if not splits(before, self.answer, tokenizer):
            raise ValueError(f"{self.task}, seed {self.seed}: a token spans the lead and the answer {self.answer!r}")
        fed = len(tokenizer(before, add_special_tokens=False).input_ids)
        return tokenizer(before + self.answer, add_special_tokens=False).input_ids[fed:]


def splits(before: str, after: str, tokenizer) -> bool:
    """Whether no token spans the two."""
    first, whole = tokenizer([before, before + after], add_special_tokens=False).input_ids
    return whole[: len(first)] == first


def boundary(before: str, after: str, moves: Iterable[int], tokenizer) -> tuple[str, str]:
    """The two texts with the first of these numbers of characters moved from the second so that no token spans them."""
    for move in moves:
        if splits(before + after[:move], after[move:], tokenizer):
            return before + after[:move], after[move:]
    raise ValueError(f"a token spans the beginning of {after!r}")


def begin(tokenizer) -> str:
    """The text of the token that begins every text, if the tokenizer has one."""
    return tokenizer.decode(tokenizer("").input_ids)


def counter(tokenizer) -> Callable[[list[str]], list[int]]:
    """Counts the tokens of each text."""

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids] if texts else []

    return count


def cut(task: str, seed: int, text: str, question: int, answer: str, tokenizer) -> Prompt:
    """A text as a prompt: the question begins at that character, or with the last token, which is the lead."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
    lead = max(end for end in ends if end < len(text))
    question = min(question, lead)
    length = len(tokenizer(text + answer, add_special_tokens=False).input_ids)
    return Prompt(task, seed, text[:question], text[question:lead], text[lead:], (answer,), length)


def fitted(tokens: int, room: int, build: Callable[[int], Prompt]) -> Prompt:
    """The prompt that `build(room)` makes, of at most so many tokens and at most 2 % (and 8) fewer."""
    for _ in range(8):  # tokenizers that merge across pieces need a second try
        prompt = build(room)
        spare = tokens - prompt.length
        if 0 <= spare <= 8 + tokens // 50:
            return prompt
        room += spare
    raise ValueError(
        f"no prompt of {tokens} tokens could be made for {prompt.task!r}, seed {prompt.seed}, with this tokenizer"
    )
