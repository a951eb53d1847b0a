"""What a task in natural language is made of."""

from dataclasses import dataclass

INSTRUCTION = "Read the following text. I will ask a question about it afterwards."


@dataclass(frozen=True)
class Draft:
    """What a task states and asks, before it stands in a text and in a model's chat format.

    facts: (depth in [0, 1], text); one that holds a newline stands in a paragraph of its own.
    lead: how the answer begins, at least one token. answers: what follows it, each as it would continue the lead.
    text: what is read instead of facts in another text, as much of its end as there is room for.
    """

    facts: list[tuple[float, str]]
    question: str
    lead: str
    answers: tuple[str, ...]
    instruction: str = INSTRUCTION
    text: str = ""
