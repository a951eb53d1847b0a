"""Answers retrieval tasks by reading the prompt, knowing nothing of how it was made."""

import re


def answer_of(prompt: str) -> str:
    """The answer to the question at the end of `prompt`. Raises AssertionError unless there is exactly one."""
    body, question = prompt.rsplit("assert ", 1)
    if match := re.fullmatch(r'(\w+)\["(\w+)"\] == ', question):
        (table,) = re.findall(rf"^{match[1]} = \{{\n(.*?)^\}}$", body, re.MULTILINE | re.DOTALL)
        return only(rf'^    "{match[2]}": (\d+),$', table)
    if match := re.fullmatch(r"(\w+)\(\) == ", question):
        return only(rf"^def {match[1]}\(\):\n    return (\d+)$", body)
    name = re.fullmatch(r"(\w+) == ", question)[1]
    while not name.isdigit():
        bound = only(rf"^{name} = (\w+)$", body)
        body = body[: body.index(f"{name} = {bound}\n")]  # a variable is bound before another one uses it
        name = bound
    return name


def only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == 1, f"{pattern} matches {len(found)} times"
    return found[0]
