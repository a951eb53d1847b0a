"""RULER's thirteen tasks, generated here to a length in tokens: needles, variables, common words, questions.

Source: NVIDIA/RULER (Apache 2.0), commit c3f5e3b. Parameters of the tasks: `scripts/synthetic.yaml`; instructions,
beginnings of answers and their tokens: `scripts/data/synthetic/constants.py`; how samples are put together: `niah.py`,
`variable_tracking.py`, `common_words_extraction.py`, `freq_words_extraction.py` and `qa.py` beside it; metrics:
`scripts/eval/synthetic/constants.py`; greedy decoding: `scripts/config_models.sh`. The code is ours. "assigned" in the
beginning of the answer of `vt` was misspelt before their commit 4a216f4, and in results from before it.

Departures: all keys and values of a sample differ, and so do all words of `cwe`, in its example too; if there are not
enough, from about 128 Ki tokens on, they are pairs, there words of another list; sentences of essays end at a full
stop instead of where nltk ends them; samples have seeds of their own, and each as much filling as fits, where one
search is made for all samples of a task; the solved example of `vt` has a fixed number of lines (`SHOWN`); the one of
`cwe` stands in the same turn of a chat as the question, there in a turn of its own.
"""

import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

from wonderwords import RandomWord

from kvlib.lab.evaluation.benchmarks.files import File, local
from kvlib.nearest import unknown

ESSAYS = File("PaulGrahamEssays.json")
ESSAYS_FROM = (
    'what scripts/data/synthetic/json/download_paulgraham_essay.py of github.com/NVIDIA/RULER writes: {"text"}'
)
SQUAD, HOTPOT = File("squad.json"), File("hotpotqa.json")
SQUAD_FROM = "dev-v2.0.json of SQuAD, under the name that RULER gives it"
HOTPOT_FROM = "hotpot_dev_distractor_v1.json of HotpotQA, under the name that RULER gives it"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLES = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
ONE_NEEDLE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: ",
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
DOCUMENTS = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
)
DEPTHS = [round(100 * step / 39) for step in range(40)]  # of needles in essays, in per cent of the sentences
HOPS = 4
SHOWN = 14  # lines of noise in the solved example of `vt`: as many as 500 tokens hold, of about 25 tokens each
ALPHA = 2.0  # of the zeta distribution of coded words
FREQUENT_TOKENS = 50  # of the answer to `fwe`
LONG = 4096  # from here on common words appear 30 times and the others 3 times


@dataclass(frozen=True)
class Sample:
    """What a model reads, how its answer begins, the strings that it is judged by, and its longest answer."""

    prompt: str
    lead: str
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Wanted:
    """A sample's number, its length in tokens, and what the task's `read` gave."""

    seed: int
    length: int
    text: object = None


def score(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in the prediction, in any case of letters: `string_match_all`.

    Before that the script turns control characters of a prediction into newlines, which no answer holds.
    """
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def score_any(prediction: str, answers: Sequence[str]) -> float:
    """Whether one of the answers occurs in the prediction: `string_match_part`."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


@dataclass(frozen=True)
class Task:
    """build: (random numbers, amount of filling, what is wanted) -> prompt, lead, answers; least: of the amounts.

    read: what samples are made of besides, from the folder of `KVLIB_DATA`. samples: how many there are. score: the
    metric.
    """

    build: Callable[[random.Random, int, Wanted], tuple[str, str, Sequence[str]]]
    max_new_tokens: int
    least: int = 1
    read: Callable[[], object] | None = None
    samples: float = math.inf
    score: Callable[[str, Sequence[str]], float] = score


@cache
def vocabulary(category: str) -> list[str]:
    """The adjectives, nouns or verbs of the package wonderwords."""
    return sorted(RandomWord().filter(include_categories=[category]))


@cache
def every_word() -> list[str]:
    return sorted({*vocabulary("noun"), *vocabulary("adjective"), *vocabulary("verb")})


def pair(rng: random.Random) -> str:
    return f"{rng.choice(vocabulary('adjective'))}-{rng.choice(vocabulary('noun'))}"


def distinct(draw: Callable[[random.Random], str], rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def inserted(lines: Sequence[str], places: Sequence[int], among: Sequence[str]) -> list[str]:
    """The lines in their order, before the others at these places."""
    text, begin = [], 0
    for line, place in zip(lines, sorted(places), strict=True):
        text += [*among[begin:place], line]
        begin = place
    return [*text, *among[begin:]]


def read_essays() -> str:
    return json.loads(local(ESSAYS, ESSAYS_FROM))["text"]


@lru_cache(maxsize=1)
def words_of(essays: str) -> list[str]:
    """Half a million, which each of some thirty tries of a sample needs."""
    return essays.split()


def essay_sentences(essays: str, words: int) -> list[str]:
    """The first words of the essays, again from the beginning where they end, cut into sentences."""
    text = words_of(essays)
    taken = (text * math.ceil(words / len(text)))[:words]
    return re.split(r"(?<=[.!?]) ", " ".join(taken))


def needles(
    haystack: str,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
    draw_key=pair,
    draw_value=number,
    kind: str = "number",
) -> Task:
    """Needles with several keys, several values of each, of which the first `asked` keys are asked for."""

    def build(rng: random.Random, amount: int, given: Wanted) -> tuple[str, str, list[str]]:
        names = distinct(draw_key, rng, keys + (amount if haystack == "needle" else 0))
        codes = distinct(draw_value, rng, keys * values + len(names) - keys)
        one, plural = asked * values == 1, f"{kind}s"

        def say(name: str, code: str) -> str:
            return NEEDLE.format(kind=plural, key=name, value=code)

        hidden = [say(name, codes[i * values + j]) for i, name in enumerate(names[:keys]) for j in range(values)]
        rng.shuffle(hidden)
        if haystack == "needle":
            others = [say(*each) for each in zip(names[keys:], codes[keys * values :])]
        else:
            others = [NOISE] * amount if haystack == "noise" else essay_sentences(given.text, amount)
        if haystack == "essay":
            places = [len(others) * depth // 100 for depth in rng.sample(DEPTHS, len(hidden))]
        else:
            places = rng.sample(range(amount), len(hidden))
        context = (" " if haystack == "essay" else "\n").join(inserted(hidden, places, others))
        wanted = names[:asked]
        query = wanted[0] if asked == 1 else f"{', '.join(wanted[:-1])}, and {wanted[-1]}"
        template, lead = ONE_NEEDLE if one else NEEDLES
        fields = {"kind": kind if one else plural, "query": query}
        return template.format(context=context, **fields), lead.format(**fields), codes[: asked * values]

    return Task(build, 128, read=read_essays if haystack == "essay" else None)


def chain(rng: random.Random, amount: int, letters: int) -> tuple[str, str, list[str]]:
    """One chain of assignments among lines of noise."""
    names = distinct(lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), rng, HOPS + 1)
    value = str(rng.randint(10000, 99998))
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    context = "\n".join(inserted(lines, rng.sample(range(amount), len(lines)), [NOISE] * amount))
    fields = {"query": value, "count": len(names)}
    return VARIABLES[0].format(context=context, **fields), VARIABLES[1].format(**fields), names


def variables(rng: random.Random, amount: int, given: Wanted) -> tuple[str, str, list[str]]:
    """A chain behind a short one that is solved; its names are shorter, so that none is an answer."""
    shown, lead, names = chain(rng, SHOWN, letters=3)
    prompt, asked, wanted = chain(rng, amount, letters=5)
    return f"{shown}{lead} {' '.join(names)}\n\n{prompt}", asked, wanted  # two spaces, as published


def numbered(items: Sequence[str]) -> str:
    return " ".join(f"{place}. {item}" for place, item in enumerate(items, 1))


def listed(rng: random.Random, items: Sequence[str], often: int, seldom: int) -> tuple[str, list[str]]:
    """A list in which the first ten words appear often."""
    every = [*items[:10] * often, *items[10:] * seldom]
    rng.shuffle(every)
    return COMMON[0].format(context=numbered(every)), list(items[:10])


def common_words(rng: random.Random, amount: int, given: Wanted) -> tuple[str, str, list[str]]:
    """Ten common words among others, behind a short list that is solved."""
    size, shown_often, shown_seldom, often, seldom = (40, 10, 3, 30, 3) if given.length >= LONG else (20, 3, 1, 6, 1)
    count, known = size + 10 + amount, every_word()
    drawn = rng.sample(known, count) if count <= len(known) else distinct(pair, rng, count)
    shown, names = listed(rng, drawn[:size], shown_often, shown_seldom)
    prompt, wanted = listed(rng, drawn[size:], often, seldom)
    return f"{shown}{COMMON[1]} {numbered(names)}\n{prompt}", COMMON[1], wanted


def frequent_words(rng: random.Random, amount: int, given: Wanted) -> tuple[str, str, list[str]]:
    """Coded words whose frequencies fall as 1 / rank²; dots have the first rank."""
    coded = max(10, (given.length - FREQUENT_TOKENS) // 50) - 1  # as published, where the dots count too
    codes = ["...", *distinct(lambda r: "".join(r.choices(string.ascii_lowercase, k=6)), rng, coded)]
    share = math.pi**2 / 6  # zeta(ALPHA)
    text = [code for rank, code in enumerate(codes, 1) for _ in range(int(amount * rank**-ALPHA / share))]
    rng.shuffle(text)
    return FREQUENT[0].format(context=" ".join(text)), FREQUENT[1], codes[1:4]


def library(documents: Sequence[str], asked: Sequence[tuple[str, list[str], list[str], list[str]]]) -> dict:
    """What `among_documents` reads: all documents once, in order, and questions with places of documents among them.

    asked: question, answers, its own documents, and those that come first among the others.
    """
    place = {text: at for at, text in enumerate(sorted(set(documents)))}
    found = [
        {"query": query, "answers": answers, "own": [place[d] for d in own], "near": [place[d] for d in near]}
        for query, answers, own, near in asked
    ]
    return {"documents": list(place), "questions": found}


def read_squad() -> dict:
    """Paragraphs, and the questions that they answer; near are the other paragraphs of an article."""
    articles = [
        [(paragraph["context"], paragraph["qas"]) for paragraph in article["paragraphs"]]
        for article in json.loads(local(SQUAD, SQUAD_FROM))["data"]
    ]
    return library(
        [text for article in articles for text, _ in article],
        [
            (
                each["question"],
                [answer["text"] for answer in each["answers"]],
                [text],
                [t for t, _ in article if t != text],
            )
            for article in articles
            for text, questions in article
            for each in questions
            if not each["is_impossible"]
        ],
    )


def read_hotpot() -> dict:
    """Ten paragraphs with their titles for each question; no others are near."""
    rows = json.loads(local(HOTPOT, HOTPOT_FROM))
    own = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in rows]
    asked = [(row["question"], [row["answer"]], texts, []) for row, texts in zip(rows, own)]
    return library([text for texts in own for text in texts], asked)


def among_documents(rng: random.Random, amount: int, given: Wanted) -> tuple[str, str, list[str]]:
    """A question behind so many documents, its own and others; all of them, again and again, if there are fewer."""
    documents, question = given.text["documents"], given.text["questions"][given.seed]
    own, near = question["own"], question["near"]
    more, known = max(0, amount - len(own)), {*own, *near}
    if amount >= len(documents):
        chosen = [at % len(documents) for at in range(amount)]
    elif more > len(near):
        others = [at for at in range(len(documents)) if at not in known]
        chosen = [*own, *near, *rng.sample(others, more - len(near))]
    else:
        chosen = [*own, *rng.sample(near, more)]
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {number}:\n{documents[at]}" for number, at in enumerate(chosen, 1))
    return DOCUMENTS[0].format(context=context, query=question["query"]), DOCUMENTS[1], question["answers"]


TASKS = {
    "niah_single_1": needles("noise"),
    "niah_single_2": needles("essay"),
    "niah_single_3": needles("essay", draw_value=identifier, kind="uuid"),
    "niah_multikey_1": needles("essay", keys=4),
    "niah_multikey_2": needles("needle"),
    "niah_multikey_3": needles("needle", draw_key=identifier, draw_value=identifier, kind="uuid"),
    "niah_multivalue": needles("essay", values=4),
    "niah_multiquery": needles("essay", keys=4, asked=4),
    "vt": Task(variables, 30, least=HOPS + 1),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, FREQUENT_TOKENS, least=60),
    "qa_1": Task(among_documents, 32, read=read_squad, samples=5928, score=score_any),
    "qa_2": Task(among_documents, 32, read=read_hotpot, samples=7405, score=score_any),
}


def sample(task: str, length: int, seed: int, tokenizer, room: int = 0, text: object = None) -> Sample:
    """A sample of as much filling as fits.

    Args:
        task: one of `TASKS`. length: the most tokens of prompt, lead and answer together, special tokens included.
        room: those of them that are left to a chat template, which counts as published. text: what the task's `read`
            gives.
        seed: samples of different seeds differ in everything, the same seed gives the same sample; of `qa_1` and
            `qa_2` the number of the question.

    Raises:
        ValueError: for an unknown task, or if not even the least fits.
    """
    if task not in TASKS:
        raise unknown("task of RULER", task, TASKS)
    build, new, least = TASKS[task].build, TASKS[task].max_new_tokens, TASKS[task].least

    def made(amount: int) -> Sample | None:
        prompt, lead, answers = build(random.Random(f"{task} {seed}"), amount, Wanted(seed, length, text))
        if len(tokenizer(prompt + lead).input_ids) + new > length - room:
            return None
        return Sample(prompt, lead, tuple(answers), new)

    found, below, above = made(least), least, 2 * least
    if found is None:
        raise ValueError(f"{task}: {length} tokens are too few")
    while (larger := made(above)) is not None:
        found, below, above = larger, above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        if (tried := made(middle)) is None:
            above = middle
        else:
            found, below = tried, middle
    return found
