"""Generated functions: they do what they say, they are told apart from fewer steps, and the splits share no pair."""

import ast
import hashlib
import random
import re
import sys
from itertools import pairwise

import pytest
from functions_by_hand import BY_HAND

from kvlib.lab.functions import cut, problem
from kvlib.lab.functions.composing import split_of
from kvlib.lab.functions.helpers import draw_helpers
from kvlib.lab.functions.operands import Operand
from kvlib.lab.functions.steps import STEPS
from kvlib.lab.functions.values import DRAW, WORDS, parameter
from kvlib.lab.functions.writing import write
from kvlib.lab.tasks.words import SPLITS, belongs


@pytest.fixture(scope="module")
def drawn() -> dict[str, list]:
    return {split: [problem(seed, split) for seed in range(600)] for split in SPLITS}


def everything(drawn: dict[str, list]) -> list:
    return drawn["train"] + drawn["test"]


def top_level(found) -> tuple[ast.FunctionDef, dict[str, ast.stmt]]:
    """The function that a problem asks for, and what stands above it, by name."""
    *above, function = ast.parse(found.text).body
    return function, {getattr(node, "name", None) or node.targets[0].id: node for node in above}


def scope_of(source: str) -> dict:
    scope = {}
    exec(source, scope)
    return scope


# Steps


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_what_its_name_says(name):
    step, rng = STEPS[name], random.Random(name)
    for case in range(41):
        given = case if step.takes == "number" else DRAW[step.takes](rng)
        if name in ("largest", "smallest", "spread") and not given:
            continue
        start = parameter(step.takes, rng)
        k = rng.choice(step.operand) if step.operand else None
        operand = Operand(step.operand, k, "k", ("literal", "constant")[case % 2]) if step.operand else None
        helper = draw_helpers(step.helper, ["aid"], rng)[0] if step.helper else None
        body, _ = write([step], [operand], start, helper)
        above = helper.source if helper else ""
        scope = scope_of(f"k = {k!r}\n{above}\ndef asked({start.variable}):\n{body}\n")
        before = repr(given)
        assert scope["asked"](given) == BY_HAND[name](given, k, scope.get("aid")), (given, operand, body)
        assert repr(given) == before, "the argument has been changed"


def test_every_step_has_its_twin():
    assert set(BY_HAND) == set(STEPS)


# Problems


def test_solutions_pass_their_own_asserts_and_examples(drawn):
    example = re.compile(r"^    >>> (.+)\n    (.+)$", re.MULTILINE)
    for found in everything(drawn):
        scope = scope_of(found.text)
        assert len(found.asserts) >= 5
        for line in found.asserts:
            exec(line, scope)
        shown = example.findall(found.prompt)
        assert 2 <= len(shown) <= 3
        for call, result in shown:
            assert repr(eval(call, scope)) == result
            assert not any(call in line for line in found.asserts), "an example is tested, too"
        assert len(set(found.asserts)) == len(found.asserts)
        assert not re.search(r"\d{7}", "".join([found.prompt, *found.asserts])), "a number for a calculator"


def test_a_constant_answer_fails(drawn):
    for found in everything(drawn):
        assert len({line.rpartition(" == ")[2] for line in found.asserts}) >= 2


def test_every_step_counts(drawn):
    """Composed by hand without one of its steps, a function gives something else in one of the asserts.

    Where no operand is drawn, and the rest makes sense without the step because it gives what it takes.
    """
    tried = 0
    for found in everything(drawn):
        if top_level(found)[1] or any(STEPS[name].operand for name in found.composition):
            continue
        calls = [ast.parse(line).body[0].test for line in found.asserts]
        cases = [(ast.literal_eval(c.left.args[0]), ast.literal_eval(c.comparators[0])) for c in calls]

        def apply(names, value):
            for name in names:
                value = BY_HAND[name](value, None, None)
            return value

        assert all(apply(found.composition, value) == result for value, result in cases), found.text
        for i, name in enumerate(found.composition):
            if STEPS[name].takes == STEPS[name].gives:
                fewer = found.composition[:i] + found.composition[i + 1 :]
                assert any(apply(fewer, value) != result for value, result in cases), found.text
                tried += 1
    assert tried > 100


def test_asserts_reach_almost_every_line(drawn):
    """Lines of solutions that no assert reaches: in less than one problem of fifty."""
    missed = 0
    for found in everything(drawn)[::4]:
        scope, reached = {}, set()
        exec(compile(found.text, "asked", "exec"), scope)
        code = scope[found.name].__code__
        lines = {line for *_, line in code.co_lines() if line and line > code.co_firstlineno}

        def trace(frame, event, argument, code=code, reached=reached):
            if frame.f_code is code:
                reached.add(frame.f_lineno)
                return trace
            return None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            exec("\n".join(found.asserts), scope)
        finally:
            sys.settrace(before)
        missed += not lines <= reached
    assert missed < 6


def test_texts_are_one_function_with_a_docstring_behind_what_it_uses(drawn):
    for found in everything(drawn):
        function, above = top_level(found)
        assert function.name == found.name and ast.get_docstring(function)
        assert found.prompt.endswith('\n    """\n') and not found.solution.endswith("\n")
        assert cut(found.solution + "\n") == found.solution + "\n"
        assert max(map(len, found.text.split("\n"))) <= 100
        arguments = {argument.arg for argument in function.args.args}
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert not stored & (arguments | set(above)), "a variable hides a parameter, a constant or a helper"
        assert arguments <= loaded, "a parameter is not used"
        told = ast.get_docstring(function)
        for name, node in above.items():
            if name in loaded and isinstance(node, ast.Assign):
                assert f"`{name}`" in told
            elif name in loaded:
                purpose = re.search(r"(?:the|is) (\w+)(?: of a|\.$)", ast.get_docstring(node))[1]
                assert purpose in told and name not in told, "a helper is to be found by what it does"


def test_many_call_a_helper_and_find_it_among_others(drawn):
    for split, found in drawn.items():
        calling = [p for p in found if any(STEPS[name].helper for name in p.composition)]
        several = [p for p in calling if p.prompt.count("def ") > 2]
        assert len(calling) > len(found) / 4 and len(several) > len(calling) / 3, split
        first = 0
        for p in several:
            helpers = [node for node in top_level(p)[1].values() if isinstance(node, ast.FunctionDef)]
            assert len({ast.get_docstring(node) for node in helpers}) == len(helpers)
            first += f"{helpers[0].name}(" in p.solution
        assert len(several) / 4 < first < len(several) * 2 / 3, "it stands in the same place always"


# Splits


def test_no_pair_of_the_tests_occurs_in_training(drawn):
    pairs = {split: [set(pairwise(p.composition)) for p in found] for split, found in drawn.items()}
    trained = set().union(*pairs["train"])
    assert all(of_one - trained for of_one in pairs["test"])
    assert all(split_of(p.composition) == split for split, found in drawn.items() for p in found)


def test_every_step_can_be_learnt_and_most_are_tested():
    assert all(split_of((name,)) == "train" for name in STEPS)
    seen = {name for seed in range(600) for name in problem(seed).composition}
    assert len(seen) > 100


def test_enough_of_them(drawn):
    assert len({p.text for p in drawn["test"]}) == 600 and len({p.composition for p in drawn["test"]}) > 400
    assert len({p.text for p in drawn["train"]}) == 600 and len({p.composition for p in drawn["train"]}) > 400


def test_names_of_helpers_differ_between_the_splits(drawn):
    for split, found in drawn.items():
        names = {name for p in found for name, node in top_level(p)[1].items() if isinstance(node, ast.FunctionDef)}
        assert names and all(belongs(name, split) for name in names)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='valid'"):
        problem(0, "valid")


def test_the_seed_alone_decides(drawn):
    """The same texts in every process, whatever its hash seed; the arms were trained with them."""
    texts = "".join(repr(found) for found in everything(drawn))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "77f5ecca72322769"


def test_words_are_distinct():
    assert len(set(WORDS)) == len(WORDS)
