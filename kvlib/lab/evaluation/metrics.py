"""LongBench's metrics, with every quirk of the official evaluation: a score here is one that its script would give.

Source: `LongBench/metrics.py` and `LongBench/eval.py` of THUDM/LongBench (MIT), commit 2e00731, as VATP and UNComp use
them; the scores they gave to 360 pairs of texts are in `tests/parity/longbench_metrics`. The scripts call two packages
whose formulas are written out here: rouge 1.0.1 and fuzzywuzzy 0.18.0, the latter over difflib, which is what its
plain installation uses. With python-Levenshtein beside it fuzzywuzzy gives other numbers (`code_similarity`).

Departures: what the scripts cannot judge raises ValueError instead of scoring 0 or failing by accident (no answer, a
label without a number, classes missing). Four Chinese data sets are left out, because they score segmented words or
another label: multifieldqa_zh, dureader, vcsum, passage_retrieval_zh.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

PASSED_OVER = ("`", "#", "//")  # marks of generated lines that `code_similarity` does not judge
LONGEST_TRACE = 990  # steps that rouge can trace, one call each, before Python 3.11 stops it; measured from eval.py

# Question answering


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words of both texts, each counted as often as it occurs; 0 when either has no words."""
    said, wanted = words(prediction), words(answer)
    common = (Counter(said) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """Words in lower case, without articles and ASCII punctuation: "a-b" is one word, and typographic quotes stay."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


# Summaries


def rouge_l(prediction: str, answer: str, longest_trace: float = LONGEST_TRACE) -> float:
    """F1 of ROUGE-L over whole summaries, as the package rouge counts it: in distinct words.

    Every sentence of the answer is compared with every sentence of the prediction; the words of all their longest
    common subsequences together are divided by the distinct words of each text. So repeating a word costs nothing, and
    only the order within sentences counts. Texts without a sentence score 0, identical ones 1 - 5e-9.

    The package traces subsequences by recursion, and LongBench scores 0 whatever raises an error: so do texts with a
    sentence pair of more than `longest_trace` steps. math.inf lifts this limit, for scores that mean something.
    """
    said, wanted = sentences(prediction), sentences(answer)
    if not said or not wanted:
        return 0.0
    common: set[str] = set()
    for reference in wanted:
        for sentence in said:
            shared, steps = common_subsequence(reference, sentence)
            if steps > longest_trace:
                return 0.0
            common.update(shared)
    precision = len(common) / len(set().union(*said))
    recall = len(common) / len(set().union(*wanted))
    return 2 * (precision * recall / (precision + recall + 1e-8))


def sentences(text: str) -> list[list[str]]:
    """Words between full stops, those inside "1.2" too; a blank sentence has one word, the empty one."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def common_subsequence(first: list[str], second: list[str]) -> tuple[list[str], int]:
    """A longest common subsequence, from its end, and the steps of tracing it; of several the one that rouge finds."""
    longest = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            longest[i + 1][j + 1] = longest[i][j] + 1 if word == other else max(longest[i][j + 1], longest[i + 1][j])
    found, steps, i, j = [], 0, len(first), len(second)
    while i and j:
        steps += 1
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found, steps


# Labels and numbers


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, if the right one is among them.

    A class whose name lies inside the right one's ("Food" in "Fast food") does not count. But the official loop walks
    through the list that it shortens, and so passes over the class after each one that it drops, which then counts.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        name = named[place]
        if name in answer and name != answer:
            del named[place]  # the next one moves here, and the loop goes on behind it
        place += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are N, for the answer "Paragraph N"."""
    label = re.search(r"Paragraph (\d+)", answer)
    if label is None:
        raise ValueError(f"answer={answer!r}: must contain 'Paragraph' and a number")
    return count(prediction, label.group(1))


def count(prediction: str, answer: str | int) -> float:
    """Share of the numbers in the prediction that are the answer, digit by digit: neither "07" nor "7.0" is "7"."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


# Code


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the answer and the prediction's first line that is neither fence nor comment, to two decimals.

    A line with a backtick, "#" or "//" anywhere is passed over, strings and integer division included. If none is left
    the empty text is judged, which is right (1) only for an empty answer.

    fuzzywuzzy's ratio over difflib: matching blocks are chosen greedily, and in answers of 200 characters or more the
    frequent characters begin none, so that exchanging the texts may change the score. With python-Levenshtein
    installed fuzzywuzzy takes the longest common subsequence instead, which differs in 8 of the 61 recorded pairs, by
    up to 0.19. The papers do not say which they had.
    """
    line = next(filter(is_judged, lines_of(prediction)), "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def is_decided(prediction: str) -> bool:
    """Whether `code_similarity` stays what it is whatever follows, because the line that it judges has ended."""
    return any(map(is_judged, lines_of(prediction)[:-1]))


def lines_of(prediction: str) -> list[str]:
    return prediction.lstrip("\n").split("\n")


def is_judged(line: str) -> bool:
    return not any(mark in line for mark in PASSED_OVER)


# Data sets

METRICS: dict[str, Callable[..., float]] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "lsht": classification,
    "passage_retrieval_en": retrieval,
    "passage_count": count,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})  # few-shot: models go on with examples of their own


def score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """Official score of one sample: the best over its answers. LongBench reports means of it, times 100.

    dataset: a name in `METRICS`; the files of LongBench-E ("qasper_e") go by the plain name. classes: the sample's
    `all_classes`, for trec and lsht. Raises ValueError for another name, no answer, classes missing.
    """
    if dataset not in METRICS:
        raise ValueError(f"dataset={dataset!r}: must be one of {', '.join(METRICS)}")
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers={answers!r}: must be a list of at least one")
    metric = METRICS[dataset]
    options = {}
    if metric is classification:
        if not classes:
            raise ValueError(f"classes={classes!r}: {dataset} needs the names of its classes")
        options["classes"] = classes
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(metric(prediction, answer, **options) for answer in answers)
