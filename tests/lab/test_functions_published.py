"""HumanEval and MBPP as problems: from made-up rows of the same schemas, and from the real ones where they are."""

import json
import os
from pathlib import Path

import pytest

from kvlib.lab.functions import cut, run
from kvlib.lab.functions.published import from_humaneval, from_mbpp, humaneval, mbpp

MADE_UP = Path(__file__).parent / "benchmarks"
ROW = {
    "task_id": 7,
    "text": "Write a function to add \\n or a mark to each word.",
    "code": "import re\r\nMARK = '!'\r\ndef aid(w):\r\n\treturn w + MARK\r\n"
    "def marked(words, n = 1):\r\n  out = [ ]\r\n  for w in words:\r\n       out.append(aid(w)*n)\r\n\r\n  return(out)",
    "test_setup_code": "",
    "test_list": ["assert marked(['a',\"b\"]) == ['a!','b!']", " assert marked(['\\n']) == ['\\n!']"],
    "challenge_test_list": [],
}
TREE = ROW | {
    "code": "class Node:\r\n  def __init__(self, v):\r\n    self.v = v\r\ndef value(node):\r\n  return node.v",
    "test_setup_code": "root = Node(3) \r\nother = Node(4)",
    "test_list": ["assert value(root) == 3", "assert value(other) == 4"],
}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (MADE_UP / f"{name}.jsonl").read_text().splitlines()]


def kind(problem, completion: str) -> str:
    return run(problem.prompt, completion, problem.asserts).kind


def test_humaneval():
    half, longest = map(from_humaneval, rows("humaneval"))
    assert half.name == "halve" and half.text == rows("humaneval")[0]["prompt"] + "    return x / 2\n"
    assert kind(half, half.solution) == kind(longest, longest.solution) == "passed"
    assert kind(half, "    return x // 2\n") == "wrong value"
    assert kind(half, "    return y / 2\n") == "undefined name"


def test_mbpp_in_the_style_of_humaneval():
    found = from_mbpp(ROW)
    assert found.name == "marked"
    assert (
        found.prompt
        == '''import re


def marked(words, n=1):
    """Write a function to add \\\\n or a mark to each word.

    >>> marked(['a', 'b'])
    ['a!', 'b!']
    >>> marked(['\\\\n'])
    ['\\\\n!']
    """
'''
    )
    assert (
        found.solution
        == """    out = []
    for w in words:
        out.append(aid(w) * n)
    return out


MARK = '!'


def aid(w):
    return w + MARK"""
    )
    assert found.asserts == ("assert marked(['a',\"b\"]) == ['a!','b!']", "assert marked(['\\n']) == ['\\n!']")
    assert kind(found, found.solution) == "passed"
    assert kind(found, cut(found.solution)) == "undefined name"
    assert kind(found, "    return [w + '!' for w in words if w > 'a']\n") == "wrong value"


def test_mbpp_with_classes_and_a_setup():
    found = from_mbpp(TREE)
    assert found.prompt.startswith("class Node:\n") and "def value(node):\n" in found.prompt
    assert len(found.asserts) == 3 and kind(found, "    return node.v") == "passed"
    assert kind(found, "    return 3") == "wrong value"


def test_mbpp_as_it_is_published():
    for row in rows("mbpp"):
        found = from_mbpp(row)
        assert kind(found, found.solution) == "passed" and kind(found, "    return x") == "wrong value"


@pytest.mark.parametrize("tests", [["assert other(1) == 2"], ["assert marked(aid('a')) == []"]])
def test_which_function_is_asked_for_must_be_clear(tests):
    with pytest.raises(ValueError, match="mbpp 7"):
        from_mbpp(ROW | {"test_list": tests})


@pytest.mark.skipif("KVLIB_DATA" not in os.environ, reason="KVLIB_DATA names no folder with the real files")
@pytest.mark.parametrize("load", [humaneval, mbpp])
def test_real_references_pass(load):
    found = load()
    assert len(found) in (164, 500)
    for problem in found[::20]:
        assert kind(problem, problem.solution + "\n") == "passed"
        assert kind(problem, "    pass\n") in ("wrong value", "other error")
