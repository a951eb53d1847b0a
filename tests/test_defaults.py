"""The table of defaults says what the classes have."""

import dataclasses
import re
from pathlib import Path

import pytest

import kvlib

PAGE = (Path(kvlib.__file__).parent / "methods" / "README.md").read_text()
LINES = re.finditer(r"^\| `(\w+)` \|.*$", PAGE, re.M)
ROWS = {line[1]: [cell.strip() for cell in line[0].strip("|").split("|")] for line in LINES}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_what_the_page_calls_ours_is_ours(name):
    fields = {field.name: field.default for field in dataclasses.fields(kvlib.METHODS[name])}
    for argument, value in re.findall(r"`(\w+)=([^`]+)`", ROWS[name][-1]):
        assert repr(fields[argument]) == value.replace('"', "'")


def test_methods_with_settings_are_on_the_page():
    set_by = {name for name, cls in kvlib.METHODS.items() if len(dataclasses.fields(cls)) > 1}
    controls = {"random", "forced_sinks", "exact_error"}
    assert {name for name in set_by if kvlib.METHODS[name].__module__.startswith("kvlib.methods")} <= controls | {*ROWS}
    assert all(len(row) == 5 and all(row) for row in ROWS.values())
