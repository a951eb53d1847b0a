"""Tasks in natural language: what a prompt promises, for a base model's tokenizer and for one with a chat format."""

import hashlib
import random
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import kvlib
from kvlib.lab import tasks
from kvlib.lab.evaluation.answers import write
from kvlib.lab.evaluation.blockwise import divided
from kvlib.lab.evaluation.prompts import compressed
from kvlib.lab.tasks import natural
from kvlib.lab.tasks.natural import needles, pilot, spelled, texts
from kvlib.lab.tasks.natural.words import Draw
from kvlib.verified import end_tokens

CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPELLINGS = (needles.number, spelled.number_short, spelled.number_in_words)
families = pytest.mark.parametrize("task", natural.FAMILIES)
formats = pytest.mark.parametrize("chat", [False, True], ids=["base", "chat"])


@cache
def tokenizer(chat=False):
    found = kvlib.load()[1]
    found.chat_template = CHAT if chat else None
    return found


def count(text, chat=False):
    return len(tokenizer(chat)(text, add_special_tokens=False).input_ids)


def all_ids(prompt):
    return torch.tensor([[token for part in prompt.ids(tokenizer()) for token in part]])


@families
@pytest.mark.parametrize(("tokens", "seed", "chat"), [(768, 0, True), (1536, 7, False)])
def test_a_prompt_has_its_length_and_answers_only_where_no_method_keeps_everything(task, tokens, seed, chat):
    prompt = tasks.sample(task, tokens, seed, tokenizer=tokenizer(chat))
    whole = prompt.context + prompt.question + prompt.lead
    assert tokens - 8 - tokens // 50 <= count(whole + prompt.answer) == prompt.length <= tokens
    for answer in prompt.answers:
        places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", prompt.context)]
        assert places
        assert all(count(prompt.context[:start]) >= 32 and count(prompt.context[end:]) >= 64 for start, end in places)
        assert not re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", prompt.question + prompt.lead)


@families
@formats
def test_parts_are_tokens_of_the_whole_text(task, chat):
    """The same ids in every protocol, and at least one that is fed when a cache has been compressed."""
    prompt = tasks.sample(task, 768, 3, tokenizer=tokenizer(chat))
    parts = prompt.ids(tokenizer(chat))
    whole = tokenizer(chat)(prompt.context + prompt.question + prompt.lead, add_special_tokens=False).input_ids
    assert [*parts[0], *parts[1], *parts[2]] == whole and all(parts)
    for part, text in zip(parts, (prompt.context, prompt.question, prompt.lead)):
        assert tokenizer(chat).decode(part) == text
    if tasks.find(task).metric == "exact":
        ids = prompt.answer_ids(tokenizer(chat))
        assert tokenizer(chat).decode(ids) == prompt.answer
        assert (
            tokenizer(chat)(prompt.context + prompt.question + prompt.lead + prompt.answer).input_ids[-len(ids) :]
            == ids
        )


def test_the_chat_format_is_the_models():
    prompt = tasks.sample("number", 512, 0, tokenizer=tokenizer(True))
    assert prompt.context.startswith("<s>user\n") and prompt.question.endswith("?</s>\n<s>assistant\n")
    base = tasks.sample("number", 512, 0, tokenizer=tokenizer(False))
    assert base.context.startswith("<s>Some special") and base.question.endswith("?\nAnswer:")
    assert base.lead == " " + prompt.lead and base.answers == prompt.answers


@families
def test_prompts_follow_from_their_seed(task):
    first, again, other = (tasks.sample(task, 768, seed, tokenizer=tokenizer()) for seed in (5, 5, 6))
    assert first == again
    assert first.context != other.context and first.answers != other.answers


def test_prompts_are_those_of_the_pilot():
    """Whose rows are committed; the hash was taken when they were made."""
    found = hashlib.sha256()
    for task in sorted(natural.FAMILIES.values(), key=lambda family: family.make.__name__):
        for tokens, seed in ((768, 0), (1024, 5)):
            prompt = tasks.sample(task.name, tokens, seed, tokenizer=tokenizer())
            found.update("\0".join([prompt.text, *prompt.answers, str(prompt.length), ""]).encode())
    assert found.hexdigest()[:16] == "f304c40ca565b206"


@pytest.mark.parametrize("task", ["number", "number_of_four", "register", "repeated_line"])
@pytest.mark.parametrize("begin", [0, 60])
def test_answers_stand_at_all_depths_evenly(task, begin):
    """Whatever run of samples is taken."""
    depths = []
    for seed in range(begin, begin + 20):
        prompt = tasks.sample(task, 1024, seed, tokenizer=tokenizer())
        depths.append(prompt.context.rindex(prompt.answer.strip()) / len(prompt.context))
    even = (np.arange(20) + 0.5) / 20
    assert np.abs(np.sort(depths) - (0.06 + 0.86 * even)).max() < 0.12


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"unknown task 'numbr'; did you mean 'number'\?"):
        tasks.sample("numbr", 512, 0, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="tokens=255: at least 256"):
        tasks.sample("number", 255, 0, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="too few tokens"):
        tasks.sample("class_label", 256, 0, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"seed=100000: held-out code has \d+ such lines"):
        tasks.sample("repeated_line", 1024, 100_000, tokenizer=tokenizer())


def test_repeated_lines_stood_in_the_context_word_for_word():
    for seed in range(5):
        prompt = tasks.sample("repeated_line", 1024, seed, tokenizer=tokenizer())
        line = prompt.answer.strip()
        assert prompt.answer.endswith("\n") and line in [other.strip() for other in prompt.context.split("\n")]


# What needs no label


@pytest.mark.parametrize("task", ["prose_bits", "code_bits"])
@pytest.mark.parametrize(("tokens", "seed"), [(512, 0), (1024, 3), (2048, 7)])
def test_what_follows_is_foretold(task, tokens, seed):
    """Nothing is asked; the last token is fed after eviction, and what follows stands behind it in the text."""
    prompt = tasks.sample(task, tokens, seed, tokenizer=tokenizer())
    context, question, lead = prompt.ids(tokenizer())
    answer = prompt.answer_ids(tokenizer())
    assert prompt.context.startswith("<s>") and prompt.question == "" == tokenizer().decode(question)
    assert len(lead) == 1 and len(answer) >= 64 and tokens - 8 - tokens // 50 <= prompt.length <= tokens
    assert [*context, *lead, *answer] == tokenizer()(prompt.text + prompt.answer, add_special_tokens=False).input_ids
    assert len(context) + 1 + len(answer) == prompt.length
    text = "".join(texts.novel().pieces if task == "prose_bits" else texts.code().pieces)
    assert prompt.text.removeprefix("<s>") + prompt.answer in text + "\n"
    if task == "prose_bits":
        assert len(answer) <= 96 and re.search(r"[.!?][\"')]*$", prompt.text) and prompt.answer.startswith(" ")


def test_stretches_differ_and_lie_all_over_the_novel():
    text = "".join(texts.novel().pieces)
    drawn = [tasks.sample("prose_bits", 512, seed, tokenizer=tokenizer()) for seed in range(40)]
    places = sorted(text.index(prompt.answer) / len(text) for prompt in drawn)
    assert len(set(places)) == 40 and np.abs(places - (np.arange(40) + 0.5) / 40).max() < 0.3
    assert drawn[3] == tasks.sample("prose_bits", 512, 3, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="seed=0: the text has 0 sentences with 4096 characters before them"):
        tasks.sample("prose_bits", 512, 0, tokenizer=tokenizer(), text=natural.sentences("It rained. " * 50))


@formats
def test_a_summary_is_asked_for_in_the_model_s_format(chat):
    prompt = tasks.sample("summary", 768, 2, tokenizer=tokenizer(chat))
    assert prompt.answers == () and prompt.lead.strip() == "The text" and all(prompt.ids(tokenizer(chat)))
    assert prompt.context.startswith("<s>user\nRead the following" if chat else "<s>Read the following")
    assert "Summarise the text above in a few sentences." in prompt.question
    assert 768 - 8 - 768 // 50 <= count(prompt.text, chat) == prompt.length <= 768
    words = prompt.context.split("afterwards.", 1)[1].strip()
    assert words in "".join(texts.novel().pieces)


# Texts


def test_the_novel_is_the_recorded_one_and_nothing_but_the_novel():
    expected, name = (texts.NOVEL.parent / "SHA256SUMS").read_text().split()
    assert name == texts.NOVEL.name and hashlib.sha256(texts.NOVEL.read_bytes()).hexdigest() == expected
    assert texts.NOVEL.stat().st_size < 600_000
    whole = "".join(texts.novel().pieces)
    assert texts.novel().pieces[2] == "\n\nCall me Ishmael." and whole.endswith("only found another orphan.")
    assert not re.search("gutenberg|etext|ebook|transcriber", whole, re.IGNORECASE)


def test_sentences():
    text = 'CHAPTER 1.\n\nI saw Mr. Smith in\nthe rain. "Come in!" he said.\n\n\nYes (he did). So e.g. this.\n'
    assert texts.sentences(text).pieces == (
        "\n\nCHAPTER 1.",
        "\n\nI saw Mr. Smith in the rain.",
        ' "Come in!" he said.',
        "\n\nYes (he did).",
        " So e.g. this.",
    )


def test_any_text_can_hide_the_facts(tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("The cat sat on the mat. " * 400)
    monkeypatch.setenv("KVLIB_DATA", str(tmp_path))
    prompt = tasks.sample("number", 512, 0, tokenizer=tokenizer(), text=natural.prose("own.txt"))
    assert prompt.context.count("The cat sat on the mat.") > 20 and prompt.answer in prompt.context
    with pytest.raises(FileNotFoundError, match=r"other.txt is missing"):
        natural.prose("other.txt")
    with pytest.raises(ValueError, match="the text is too short"):
        tasks.sample("number", 8192, 0, tokenizer=tokenizer(), text=natural.prose("own.txt"))


def test_sentences_that_hold_an_answer_are_left_out():
    answer = tasks.sample("number", 512, 0, tokenizer=tokenizer()).answer.strip()
    text = natural.sentences(f"They spoke of {answer} then. The cat sat on the mat. " * 300)
    assert tasks.sample("number", 512, 0, tokenizer=tokenizer(), text=text).context.count(answer) == 1


# Scores


def prompt_with(task, *answers):
    return tasks.Prompt(task, 0, "", "", "", answers, 0)


@pytest.mark.parametrize(
    ("task", "answers", "written", "expected"),
    [
        ("number", (" 123",), " 123", 1),
        ("number", (" 123",), " 123. So", 1),
        ("number", (" 123",), " 1234", 0),
        ("number", (" 123",), " is 123", 0),
        ("speaker", (" Ida",), " Ida", 1),
        ("speaker", (" Ida",), " Idaho", 0),
        ("repeated_line", (" return x\n",), " return x\n\ndef", 1),
        ("repeated_line", (" return x\n",), " return x\nfoo", 1),
        ("repeated_line", (" return x\n",), " return x.y\n", 0),
        ("all_numbers", (" 12", " 34", " 56", " 78"), "78, 12 and 999", 0.5),
        ("all_numbers", (" 12", " 34"), "120, 345", 0),
        ("guests", (" Ida", " Ivan"), ": Ivan, Idaho", 0.5),
        ("guests", (" Ida", " Ivan"), " Ida, Ivan", 1),
    ],
)
def test_scores(task, answers, written, expected):
    assert tasks.score(prompt_with(task, *answers), written) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (" 123.", 1),
        (" 1234", 0),  # goes on
        (" 125.", 0),
        (" 923.", 0),  # right again behind the mistake, where it no longer counts
    ],
)
def test_judging_by_first_choices(chosen, expected):
    prompt, ids = prompt_with("number", " 123"), tokenizer()(chosen, add_special_tokens=False).input_ids
    assert len(ids) == len(prompt.answer_ids(tokenizer())) + 1
    assert tasks.judge(prompt, ids, tokenizer()) == expected


# The pilot


@pytest.mark.parametrize("task", ["constant", pytest.param("all_numbers", marks=pytest.mark.deep)])
def test_the_full_cache_scores_what_stock_transformers_writes(task):
    model = kvlib.load()[0]
    drawn = [tasks.sample(task, tokens, seed, tokenizer=tokenizer()) for seed, tokens in enumerate((512, 640))]
    table = pilot.measure(model, tokenizer(), drawn, block=1 if task == "constant" else 2)
    expected = []
    for prompt in drawn:
        ids = all_ids(prompt)
        out = model.generate(ids, max_new_tokens=tasks.new_tokens(prompt, tokenizer()), do_sample=False)
        expected.append(tasks.score(prompt, tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    assert table[table.method == "full"].value.tolist() == expected
    assert sum(expected) > 0 or task == "all_numbers"
    assert table.groupby("method").size().to_dict() == {"full": 2, "snapkv": 2, "streaming_llm": 2}


def test_a_batch_holds_all_but_the_last_tokens_of_its_prompts():
    drawn = [tasks.sample("constant", tokens, 1, tokenizer=tokenizer()) for tokens in (300, 400)]
    prompts, last = divided(kvlib.load()[0], tokenizer(), drawn, 1)
    for prompt, row, mask, end in zip(drawn, prompts.ids, prompts.mask, last):
        assert [*row[mask.bool()], *end] == all_ids(prompt)[0].tolist() and mask[-1] == 1


def test_greedy_decoding_of_a_batch_is_that_of_each_prompt():
    model = kvlib.load()[0]
    drawn = [tasks.sample(*asked, 1, tokenizer=tokenizer()) for asked in (("constant", 300), ("number", 400))]
    prompts, last = divided(model, tokenizer(), drawn, 1)
    with torch.no_grad(), compressed(prompts, kvlib.method("full")) as read:
        logits = read.feed(last)[:, -1]
        written = write(read.feed, read.keep, logits, tokenizer(), end_tokens(model), [24, 24])
    for prompt, text in zip(drawn, written):
        ids = all_ids(prompt)
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer().decode(out, skip_special_tokens=True) == text != ""
    assert len(written[0]) < len(written[1])


def scores(share, n=100):
    return (np.arange(n) < round(share * n)).astype(float)


@pytest.mark.parametrize(
    ("full", "evicted", "guess", "expected"),
    [
        (0.15, 0.15, 0, True),  # what eviction does decides nothing between the bounds
        (0.14, 0, 0, False),
        (0.98, 0.98, 0, True),
        (0.99, 0.99, 0, False),
        (1.0, 0.99, 0, False),  # one prompt of a hundred is no loss
        (1.0, 0.9, 0, True),
        (0.36, 0, 0.25, True),
        (0.33, 0, 0.25, False),  # not better than guessing by two standard errors
    ],
)
def test_which_families_stay(full, evicted, guess, expected):
    assert pilot.passes(scores(full), [scores(full), scores(evicted)], guess) is expected


def test_a_family_stays_if_it_passes_at_one_length():
    cells = [("number", 2048, 1.0), ("number", 4096, 0.9), ("register", 2048, 0.1), ("register", 4096, 0.1)]
    table = pd.concat(
        pd.DataFrame({"task": task, "length": length, "sample": range(100), "method": method, "value": scores(share)})
        for task, length, share in cells
        for method in ("full", "snapkv", "streaming_llm")
    )
    found = pilot.summary(table).set_index(["task", "length"])
    assert found.passes.tolist() == [False, True, False, False]
    assert found.stays.tolist() == [True, True, False, False]
    assert found.full.tolist() == [1.0, 0.9, 0.1, 0.1] and found.samples.eq(100).all()


def test_a_needle_in_fewer_tokens_has_the_wording_of_the_needle():
    def counted(text, **_):
        return SimpleNamespace(input_ids=[0] * (2 if text.endswith("r") else 1))

    made = [make(Draw(random.Random(1), 3, 512, counted)) for make in SPELLINGS]
    assert [draft.facts[0][0] for draft in made] == [made[0].facts[0][0]] * 3  # the same depth
    answers = [draft.answers[0] for draft in made]
    assert re.fullmatch(r" \d{7}", answers[0]) and re.fullmatch(r" \d{3}", answers[1])
    words = answers[2].split()
    assert len(words) == len(set(words)) == 3 and not any(word.endswith("r") for word in words)  # one token each
    for draft in made[1:]:
        city = re.search(r"number for (\w+) mentioned", draft.question).group(1)
        assert draft.facts[0][1] == needles.hide(city, draft.answers[0].strip()) and draft.instruction == needles.HIDDEN
