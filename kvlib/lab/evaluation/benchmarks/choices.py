"""LongBench v2: four choices about a long text.

Source: `prompts/0shot.txt`, `pred.py`, `result.py` and `config/model2maxlen.json` of THUDM/LongBench (MIT), commit
2e00731: the prompt, 128 new tokens, the two patterns of an answer, prompts of at most 120 000 tokens for open models.

Departures: greedy decoding, where the script samples at a temperature of 0.1; a prompt's two halves become text each by
itself (`kvlib.lab.evaluation.benchmarks.longbench.cut_middle`), there together; an empty answer is wrong, there it is
left out of the mean.
"""

import re

PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""
MAX_NEW_TOKENS = 128
LONGEST = 120_000  # tokens of a prompt
FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")


def prompt(row: dict) -> str:
    """The zero-shot prompt of a row, whose texts lose the white space around them."""
    return PROMPT.format(**{name: row[name].strip() for name in FIELDS})


def chosen(prediction: str) -> str | None:
    """The letter that a prediction names, in parentheses before one without, asterisks aside; None: it names none."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found and found[1]


def score(prediction: str, answer: str) -> float:
    return float(chosen(prediction) == answer)
