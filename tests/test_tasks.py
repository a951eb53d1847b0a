"""Retrieval tasks: the prompt alone determines the answer, lengths hold, training and test share nothing."""

import csv
import gzip
import hashlib
import json
import random
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import answer_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvlib.lab import tasks
from kvlib.lab.tasks import TASKS, Filler, Sample, correct, sample
from kvlib.paths import DATA, MODELS

KINDS = st.sampled_from(sorted(TASKS))
SEEDS = st.integers(0, 10**6)
SOURCE = Filler("".join(f"def step_{i}(x):\n    return x * {i} + step({i})\n\n" for i in range(400)))


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


def length(text: str) -> int:
    return len(tokenizer()(text).input_ids)


@given(KINDS, st.integers(tasks.SHORTEST, 1500), SEEDS)
@settings(max_examples=120)
def test_the_prompt_alone_gives_the_answer(task, tokens, seed):
    drawn = sample(task, tokens, seed, tokenizer=tokenizer())
    assert answer_of(drawn.prompt) == drawn.answer
    assert drawn.prompt.split("\n")[-1].startswith("assert ") and drawn.prompt.endswith(" == ")
    assert drawn.length == length(drawn.prompt)
    assert 0 <= tokens - drawn.length <= 8 + tokens // 50


@given(KINDS, st.integers(tasks.SHORTEST, 600), SEEDS)
@settings(max_examples=60)
def test_prompt_and_answer_are_tokenised_apart(task, tokens, seed):
    """Else the answer that is scored would not be the one that the model is asked to write."""
    drawn = sample(task, tokens, seed, tokenizer=tokenizer())
    prompt, answer, both = (
        tokenizer()(text, add_special_tokens=False).input_ids
        for text in (drawn.prompt, drawn.answer, drawn.prompt + drawn.answer)
    )
    assert both == prompt + answer
    assert len(answer) == 5  # one token a digit


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_follows_from_its_seed(task):
    def draw(seed, **options):
        return sample(task, 300, seed, tokenizer=tokenizer(), **options)

    first = draw(3)
    draw(4)  # nothing is left behind by samples in between
    assert draw(3) == first
    assert len({draw(seed).prompt for seed in range(20)}) == 20
    assert draw(3, split="train", text=SOURCE).prompt != draw(3, text=SOURCE).prompt


def test_questions_are_asked_of_every_fact():
    """Not of the first or last one only, whose place in the prompt a cache method could guess."""
    asked = set()
    for seed in range(40):
        prompt = sample("dict_lookup", 160, seed, tokenizer=tokenizer()).prompt
        keys, question = re.findall(r'^ {4}"(\w+_\w+)": \d{5},$', prompt, re.MULTILINE), prompt.split('"')[-2]
        asked.add(keys.index(question))
    assert asked == set(range(160 // 32))


def test_training_and_test_share_no_name_and_no_value():
    (train_names, train_values), (test_names, test_values) = tasks.pools("train"), tasks.pools("test")
    assert not set(train_names) & set(test_names) and not set(train_values) & set(test_values)
    assert len(test_names) > 4000 and len(test_values) > 20_000
    for split, names, values in (("train", train_names, train_values), ("test", test_names, test_values)):
        for task in TASKS:
            drawn = sample(task, 400, 0, tokenizer=tokenizer(), split=split, text=SOURCE)
            assert {int(v) for v in re.findall(r"\b\d{5}\b", drawn.prompt)} <= set(values)
            pairs = {f"{a}_{b}" for a in tasks.ADJECTIVES for b in tasks.NOUNS}
            words = set(re.findall(r"\w+", drawn.prompt.lower())) & pairs
            assert words and words <= set(names)


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


@given(st.floats(0, 1), st.integers(400, 1500), SEEDS)
@settings(max_examples=60)
def test_the_needle_stands_at_its_depth(depth, tokens, seed):
    drawn = sample("needle", tokens, seed, tokenizer=tokenizer(), depth=depth)
    name = re.search(r"assert (\w+) == $", drawn.prompt)[1]
    before, _, after = drawn.prompt.partition(f"{name} = {drawn.answer}\n")
    before, after = length(before) - 1, length(after[: after.rindex("assert")]) - 1  # without BOS
    longest = max(length(line + "\n") - 1 for line in drawn.prompt.split("\n"))
    assert 0 <= before - depth * (before + after) < longest  # at the first end of a line from there on
    if depth in (0, 1):
        assert (after if depth else before) == 0


def test_depths_at_both_ends():
    first, last = (sample("needle", 200, 1, tokenizer=tokenizer(), depth=depth).prompt for depth in (0, 1))
    assert re.match(r"[A-Z]+_[A-Z]+ = \d{5}\n", first)
    assert re.search(r"\n[A-Z]+_[A-Z]+ = \d{5}\nassert [A-Z]+_[A-Z]+ == $", last)


def test_filler_never_mentions_what_is_asked():
    """A line of filler that binds the same name would make the answer ambiguous."""
    (name,) = tasks.Draw(random.Random("needle 200 5 test"), "test").names(1)
    text = Filler(f"{name.upper()} = 1\nx = {name} + 1\nplain = 1\n" * 400)
    prompt = sample("needle", 200, 5, tokenizer=tokenizer(), text=text).prompt
    assert prompt.lower().count(name) == 2 and "plain" in prompt


def test_short_filler_starts_again():
    text = Filler("alpha = 1\nbeta = 2\ngamma = 3\n")
    drawn = sample("needle", 500, 0, tokenizer=tokenizer(), text=text)
    assert drawn.prompt.count("beta = 2\n") > 20


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
    foreign = merging(1500)
    assert any("Ċ" in token.strip("Ċ") for token in foreign.get_vocab())  # Ċ is the newline's byte
    made = 0
    for task in TASKS:
        for seed in range(5):
            try:
                drawn = sample(task, 400, seed, tokenizer=foreign)
            except ValueError as error:
                assert f"no prompt of 400 tokens could be made for {task!r}" in str(error)
                continue
            assert drawn.length == len(foreign(drawn.prompt).input_ids)
            assert 0 <= 400 - drawn.length <= 8 + 400 // 50
            assert answer_of(drawn.prompt) == drawn.answer
            made += 1
    assert made >= 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("neddle", 300, 0), "unknown task 'neddle'; did you mean 'needle'?"),
        (("xyz", 300, 0), "unknown task 'xyz'; known: dict_lookup, needle, function_lookup, two_hop"),
        (("needle", tasks.SHORTEST - 1, 0), f"tokens={tasks.SHORTEST - 1}: at least {tasks.SHORTEST}"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(*arguments, tokenizer=tokenizer())


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan")])
def test_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=rf"depth={depth}: between 0 and 1"):
        sample("needle", 300, 0, tokenizer=tokenizer(), depth=depth)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev': 'train' or 'test'"):
        sample("needle", 300, 0, tokenizer=tokenizer(), split="dev", text=SOURCE)


def test_facts_that_do_not_fit():
    """A tokenizer of single bytes needs several times as many tokens for the facts alone."""
    with pytest.raises(ValueError, match=r"too few tokens: the facts alone need \d+ more"):
        sample("dict_lookup", 300, 0, tokenizer=merging(256))


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("48213", True),
        ("48213\nassert x == 1", True),
        ("48213  # found", True),
        ("48213, 'message'", True),
        ("482130", False),
        ("48213_0", False),
        ("4821", False),
        (" 48213", False),
        ("1\n48213", False),
        ("", False),
    ],
)
def test_what_counts_as_correct(generated, expected):
    assert correct(Sample("needle", "", "48213", 0, 0), generated) is expected
