"""Completion of lines: prompts are real text, lines are code, lengths hold, the definition of the name is shown."""

import ast
import io
import json
import re
import token
import tokenize
from dataclasses import replace
from functools import cache
from itertools import chain

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import kvlib
from kvlib.anchored.arms import line_ends
from kvlib.lab.evaluation import arms
from kvlib.lab.evaluation.metrics import is_decided
from kvlib.lab.tasks import COMPLETIONS, UNBROKEN, Prompt, completions, lines, sample, score
from kvlib.lab.tasks.prompt import begin, boundary
from kvlib.methods.anchors import anchored
from kvlib.paths import DATA, MODELS

FILES = [json.loads(line) for line in (DATA / "heldout" / "code.jsonl").open()]
TEXTS = {row["file"]: row["text"] for row in FILES}
LENGTHS = (512, 600, 1024, 4096)


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


def ids(text: str) -> list[int]:
    """Without BOS."""
    return tokenizer()(text, add_special_tokens=False).input_ids


def said(drawn: Prompt) -> str:
    """The prompt without the text of its BOS."""
    assert drawn.context.startswith("<s>")
    return drawn.text.removeprefix("<s>")


def check_sizes(drawn: Prompt, tokens: int) -> None:
    """As for the other tasks: no token crosses the end of the prompt, and hardly a token is left over."""
    prompt, answer = [*chain(*drawn.ids(tokenizer()))], drawn.answer_ids(tokenizer())
    assert prompt == tokenizer()(said(drawn)).input_ids and answer == ids(drawn.answer)
    assert ids(said(drawn) + drawn.answer) == prompt[1:] + answer
    assert drawn.length == len(prompt) + len(answer)
    assert 0 <= tokens - drawn.length <= 8 + tokens // 50


def check_line(drawn: Prompt) -> None:
    assert drawn.text.endswith("\n") and "\n" not in drawn.answer
    line = drawn.answer.strip()
    assert len(line) >= 10 and not {"#", "`"} & set(line) and "//" not in line
    assert not re.match(r"(import|from)\s", line)
    kinds = list(tokenize.generate_tokens(io.StringIO(line.rstrip("\\")).readline)) if balanced(line) else []
    assert not kinds or any(kind.type == token.NAME for kind in kinds)
    assert drawn.lead == "\n" and drawn.context.endswith("\n")
    assert drawn.question.strip() and "\n" not in drawn.question.rstrip("\n")


def balanced(line: str) -> bool:
    try:
        list(tokenize.generate_tokens(io.StringIO(line).readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return True


def definition(line: lines.Line) -> str:
    """The line that defines what a line uses."""
    return FILES[line.source]["text"][line.defined :].split("\n")[0]


def names_used(line: lines.Line) -> list[str]:
    """What a line uses of what its source defines there, under the names by which it is imported, by the text."""
    name = re.match(r"(?:async def|def|class)?\s*(\w+)", definition(line))[1]
    text = FILES[line.file]["text"]
    statement = rf"^ *from\b[^\n()]*(?:\([^()]*)?\b{name}\b(?: as (\w+))?"
    names = [found[1] or name for found in re.finditer(statement, text[: line.at], re.MULTILINE)]
    return [used for used in names if re.search(rf"\b{used}\b", text[line.at :].split("\n")[0])]


# The lines


def test_the_lines_are_the_same_for_every_supported_python():
    for text in TEXTS.values():
        ast.parse(text, feature_version=(3, 11))


def test_no_line_lies_in_a_docstring_or_a_long_string():
    """By Python's tokenizer, not its parser."""
    everything = set()
    for file, row in enumerate(FILES[:30]):
        begins = lines.line_starts(file)
        asked = {begins.index(at) + 1 for at in lines.code_lines(file)}
        everything |= asked
        for found in tokenize.generate_tokens(io.StringIO(row["text"]).readline):
            if found.type == token.STRING and found.start[0] < found.end[0]:
                assert asked.isdisjoint(range(found.start[0], found.end[0] + 1))
            if found.type == token.STRING and found.line.strip() == found.string and found.string.startswith('"""'):
                assert found.start[0] not in asked
            if found.type == token.COMMENT:
                assert found.start[0] not in asked
    assert len(everything) > 500


def test_strings_that_are_prose():
    source = '''def f(x):
    """The "name" of x."""
    y = """one
    {two}"""
    z = f"""{x}
    two"""
    w = ("one"
         "two" + x("three"))
    def g(x) -> str: ...
    return "one", f"{x}"
'''
    assert [(node.lineno, node.end_lineno) for node in lines.strings(ast.parse(source))] == [
        *((2, 2), (3, 4), (5, 6), (7, 8)),
    ]


def test_where_imports_lead():
    numbers = {row["file"]: number for number, row in enumerate(FILES)}

    def lead(file: str, statement: str) -> str | None:
        found = lines.module(numbers[file], ast.parse(statement).body[0])
        return None if found is None else FILES[found]["file"]

    nested = "bs4/builder/_lxml.py"
    assert lead(nested, "from . import _htmlparser") == lead(nested, "from bs4.builder import x")
    assert lead(nested, "from . import x") == "bs4/builder/__init__.py"
    assert lead(nested, "from ._htmlparser import x") == "bs4/builder/_htmlparser.py"
    assert lead(nested, "from ..element import Tag") == lead(nested, "from bs4.element import Tag") == "bs4/element.py"
    assert lead(nested, "from element import Tag") is None is lead(nested, "from collections import deque")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("    return self.value", True),
        ("    return x", False),  # eight characters
        ("          x = 12", False),  # indentation does not count
        ("    def f(self)", True),
        ("    return None", False),  # keywords only
        ("    'one', 'two', 'three',", False),
        ('    b"one": b"two",', False),
        ('    "one": two_three,', True),
        ("    value = 1  # one", False),
        ("    # return self.value", False),
        ("    value = total // 2", False),
        ("    import collections", False),
        ("from collections import deque", False),
        ("    important = True", True),
        ("    )  .  ]  ,  }", False),
        ("", False),
    ],
)
def test_what_is_worth_asking(line, expected):
    assert lines.worth_asking(line) is expected


# Samples


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_prompt_is_what_stands_before_the_line(tokens):
    for seed in range(15):
        drawn = sample("next_line", tokens, seed, tokenizer=tokenizer())
        assert any(said(drawn) + drawn.answer + "\n" in text for text in TEXTS.values())
        check_line(drawn)
        check_sizes(drawn, tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_file_that_defines_the_name_comes_first(tokens):
    for seed in range(25):
        drawn = sample("cross_file_line", tokens, seed, tokenizer=tokenizer())
        line = lines.cross_file_lines()[seed]
        source, file = FILES[line.source], FILES[line.file]
        assert source["distribution"] == file["distribution"]
        first, _, here = said(drawn).rpartition(f"# {file['file']}\n")
        assert first.startswith(f"# {source['file']}\n")
        # the own file: the text before the line
        before = file["text"][: line.at]
        assert before.endswith(here) and (before + drawn.answer + "\n") in file["text"]
        # the other: around the definition of a name that is imported, and used now
        assert f"\n{definition(line)}\n" in first
        assert names_used(line) and drawn.answer == file["text"][line.at :].split("\n")[0]
        check_line(drawn)
        check_sizes(drawn, tokens)


def test_the_line_is_the_first_that_uses_the_name():
    for line in lines.cross_file_lines()[:200]:
        text = FILES[line.file]["text"][: line.at]
        end = max(found.end() for found in re.finditer(r"^ *(?:from|import)\b[^\n(]*(\([^)]*\))?", text, re.MULTILINE))
        asked = [row for at, row in lines.code_lines(line.file).items() if end <= at < line.at]
        assert any(not any(re.search(rf"\b{name}\b", row) for row in asked) for name in names_used(line))


def test_definitions_stand_at_all_depths():
    """Of what is shown before the own file."""
    depths = []
    for seed in range(60):
        drawn = sample("cross_file_line", 1024, seed, tokenizer=tokenizer())
        line = lines.cross_file_lines()[seed]
        first = said(drawn).rpartition(f"# {FILES[line.file]['file']}\n")[0]
        depths.append(first.index(f"\n{definition(line)}\n") / len(first))
    assert min(depths) < 0.1 and max(depths) > 0.85
    assert sum(0.2 < depth < 0.8 for depth in depths) > 15


def test_names_are_found_under_the_names_of_their_imports():
    assert all(names_used(line) for line in lines.cross_file_lines())


@pytest.mark.parametrize("found", [lines.next_lines, lines.cross_file_lines])
def test_places_are_distinct_and_spread(found):
    places = [(line.file, line.at) for line in found()]
    assert len(set(places)) == len(places) > 400
    assert len({FILES[line.file]["distribution"] for line in found()[:200]}) == 5
    assert len({line.file for line in found()[:200]}) > 40


def test_enough_lines_for_the_longest_prompts():
    sample("next_line", 4096, 10_000, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"seed=20000: held-out code has 1\d{4} such lines"):
        sample("next_line", 512, 20_000, tokenizer=tokenizer())


@cache
def merging(words: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens may span lines, or only blank space: what is met with other people's models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False, use_regex=words), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    source = FILES[0]["text"] + FILES[40]["text"]
    bpe.train_from_iterator([source[i : i + 500] for i in range(0, min(60_000, len(source)), 500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_tokenizers_that_merge_lines():
    foreign = merging()
    assert any("Ċ" in word.strip("Ċ") for word in foreign.get_vocab())  # Ċ is the newline's byte
    for task in COMPLETIONS:
        for seed in range(8):
            drawn = sample(task, 1024, seed, tokenizer=foreign)
            assert drawn.length == len(foreign(drawn.text + drawn.answer).input_ids)
            assert 0 <= 1024 - drawn.length <= 8 + 1024 // 50


def test_no_token_spans_the_prompt_and_what_is_foretold():
    """Neither where a newline is joined to the indentation behind it nor where two newlines are joined."""
    foreign = merging(words=True)
    for seed in range(40):
        drawn = sample("code_bits", 512, seed, tokenizer=foreign)
        whole = foreign(drawn.text + drawn.answer).input_ids
        assert [*chain(*drawn.ids(foreign)), *drawn.answer_ids(foreign)] == whole and len(whole) == drawn.length
        assert not drawn.lead.strip()  # it is the indentation that moves
    assert foreign.tokenize("\n\n") == ["ĊĊ"] and foreign.tokenize("\n\ndef")[:2] == ["Ċ", "Ċ"]
    assert boundary("x\n\n", "def f", (0, 3), foreign) == ("x\n\ndef", " f")
    with pytest.raises(ValueError, match="a token spans the beginning of 'def f'"):
        boundary("x\n\n", "def f", (0,), foreign)


def test_as_many_lines_as_hold_64_tokens_are_foretold():
    def count(text: str) -> int:
        return len(tokenizer()(text, add_special_tokens=False).input_ids)

    for seed in range(60):
        drawn = sample("code_bits", 2048, seed, tokenizer=tokenizer())
        *but_last, last = drawn.answer.splitlines(keepends=True)
        assert drawn.answer.endswith("\n") and last
        assert count("".join(but_last)) < 64 <= count(drawn.answer)


# Behind prompts that end before a newline


def real():
    return kvlib.load("smollm2")[1]


TOKENIZERS = {"minilm": tokenizer, "merging": lambda: merging(words=True), "smollm2": real}
JOINED = [("minilm", 512), ("minilm", 2048), ("merging", 512), ("merging", 1024), ("smollm2", 1024)]


@pytest.fixture(scope="module", params=JOINED, ids=lambda given: "{} {}".format(*given))
def unbroken(request) -> tuple:
    """A tokenizer, a length, and the prompts of both families by seed."""
    name, tokens = request.param
    made = TOKENIZERS[name]()
    seeds = (*range(20), 500)  # so many lines later the two families ask for others
    return made, tokens, {seed: [sample(task, tokens, seed, tokenizer=made) for task in UNBROKEN] for seed in seeds}


def own(drawn: Prompt, tokenizer) -> str:
    """The prompt without the text of its first token."""
    return drawn.text.removeprefix(begin(tokenizer))


def fed(drawn: Prompt) -> Prompt:
    """With all that a model writes up to the end of the line as its answer, the newlines before it too."""
    if drawn.task == "code_bits_unbroken":
        return drawn
    before, _ = completions.cut(next(line for line in lines.next_lines() if ends_at(drawn, line)))
    return replace(drawn, answers=(before[len(before.rstrip()) :] + drawn.answer,))


def ends_at(drawn: Prompt, line: lines.Line) -> bool:
    """Whether it is this line that a prompt asks for."""
    text = FILES[line.file]["text"]
    return text[: line.at].rstrip().endswith(drawn.text[-200:]) and text[line.at :].startswith(drawn.answer + "\n")


def test_the_same_lines_as_behind_a_newline(unbroken):
    """By seed; all is text of a file, without a gap; neither prompt nor answer ends in whitespace."""
    tokenizer, tokens, samples = unbroken
    for seed, both in samples.items():
        for drawn in both:
            broken = sample(drawn.task.removesuffix("_unbroken"), tokens, seed, tokenizer=tokenizer)
            text, answer = own(drawn, tokenizer), fed(drawn).answer
            assert text == text.rstrip() and not drawn.answer[-1].isspace() and answer.startswith("\n")
            assert any(text + answer + "\n" in each for each in TEXTS.values())
            assert (broken.text + broken.answer).rstrip().endswith(text[-500:] + answer)
            assert drawn.answer.strip().endswith(broken.answer.strip())
            assert drawn.answer == broken.answer or drawn.task == "code_bits_unbroken"
            assert 0 <= tokens - drawn.length <= 8 + tokens // 50


def test_no_token_spans_an_end_whether_lines_are_joined_or_not(unbroken):
    """Not that of the prompt and not that of the answer; with anchors and without the same text is asked for."""
    tokenizer, _, samples = unbroken
    settings = {"anchor": len(tokenizer), "ends": line_ends(tokenizer), "longest": 96}
    for drawn in map(fed, chain(*samples.values())):
        answer = drawn.answer_ids(tokenizer)
        whole = tokenizer(drawn.text + drawn.answer, add_special_tokens=False).input_ids
        assert [*chain(*drawn.ids(tokenizer)), *answer] == whole
        more = tokenizer(drawn.text + drawn.answer + "\n    x", add_special_tokens=False).input_ids
        assert more[: len(whole)] == whole
        prompt, behind = anchored(drawn.text, tokenizer, settings), arms.behind(drawn, tokenizer, settings)
        assert prompt + behind == anchored(drawn.text + drawn.answer, tokenizer, settings)
        assert tokenizer.decode(answer) == drawn.answer == without(settings["anchor"], behind, tokenizer)
        assert tokenizer.decode([*chain(*drawn.ids(tokenizer))]) == without(settings["anchor"], prompt, tokenizer)
        assert behind.count(settings["anchor"]) >= drawn.answer.count("\n")


def without(anchor: int, ids: list[int], tokenizer) -> str:
    return tokenizer.decode([each for each in ids if each != anchor])


def test_newlines_before_the_line_are_not_judged():
    """And decide nothing: what is written goes on to the end of the line."""
    for seed in range(30):
        drawn = sample("next_line_unbroken", 512, seed, tokenizer=tokenizer())
        text = fed(drawn).answer
        assert text != drawn.answer
        for written in (text, "\n\n\n" + text, drawn.answer):
            assert score(drawn, written) == score(drawn, written + "\n") == score(drawn, written + "\nx = 1") == 1
            assert not any(is_decided((written + "\n")[:end]) for end in range(len(written) + 1))
            assert is_decided(written + "\n")
        assert 0 < score(drawn, text[:-2]) < 1 and score(drawn, "\n") == 0
        assert score(drawn, "\n    # x\n" + drawn.answer) == 1  # a comment is passed over, here as everywhere
        assert score(drawn, "~\n" + drawn.answer) < 1  # but not what goes on in the prompt's line


def test_tokenizers_that_join_the_end_of_a_line_are_refused():
    """Of which a token spans an end of the prompt or of the answer; nothing else is."""
    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE({**alphabet, ")Ċ": len(alphabet)}, [(")", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    joining = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert joining.tokenize("f(x)\n")[-2:] == ["x", ")Ċ"]
    seen, choices = set(), (completions.fitting, completions.continued)
    for seed in range(40):
        for task, choose in zip(("next_line_unbroken", "code_bits_unbroken"), choices):
            line = choose(1024, joining)[seed]
            text = FILES[line.file]["text"]
            asked = text[line.at : completions.end_of_answer(line, joining)].rstrip()
            ends = text[: line.at].rstrip()[-1] == ")", task == "code_bits_unbroken" and asked[-1] == ")"
            seen.add((task, *ends))
            if any(ends):
                with pytest.raises(ValueError, match="a token spans the beginning of '.n"):
                    sample(task, 1024, seed, tokenizer=joining)
            else:
                sample(task, 1024, seed, tokenizer=joining)
    assert len(seen) == 6
