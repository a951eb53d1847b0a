"""Answers the tasks by reading the prompt, knowing nothing of how it was made."""

import json
import re
from functools import cache
from itertools import permutations
from pathlib import Path

HELDOUT = Path(__file__).parents[1] / "data" / "heldout" / "code.jsonl"
APART = 16  # lines between an identifier that is completed and its last use in the same file


def answer_of(prompt: str) -> str:
    """The answer to the question in the last line of `prompt`. Raises AssertionError unless there is exactly one."""
    start = prompt.rindex("\n", 0, -1) + 1  # a question may end in a newline of its own
    body, question = prompt[:start], prompt[start:]
    fitting = [(read, match) for form, read in FORMS.items() if (match := re.fullmatch(form, question))]
    assert len(fitting) == 1, f"{question!r} has {len(fitting)} of the known forms"
    read, match = fitting[0]
    return read(body, *match.groups())


def all_of(pattern: str, text: str) -> list:
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, f"{pattern} does not match"
    return found


def only(pattern: str, text: str):
    found = all_of(pattern, text)
    assert len(found) == 1, f"{pattern} matches {len(found)} times"
    return found[0]


def entries(body: str, table: str) -> list[tuple[str, str]]:
    """Keys and values of a dictionary, in order; nothing else may stand in it."""
    lines = only(rf"^{table} = \{{\n((?:    .*\n)*)\}}$", body).splitlines()
    return [re.fullmatch(r'    "(\w+)": (\d+),', line).groups() for line in lines]


def dict_value(body: str, table: str, key: str) -> str:
    (value,) = [value for k, value in entries(body, table) if k == key]
    return value


def assignments(body: str, table: str) -> str:
    pairs = entries(body, table)
    assert len(dict(pairs)) == len(pairs)
    return "\n".join(f"{key} = {value}" for key, value in pairs)


def returned(body: str, function: str) -> str:
    only(rf"^ *def ({function})\b", body)
    return only(rf"^def {function}\(\):\n    return (\d+)$", body)


def variable(body: str, name: str) -> str:
    """The last assignment counts; a constant, in capitals or annotated, has one only."""
    values = all_of(rf"^{name}(: int|) = (.*)$", body)
    assert all(value.isdigit() for _, value in values)
    assert len(values) == 1 or (name.islower() and not any(annotation for annotation, _ in values))
    return values[-1][1]


def through_another(body: str, name: str) -> str:
    """The variable is bound to another one, which was bound to a number before; both once."""
    first = only(rf"^{name} = ([a-z]+_[a-z]+)$", body)
    only(rf"^{name} = (.*)$", body), only(rf"^{first} = (.*)$", body)
    return f" {first} == " + only(rf"^{first} = (\d+)$", body[: body.index(f"\n{name} = {first}\n") + 1])


def sections(body: str) -> dict[str, str]:
    """The text of each file, by the name in its header line."""
    _, *parts = re.split(r"^# ([a-z]+_[a-z]+)\.py$", body, flags=re.MULTILINE)
    names, texts = parts[::2], parts[1::2]
    assert len(set(names)) == len(names) >= 2
    return dict(zip(names, texts))


def attribute(body: str, file: str, name: str) -> str:
    return only(rf"^{name} = (\d+)$", sections(body)[file])


def module(body: str, function: str) -> str:
    (file,) = [f for f, text in sections(body).items() if re.search(rf"^def {function}\(\):$", text, re.MULTILINE)]
    only(rf"^def ({function})\(\):$", body)
    return f'{file}"'


def collected(body: str, name: str) -> str:
    return ", ".join(all_of(rf"^{name}\.append\((\d+)\)$", body)) + "]"


def exported(body: str, register: str) -> str:
    assert not re.search(rf"^(def|class) {register}\b|^{register} =", body, re.MULTILINE)
    return '", "'.join(all_of(rf"^@{register}\.add\ndef (\w+)\(\):$", body)) + '"]'


def counted(body: str, event: str) -> str:
    return str(len(all_of(rf'^log\.append\("{event}"\)$', body)))


def labelled(body: str, adjective: str, noun: str) -> str:
    """A first word always has the same label, and is shown with it more than once."""
    labels, shown = {}, all_of(r'^assert kind\("([a-z]+)_([a-z]+)"\) == "(\w+)"$', body)
    for first, second, label in shown:
        assert (first, second) != (adjective, noun), "the answer itself is shown"
        labels.setdefault(first, []).append(label)
    assert all(len(set(said)) == 1 and len(said) >= 2 for said in labels.values())
    return labels[adjective][0] + '"'


def ways(parts: tuple[str, ...], written: str) -> set[tuple[str, ...]]:
    """How `written` can be read as some of the parts with a mark between them: (indices of the parts ..., mark)."""
    return {
        (*order, mark)
        for size in (2, 3)
        for order in permutations(range(3), size)
        for mark in re.findall(r"[^a-z0-9]", written)
        if mark.join(parts[i] for i in order) == written
    }


def way(body: str, function: str) -> tuple[str, ...]:
    shots = all_of(rf'^assert {function}\("([a-z]+)_([a-z]+)", (\d+)\) == "(.*)"$', body)
    assert len(shots) >= 1
    (found,) = set.intersection(*(ways(parts, written) for *parts, written in shots))
    return found


def transformed(body: str, function: str, *parts: str) -> str:
    assert f'{function}("{parts[0]}_{parts[1]}"' not in body
    *order, mark = way(body, function)
    return mark.join(parts[i] for i in order) + '"'


def in_shown_syntax(body: str, word: str, left: str, name: str, right: str, arrow: str) -> str:
    """The solved questions agree with the constants, and the question is in their syntax."""

    def value(constant: str) -> str:
        return only(rf"^{constant} = (\d+)$", body)

    form = f"{re.escape(left)}(\\w+){re.escape(right)} {re.escape(arrow)}"
    shots = all_of(rf"^# {word}{form} ([^\d\n]?)(\d+)([^\d\n]?)$", body)
    assert all(value(constant) == answer and constant != name for constant, _, answer, _ in shots)
    ((before, after),) = {(before, after) for _, before, _, after in shots}
    return f" {before}{value(name)}{after}"


FORMS = {
    r'assert (\w+)\["(\w+)"\] == ': dict_value,
    r"# (\w+) as assignments\n": assignments,
    r"assert (\w+)\(\) == ": returned,
    r"assert (\w+) == ": variable,
    r"assert (\w+) is": through_another,
    r"assert (\w+)\.(\w+) == ": attribute,
    r'assert (\w+)\.__module__ == "': module,
    r"assert (\w+) == \[": collected,
    r'assert (\w+)\.names == \["': exported,
    r'assert log\.count\("(\w+)"\) == ': counted,
    r'assert kind\("([a-z]+)_([a-z]+)"\) == "': labelled,
    r'assert (\w+)\("([a-z]+)_([a-z]+)", (\d+)\) == "': transformed,
    r"# (\w+)(\W)(\w+)(\W) (\S+)": in_shown_syntax,
}


@cache
def heldout() -> dict[str, dict]:
    """The shipped files by their paths."""
    return {row["file"]: row for row in map(json.loads, HELDOUT.open())}


def check_code(task: str, prompt: str, answer: str) -> str:
    """Raises AssertionError unless the answer completes an identifier that can be known from the prompt.

    Returns the identifier.
    """
    typed = re.search(r"\w+$", prompt)[0]
    word, body = typed + answer, prompt[: -len(typed)]
    whole = re.compile(rf"(?<!\w){word}(?!\w)")
    assert len(typed) >= 3 and len(answer) >= 2 and re.fullmatch(r"[A-Za-z_]{8,}", word)
    assert re.search(r"[A-Za-z]_[A-Za-z]|[a-z][A-Z]", word), f"{word} could be a word of prose"
    assert sum(word in row["text"] and whole.search(row["text"]) is not None for row in heldout().values()) <= 3
    if task == "completion":
        file, before = ends_in_a_file(body, word)
        uses = [match.start() for match in whole.finditer(body)]
        assert uses, f"{word} does not occur in the prompt"
        assert body.count("\n", uses[-1]) >= APART, f"{word} has just been used"
        assert whole.search(before), f"{word} is new in {file}"
        return word
    first, second = (m for m in re.finditer(r"^# (\S+\.py)\n", prompt, re.MULTILINE) if m[1] in heldout())
    source, here = heldout()[first[1]], heldout()[second[1]]
    assert first.start() == 0 and source is not here and source["distribution"] == here["distribution"]
    shown, after = body[first.end() : second.start()], body[second.end() :]
    lines = [line for line in shown.split("\n") if whole.search(line)]
    assert lines and lines[0] in source["text"], f"{word} does not occur in the other file"
    file, before = ends_in_a_file(after, word)
    assert file == second[1] and not whole.search(before)
    return word


def ends_in_a_file(body: str, word: str) -> tuple[str, str]:
    """The held-out file that goes on with `word`, a whole identifier, after `body`, and its text up to there.

    `body` may start in a file further up; the last file stands above the first one.
    """
    joined, starts = everything()
    found, at = [], joined.find(body + word, len(joined) // 2 - len(body))
    while at >= 0:
        end = at + len(body) + len(word)
        found += [end - len(word)] * (not re.match(r"\w", joined[end]))
        at = joined.find(body + word, at + 1)
    assert len(found) == 1, f"held-out code has {len(found)} such places"
    start, file = max((start, file) for start, file in starts if start <= found[0])
    return file, joined[start : found[0]]


@cache
def everything() -> tuple[str, list[tuple[int, str]]]:
    """All held-out files one after another, twice, and where each starts."""
    joined, starts = "", []
    for file, row in [*heldout().items()] * 2:
        starts.append((len(joined), file))
        joined += row["text"] + "\n"
    return joined, starts
