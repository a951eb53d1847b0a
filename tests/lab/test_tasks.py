"""The tasks: the prompt alone determines the answer, lengths hold, training and test share nothing."""

import csv
import gzip
import hashlib
import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import chain

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import answer_of, check_code, heldout, way
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvlib.lab import tasks
from kvlib.lab.tasks import (
    COMPLETIONS,
    DROPPED,
    FAMILIES,
    PROBES,
    SHORTEST,
    UNBROKEN,
    Draw,
    Filler,
    Prompt,
    judge,
    natural,
    sample,
    score,
)
from kvlib.lab.tasks.composing import FIRST
from kvlib.lab.tasks.probes import DISTANCES
from kvlib.lab.tasks.real_code import SHORTEST_CODE
from kvlib.lab.tasks.words import ADJECTIVES, NOUNS, pools
from kvlib.minilm.tokenizer import encode
from kvlib.paths import DATA, MODELS

CODE = [name for name, family in FAMILIES.items() if family.group == "code"]
REAL = [*CODE, *COMPLETIONS, "code_bits", *UNBROKEN]
PLANTED = [name for name in (*FAMILIES, *DROPPED, *PROBES) if name not in CODE]
TRAINED = [name for name in PLANTED if tasks.find(name).trained]
FITTING = 192  # tokens in which there is a place for the facts of every task
TASKS, SEEDS = st.sampled_from(PLANTED), st.integers(0, 10**6)
SOURCE = Filler("".join(f"def step_{i}(x):\n    return x * {i} + step({i})\n\n" for i in range(400)))
NAME = re.compile(rf"\b(?:{'|'.join(ADJECTIVES)})_(?:{'|'.join(NOUNS)})\b")
LOOKED_UP = [  # one of several values that the prompt states
    *["dict_lookup", "function_lookup", "annotated_lookup", "two_hop", "file_lookup", "override", "label"],
    *["shown_syntax", "where_defined"],
]


class Plain:
    """The same short line again and again: filler that is quick to count."""

    def lines(self, rng: random.Random, tokens: int) -> list[str]:
        return ["x = 1"] * tokens


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


def ids(text: str) -> list[int]:
    """Without BOS."""
    return tokenizer()(text, add_special_tokens=False).input_ids


def shortest(task: str) -> int:
    return SHORTEST_CODE if task in REAL else SHORTEST


def drafted(task: str, tokens: int, seed: int, split: str = "test") -> tasks.Draft:
    """What `sample` drafts for this seed."""
    return tasks.draft(task, tokens, Draw(random.Random(f"{task} {tokens} {seed} {split}"), split))


def said(drawn: Prompt) -> str:
    """The prompt without the text of its BOS."""
    assert drawn.context.startswith("<s>")
    return drawn.text.removeprefix("<s>")


def check_sizes(drawn: Prompt, tokens: int) -> None:
    """The parts are the whole, prompt and answer are tokenised apart, and hardly a token is left over.

    If they were not, the answer that is scored would not be the one that the model is asked to write.
    """
    parts, answer = drawn.ids(tokenizer()), drawn.answer_ids(tokenizer())
    prompt = [*chain(*parts)]
    assert prompt == tokenizer()(said(drawn)).input_ids and answer == ids(drawn.answer)
    assert ids(said(drawn) + drawn.answer) == prompt[1:] + answer
    assert len(parts[2]) == 1 and tokenizer().decode(parts[2]) == drawn.lead
    assert drawn.length == len(prompt) + len(answer)
    assert 0 <= tokens - drawn.length <= 8 + tokens // 50


# The catalogue


def test_the_families_and_what_stands_beside_them():
    assert Counter(family.group for family in FAMILIES.values()) == dict(zip(tasks.GROUPS, (3, 2, 2, 3, 2, 2)))
    assert set(DROPPED) == {"count", "override"} and set(PROBES) == {"long_generation", "distance"}
    assert set(COMPLETIONS) == {"next_line", "cross_file_line"}
    assert set(tasks.LABEL_FREE) == {"code_bits", "prose_bits", "summary"}
    assert set(tasks.DISTANT) == {f"distance_{lines}" for lines in DISTANCES}
    assert set(tasks.WRITTEN) == {"function"} and set(UNBROKEN) == {"next_line_unbroken", "code_bits_unbroken"}
    assert set(tasks.SPELLED) == {"number_short", "number_in_words"} and set(tasks.BOOKS) == {"pg19"}
    beside = (tasks.DISTANT, tasks.WRITTEN, tasks.LABEL_FREE, UNBROKEN, tasks.SPELLED, tasks.BOOKS)
    kinds = (FAMILIES, DROPPED, PROBES, COMPLETIONS, *beside, natural.FAMILIES)
    assert sum(map(len, kinds)) == len(tasks.CATALOGUE) and set().union(*kinds) == set(tasks.CATALOGUE)
    for name, family in tasks.CATALOGUE.items():
        assert tasks.find(name) is family and family.name == name


def test_what_the_pilot_let_pass():
    rows = pd.read_csv(DATA / "pilot" / "pilot.csv")
    assert sorted(tasks.NATURAL) == sorted(set(rows[rows["stays"]]["task"]))
    assert set(rows["task"]) == set(natural.FAMILIES)


def test_some_families_are_not_trained():
    unseen = [name for name, family in FAMILIES.items() if not family.trained]
    assert len(unseen) >= 3 and set(CODE) < set(unseen)
    assert {FAMILIES[name].group for name in unseen} != {"code"}


# Planted tasks


@given(TASKS, st.integers(FITTING, 1500), SEEDS)
@settings(max_examples=200)
def test_the_prompt_alone_gives_the_answer(task, tokens, seed):
    lines = {"lines": min(8, tokens // 64)} if task == "distance" else {}  # so many lines certainly fit
    drawn = sample(task, tokens, seed, tokenizer=tokenizer(), **lines)
    assert answer_of(said(drawn)) == drawn.answer
    assert (drawn.task, drawn.seed) == (task, seed)
    check_sizes(drawn, tokens)


@pytest.mark.parametrize("task", PLANTED)
def test_the_smallest_and_largest_prompts(task):
    for tokens, seeds in ((FITTING, 20), (4096, 2)):
        for seed in range(seeds):
            drawn = sample(task, tokens, seed, tokenizer=tokenizer(), **({"lines": 2} if task == "distance" else {}))
            assert answer_of(said(drawn)) == drawn.answer
            check_sizes(drawn, tokens)


@pytest.mark.parametrize("task", [*PLANTED, *REAL, "prose_bits", "summary"])
def test_a_sample_follows_from_its_seed(task):
    def draw(seed, **options):
        return sample(task, 512, seed, tokenizer=tokenizer(), **options)

    first = draw(3)
    draw(4)  # nothing is left behind by samples in between
    assert draw(3) == first
    assert len({draw(seed).text for seed in range(20)}) == 20
    if task in PLANTED:
        assert draw(3, split="train", text=SOURCE).text != draw(3, text=SOURCE).text


@pytest.mark.parametrize("task", [name for name in LOOKED_UP if name != "shown_syntax"])
def test_questions_are_asked_of_every_fact(task):
    """Not of the first or last one only, whose place in the prompt a cache method could guess."""
    ranks = set()
    for seed in range(150):
        drawn = drafted(task, 320, seed)
        question, answer = drawn.questions[0]
        stated = "".join(text for _, text in sorted(drawn.facts))
        order = sorted(drawn.questions, key=lambda asked: stated.index(key_of(task, asked)))
        ranks.add(order.index((question, answer)))
    assert ranks == set(range(len(drawn.questions)))
    assert answer == sample(task, 320, seed, tokenizer=tokenizer()).answer  # the draft is the sample's


def key_of(task: str, asked: tuple[str, str]) -> str:
    """What of a question occurs in its fact."""
    question, answer = asked
    return re.findall(r"[a-z]+_" if task == "label" else NAME, question)[-1] if task != "file_lookup" else answer


def test_every_list_event_and_function_is_asked():
    for task, tokens in (("collect", 1024), ("exports", 1024), ("count", 1024), ("transform", 400)):
        ranks = set()
        for seed in range(150):
            drawn = drafted(task, tokens, seed)
            ranks.add(sorted(drawn.questions).index(drawn.questions[0]))
        assert ranks == set(range(len(drawn.questions)))


@pytest.mark.parametrize("task", PLANTED)
def test_no_constant_answer_is_often_right(task):
    answers = Counter(drafted(task, 512, seed).questions[0][1] for seed in range(200))
    assert answers.most_common(1)[0][1] <= 0.4 * 200
    if task == "count":
        assert set(answers) == set(map(str, range(1, len(answers) + 1))) and len(answers) >= 5


@pytest.mark.parametrize("task", LOOKED_UP)
def test_neither_the_first_nor_the_last_nor_the_commonest_value_is_often_right(task):
    hits, seeds = Counter(), 200
    for seed in range(seeds):
        drawn = drafted(task, 1024, seed)
        answer, *others = (re.search(r"(\w+)\W*$", option)[1] for _, option in drawn.questions)
        stated, options = "".join(text for _, text in sorted(drawn.facts)), sorted({answer, *others})
        hits["first"] += answer == min(options, key=stated.index)
        hits["last"] += answer == max(options, key=stated.rindex)
        hits["commonest"] += answer == max(options, key=lambda option: stated.count(option))
    limit = {"label": 0.55, "where_defined": 0.4}.get(task, 0.35)  # five labels; four files
    assert max(hits.values()) <= limit * seeds, hits


def test_settings_are_made_again():
    again = sum(len(drafted("override", 128, seed).facts) > 2 for seed in range(60))
    drawn = [sample("override", 400, seed, tokenizer=tokenizer()) for seed in range(60)]
    first = [re.search(rf"^{d.text.split()[-2]} = (\d+)$", d.text, re.MULTILINE)[1] == d.answer for d in drawn]
    assert again > 40 and sum(first) == 0  # every setting is made again


def test_lists_are_asked_in_the_order_of_the_prompt():
    """Not sorted, and as long as they are."""
    drawn = [drafted("collect", 1024, seed).questions[0][1][:-1].split(", ") for seed in range(60)]
    assert sum(values != sorted(values) for values in drawn) > 30
    assert {len(values) for values in drawn} == {2, 3, 4}


@pytest.mark.parametrize("tokens", [2048, 3000, 4096])
def test_long_generation_is_long(tokens):
    for seed in range(3):
        drawn = sample("long_generation", tokens, seed, tokenizer=tokenizer())
        assert len(ids(drawn.answer)) > 512
        assert drawn.answer.count("\n") == 47 and answer_of(said(drawn)) == drawn.answer


@given(st.sampled_from(DISTANCES), st.integers(1200, 2000), SEEDS)
@settings(max_examples=60)
@example(64, 4096, 0)
def test_so_many_lines_are_between_definition_and_use(lines, tokens, seed):
    drawn = sample("distance", tokens, seed, tokenizer=tokenizer(), lines=lines)
    rows = said(drawn).split("\n")
    name = re.fullmatch(r"assert (\w+) == ", rows[-1])[1]
    assert rows[-2 - lines] == f"{name} = {drawn.answer}"
    check_sizes(drawn, tokens)


@pytest.mark.parametrize("lines", DISTANCES)
def test_every_distance_is_a_task_of_its_own(lines):
    rows = said(drawn := sample(f"distance_{lines}", 1400, 0, tokenizer=tokenizer())).split("\n")
    name = re.fullmatch(r"assert (\w+) == ", rows[-1])[1]
    assert rows[-2 - lines] == f"{name} = {drawn.answer}"
    with pytest.raises(TypeError):
        sample(f"distance_{lines}", 1400, 0, tokenizer=tokenizer(), lines=3)


def test_no_line_between_definition_and_use():
    rows = sample("distance", 200, 0, tokenizer=tokenizer(), lines=0).text.split("\n")
    assert rows[-1].startswith(f"assert {rows[-2].split()[0]} ")


@given(st.floats(0, 1), st.integers(400, 1500), SEEDS)
@settings(max_examples=60)
def test_the_needle_stands_at_its_depth(depth, tokens, seed):
    drawn = sample("needle", tokens, seed, tokenizer=tokenizer(), depth=depth)
    name = re.search(r"assert (\w+) == $", drawn.text)[1]
    before, _, after = said(drawn).partition(f"{name} = {drawn.answer}\n")
    before, after = len(ids(before)), len(ids(after[: after.rindex("assert")]))
    longest = max(len(ids(line + "\n")) for line in said(drawn).split("\n"))
    inside = before + after - FIRST
    assert abs(before - FIRST - depth * inside) <= 2 * longest


@pytest.mark.parametrize("number", [float, int])
def test_depths_at_both_ends(number):
    """Of what is no end: the first line from token `FIRST` on, and the last but one."""
    first, last = (said(sample("needle", 400, 1, tokenizer=tokenizer(), depth=number(depth))) for depth in (0, 1))
    before = re.match(r"(?s)(.*?\n)[A-Z]+_[A-Z]+ = \d{5}\n", first)[1]
    assert len(ids(before)) >= FIRST > len(ids(before[: before.rindex("\n", 0, -1) + 1]))
    assert re.search(r"\n[A-Z]+_[A-Z]+ = \d{5}\n.*\S.*\n+assert [A-Z]+_[A-Z]+ == $", last)


# Places


def long_words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text))


@pytest.mark.parametrize("task", FAMILIES)
def test_no_answer_stands_where_methods_keep_everything(task):
    """No word of it stands in the first tokens or in the line before the question."""
    for tokens, seeds in ((512, 40), (2048, 20)):
        for seed in range(seeds):
            drawn = sample(task, tokens, seed, tokenizer=tokenizer())
            start = tokenizer().decode(tokenizer()(said(drawn)).input_ids[:FIRST])
            end = drawn.context.rstrip("\n").rpartition("\n")[2]
            assert long_words(start + "\n" + end).isdisjoint(long_words(drawn.answer)), seed
            if task in CODE:
                word = re.search(r"\w+$", drawn.text)[0] + drawn.answer
                assert word not in start and word not in end


@pytest.mark.parametrize("task", ["needle", "label", "transform"])
def test_filler_does_not_say_the_answer(task):
    answer = sample(task, 512, 4, tokenizer=tokenizer()).answer
    text = Filler("".join(f"trap = {word}\nplain = 1\n" for word in long_words(answer)) * 200)
    again = sample(task, 512, 4, tokenizer=tokenizer(), text=text)
    assert again.answer == answer and "trap" not in again.text and again.text.count("plain = 1\n") > 20


@pytest.mark.parametrize("task", ["needle", "function_lookup", "annotated_lookup"])
def test_facts_stand_at_all_depths_evenly(task):
    """Of what is no end; the distance of depths from a uniform distribution is that of Kolmogorov and Smirnov."""
    depths = []
    for seed in range(200):
        drawn = sample(task, 768, seed, tokenizer=tokenizer())
        before, _, after = drawn.context.removeprefix("<s>").partition(drawn.answer)
        start, end = len(ids(before)) - FIRST, len(ids(after.rstrip("\n").rpartition("\n")[0]))
        depths.append(start / (start + end))
    steps = np.arange(201) / 200
    distance = np.maximum(steps[1:] - np.sort(depths), np.sort(depths) - steps[:-1]).max()
    assert distance < 1.95 / 200**0.5  # which one of a thousand exceeds


# Training and test


def test_training_and_test_share_no_name_and_no_value():
    """Which is whose never changes: shipped models were trained on it."""
    (train_names, train_values), (test_names, test_values) = pools("train"), pools("test")
    everything = [f"{a}_{b}" for a in ADJECTIVES for b in NOUNS]
    assert test_names == [name for name in everything if zlib.crc32(name.encode()) % 4 == 0]
    assert {*train_names, *test_names} == set(everything) and not {*train_names} & {*test_names}
    assert {*train_values, *test_values} == {*range(10_000, 100_000)} and not {*train_values} & {*test_values}
    assert len(test_names) > 4000 and len(test_values) > 20_000
    for split, names, values in (("train", train_names, train_values), ("test", test_names, test_values)):
        names, values = set(names), set(values)
        for task in PLANTED:
            for seed in range(5):
                drawn = sample(task, 512, seed, tokenizer=tokenizer(), split=split, text=Plain())
                assert {int(v) for v in re.findall(r"\b\d{5}\b", drawn.text + drawn.answer)} <= values
                words = set(NAME.findall((drawn.text + drawn.answer).lower()))
                assert words and words <= names


def test_training_and_test_share_no_pattern_and_no_label():
    """Ways to write, made-up syntaxes and their words, labels."""
    seen = {}
    for split in tasks.words.SPLITS:
        kinds = seen[split] = {"way": set(), "syntax": set(), "word": set(), "label": set()}
        for seed in range(150):
            body = "".join(text for _, text in drafted("transform", 200, seed, split).facts)
            kinds["way"].add(way(body, re.match(r"assert (\w+)", body)[1]))
            question, answer = drafted("shown_syntax", 300, seed, split).questions[0]
            word, *syntax = re.fullmatch(r"# (\w+)(\W)\w+(\W) (\S+)", question).groups()
            syntax += re.sub(r"\d+", "n", answer)
            kinds["word"].add(word)
            kinds["syntax"].add(tuple(syntax))
            kinds["label"] |= {answer for _, answer in drafted("label", 512, seed, split).questions}
    for kind, least in (("way", 5), ("syntax", 4), ("word", 20), ("label", 20)):
        assert not seen["train"][kind] & seen["test"][kind]
        assert min(len(seen[split][kind]) for split in seen) >= least, kind


def test_training_and_test_share_no_filler_text():
    with gzip.open(MODELS / "minilm" / "manifest.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "heldout"]
    assert train and not {r["distribution"] for r in train} & {r["distribution"] for r in held_out}
    assert not {r["sha256"] for r in train} & {r["sha256"] for r in held_out}
    shipped = [json.loads(line)["text"] for line in (DATA / "heldout" / "code.jsonl").open()]
    hashes = sorted(hashlib.sha256(text.encode()).hexdigest() for text in shipped)
    assert hashes == sorted(row["sha256"] for row in held_out if row["kind"] == "code")
    assert tasks.filler("test").text == "\n".join(shipped)


@pytest.mark.parametrize("task", TRAINED)
def test_what_training_draws_fits(task):
    """As `Sequences.task` of `kvlib.minilm.data` does it; an error there would end a training run."""

    def count(texts: list[str]) -> list[int]:
        return list(map(len, encode(tokenizer(), texts)))

    for seed in range(100):
        rng = random.Random(f"{task} {seed}")
        tokens = rng.choice([150, 160, 191, 192, 200, 256, 320, 512, 640, 1024])  # where more facts begin, and
        if seed % 2:
            tokens = round(math.exp(rng.uniform(math.log(150), math.log(4095))))
        drawn = tasks.draft(task, tokens, Draw(rng, "train"))
        asked = drawn.questions[: max(1, min(8, tokens // SHORTEST))]
        room = tokens - sum(count([text for question, answer in asked for text in (question, answer, "\n")]))
        context = tasks.compose(drawn, room, rng, Plain(), count, ends=True)
        assert sum(count([context])) <= room
        assert all(answer_of(context + question) == answer for question, answer in asked)


# Filler


@pytest.mark.parametrize("task", PLANTED)
def test_filler_never_mentions_what_is_planted(task):
    """A line of filler that binds the same name would make the answer ambiguous."""
    drawn = drafted(task, 400, 5)
    names = {name for text, _ in drawn.questions for name in NAME.findall(text.lower())}
    if task == "transform":  # whose other names are arguments
        names = set(re.findall(r"assert (\w+)\(", "".join(text for text, _ in drawn.questions)))
    names |= {name for name in drawn.names if NAME.fullmatch(name)}
    if task != "transform":
        names |= {name for _, text in drawn.facts for name in NAME.findall(text.lower())}
    traps = [line for n in sorted(names) for line in (f"x = {n}.trap", f"{n.upper()} = 1  # trap", f"def {n}(): trap")]
    text = Filler("".join(f"{line}\nplain = 1\n" for line in traps) * 20)
    prompt = sample(task, 400, 5, tokenizer=tokenizer(), text=text).text
    assert "trap" not in prompt and prompt.count("plain = 1\n") > 4


def test_short_filler_starts_again():
    text = Filler("alpha = 1\nbeta = 2\ngamma = 3\n")
    drawn = sample("needle", 500, 0, tokenizer=tokenizer(), text=text)
    assert drawn.text.count("beta = 2\n") > 20


def test_filler_is_real_code_in_its_order():
    lines = said(sample("needle", 600, 2, tokenizer=tokenizer(), depth=1)).split("\n")[:-1]
    lines = [line for line in lines if not NAME.match(line.lower())]
    everything = iter("\n".join(row["text"] for row in heldout().values()).split("\n") * 2)
    assert len(lines) > 20 and all(line in everything for line in lines)  # a subsequence, as `in` advances


# Completion of real code


@pytest.mark.parametrize(("tokens", "seeds"), [(512, 100), (1024, 20), (4096, 4)])
@pytest.mark.parametrize("task", CODE)
def test_identifiers_can_be_completed_from_the_prompt(task, tokens, seeds):
    words = Counter()
    for seed in range(seeds):
        drawn = sample(task, tokens, seed, tokenizer=tokenizer())
        words[check_code(task, said(drawn), drawn.answer)] += 1
        check_sizes(drawn, tokens)
    assert len(words) > 0.7 * seeds  # not the same few again and again


def test_other_files_around_the_identifier_are_shown():
    """It does not stand in the same place every time."""
    depths = []
    for seed in range(60):
        drawn = sample("cross_file", 1024, seed, tokenizer=tokenizer())
        word = re.search(r"\w+$", drawn.text)[0] + drawn.answer
        depths.append(re.search(rf"\b{word}\b", drawn.text).start() / len(drawn.text))
    assert min(depths) < 0.1 and max(depths) > 0.4


@pytest.mark.parametrize(("tokens", "seeds"), [(512, 60), (2048, 10)])
@pytest.mark.parametrize("task", CODE)
def test_without_its_source_nothing_tells_the_identifier(task, tokens, seeds):
    """The same question about another context of the same length, in which nothing else changed."""
    for seed in range(seeds):
        drawn = sample(task, tokens, seed, tokenizer=tokenizer())
        floor = sample(task, tokens, seed, tokenizer=tokenizer(), source=False)
        assert (floor.question, floor.lead, floor.answers) == (drawn.question, drawn.lead, drawn.answers)
        check_sizes(floor, tokens)
        typed = re.search(r"\w+$", drawn.question + drawn.lead)[0]
        word, context = typed + drawn.answer, floor.context
        assert word in drawn.context and word not in context
        if task == "completion":  # of two files the second may start a line later
            last = drawn.context.rsplit(word, 1)[-1]
            assert context.endswith(last[-200:])


def test_what_stands_for_the_identifier_does_not_suggest_itself():
    for place in tasks.code.places(True)[:300]:
        changed = tasks.code.without(f"({place.word}_x)", place.word)
        assert changed != f"({place.word}_x)" and changed.endswith("_x)") and place.word not in changed
        assert changed[1:4].lower() != place.word[:3].lower()


# Other people's tokenizers


@cache
def merging(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens may span lines: what `sample` meets with other people's models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    source = tasks.filler("test").text
    bpe.train_from_iterator([source[i : i + 500] for i in range(0, 60_000, 500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_tokenizers_that_merge_lines():
    foreign, made = merging(1500), Counter()
    assert any("Ċ" in token.strip("Ċ") for token in foreign.get_vocab())  # Ċ is the newline's byte
    for task in [*FAMILIES, *DROPPED, *PROBES]:  # test_lines.py has the others
        for seed in range(5):
            try:
                drawn = sample(task, 1024, seed, tokenizer=foreign)
            except ValueError as error:
                assert re.match(rf"no prompt of 1024 tokens could be made for '{task}'|.*the facts alone", str(error))
                continue
            assert drawn.length == len(foreign(drawn.text + drawn.answer).input_ids)
            assert 0 <= 1024 - drawn.length <= 8 + 1024 // 50
            assert [*chain(*drawn.ids(foreign))] == foreign(drawn.text).input_ids and drawn.ids(foreign)[2]
            if task in CODE:
                check_code(task, drawn.text, drawn.answer)
            else:
                assert answer_of(drawn.text) == drawn.answer
            made[task] += 1
    assert sum(made.values()) >= 60 and len(made) >= 15, made


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("neddle", 300, 0), "unknown task 'neddle'; did you mean 'needle'?"),
        (("xyz", 300, 0), "unknown task 'xyz'; known: dict_lookup, function_lookup, annotated_lookup, two_hop"),
        (("needle", SHORTEST - 1, 0), f"tokens={SHORTEST - 1}: at least {SHORTEST}"),
        *[((task, SHORTEST_CODE - 1, 0), f"tokens={SHORTEST_CODE - 1}: at least {SHORTEST_CODE}") for task in REAL],
        *[((task, 600, 10**6), "seed=1000000: held-out code has ") for task in REAL],
        *[((task, 600, -1), "seed=-1: held-out code has ") for task in REAL],
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(*arguments, tokenizer=tokenizer())


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan")])
def test_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=rf"depth={depth}: between 0 and 1"):
        sample("needle", 300, 0, tokenizer=tokenizer(), depth=depth)


@pytest.mark.parametrize("lines", [-1, 2.5, float("nan")])
def test_lines_out_of_range(lines):
    with pytest.raises(ValueError, match=rf"lines={lines}: a whole number, at least 0"):
        sample("distance", 300, 0, tokenizer=tokenizer(), lines=lines)


def test_lines_that_do_not_fit():
    with pytest.raises(ValueError, match=r"too few tokens: there is room for \d+ lines of filler behind the fact"):
        sample("distance", 128, 0, tokenizer=tokenizer(), lines=100)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev': 'train' or 'test'"):
        sample("needle", 300, 0, tokenizer=tokenizer(), split="dev", text=SOURCE)


def test_filler_that_leaves_no_place():
    with pytest.raises(ValueError, match=r"too few tokens: there is room for \d+ of filler"):
        for tokens in range(SHORTEST, 2 * SHORTEST):
            sample("dict_lookup", tokens, 0, tokenizer=tokenizer())


def test_facts_that_do_not_fit():
    """A tokenizer of single bytes needs several times as many tokens for the facts alone."""
    with pytest.raises(ValueError, match=r"too few tokens: the facts alone need \d+ more"):
        sample("dict_lookup", 300, 0, tokenizer=merging(256))


# Scores


def prompt_with(answer: str) -> Prompt:
    return Prompt("needle", 0, "", "", "", (answer,), 0)


@pytest.mark.parametrize(
    ("answer", "generated", "expected"),
    [
        ("48213", "48213", True),
        ("48213", "48213\nassert x == 1", True),
        ("48213", "48213  # found", True),
        ("48213", "48213, 'message'", True),
        ("48213", "482130", False),
        ("48213", "48213_0", False),
        ("48213", "4821", False),
        ("48213", " 48213", False),
        ("48213", "1\n48213", False),
        ("48213", "", False),
        ("a.b", "a.b\n", True),
        ("a.b", "axb\n", False),
        ("_attr_map", "_attr_map = {}", True),
        ("_attr_map", "_attr_map2 = {}", False),
        ('thunder"', 'thunder"\n', True),
        ('thunder"', "thunder", False),
        ('thunder"', "thunder'", False),
        ("1, 2]", "1, 2]\n", True),
        ("1, 2]", "1, 2, 3]\n", False),
        ("1, 2]", "2, 1]\n", False),
        ("a = 1\nb = 2", "a = 1\nb = 2\nc = 3", True),
        ("a = 1\nb = 2", "a = 1\nb = 23", False),
        ("a = 1\nb = 2", "a = 1\n", False),
        ("a = 1\nb = 2", "a = 1\nc = 3\nb = 2", False),
    ],
)
def test_what_counts_as_correct(answer, generated, expected):
    assert (score(prompt_with(answer), generated) == 1) is expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("a = 1\nb = 2\nc = 3\nd = 4", 1.0),
        ("a = 1\nb = 2\nc = 3\nd = 4\n", 1.0),
        ("a = 1\nb = 2\nc = 3\nd = 4\ne = 5", 1.0),
        ("a = 1\nb = 2\nc = 3\nd = 45", 0.75),
        ("a = 1\nb = 2\nc = 3\n", 0.75),
        ("a = 1\nb = 2\nc = 3", 0.75),
        ("a = 1\nb = 2\nc = ", 0.5),
        ("a = 1\nb = 3\nc = 3\nd = 4", 0.25),
        ("b = 2\na = 1", 0.0),
        ("", 0.0),
    ],
)
def test_partial_credit(generated, expected):
    assert score(prompt_with("a = 1\nb = 2\nc = 3\nd = 4"), generated) == expected


DIGITS = [tokenizer()(str(digit), add_special_tokens=False).input_ids[0] for digit in range(10)]
(NEWLINE,) = tokenizer()("\n", add_special_tokens=False).input_ids


@given(st.lists(st.sampled_from([*DIGITS, NEWLINE]), min_size=2, max_size=12), st.data())
def test_judging_first_choices_is_judging_what_greedy_decoding_writes(answer, data):
    """Tokens here are one character each, so that a text is the same as its tokens."""
    choices = st.sampled_from([*DIGITS, NEWLINE])
    chosen = [data.draw(st.sampled_from([token, token, token, DIGITS[0]])) for token in answer] + [data.draw(choices)]
    wrong = next((i for i, pair in enumerate(zip(answer, chosen)) if pair[0] != pair[1]), len(answer))
    written = tokenizer().decode(chosen[: wrong + 1] + data.draw(st.lists(choices, max_size=4)))
    drawn = prompt_with(tokenizer().decode(answer))
    assert judge(drawn, chosen, tokenizer()) == score(drawn, written)


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_facts_stand_at_both_ends_now_and_then(seed):
    depths = [Draw(random.Random(f"{seed} {i}"), "train").depth() for i in range(200)]
    assert all(0 <= depth <= 1 for depth in depths)
    assert 0 < depths.count(0.0) < 30 and 0 < depths.count(1.0) < 30


def test_facts_of_tests_stand_at_no_end():
    depths = [Draw(random.Random(seed), "test").depth() for seed in range(2000)]
    assert min(depths) > 0 and max(depths) < 1


@pytest.mark.parametrize("task", [*PLANTED, *CODE, *COMPLETIONS, "next_line_unbroken"])
def test_the_question_is_the_last_line(task):
    """All of it but its last token, which is fed when a cache has been compressed."""
    drawn = sample(task, 600, 3, tokenizer=tokenizer())
    line = drawn.question + drawn.lead
    assert drawn.context.endswith("\n") and 0 < len(drawn.question) < 200 and "\n" not in line.rstrip("\n")
    assert drawn.ids(tokenizer())[0] == tokenizer()(drawn.context.removeprefix("<s>")).input_ids


def test_a_token_that_spans_context_and_question_is_fed_with_the_question():
    foreign = merging(1500)
    drawn = prompt_with("x")
    spanning = next(token for token in sorted(foreign.get_vocab()) if re.fullmatch("[a-z:)]+ĊĠ+", token))
    line, indent = spanning.replace("Ġ", " ").split("Ċ")
    drawn = replace(drawn, context=f"0{line}\n", question=f"{indent}0", lead="~")
    parts = drawn.ids(foreign)
    assert [*chain(*parts)] == foreign(drawn.text).input_ids
    assert [foreign.convert_ids_to_tokens(part) for part in parts] == [["0"], [spanning, "0"], ["~"]]
