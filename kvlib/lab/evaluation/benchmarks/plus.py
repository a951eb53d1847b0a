"""HumanEval+ and MBPP+: problems whose solutions are compared with the reference on many more inputs.

Source: `evalplus/eval/__init__.py`, `evalplus/eval/_special_oracle.py` and `evalplus/evaluate.py` of evalplus/evalplus
(Apache 2.0), commit 26d6d00: what is equal, and how close numbers must be; `evalplus/data/mbpp.py`: which inputs of
MBPP+ are tuples, sets or complex numbers, which JSON does not tell from lists. The columns of the files are those of
`evalplus/data/humaneval.py` and `mbpp.py`; the files themselves have not been seen from here. The code is ours.

Departures: the reference runs in the same process as the solution, both within limits for all inputs together, of time
and memory, there for every input 4 seconds or four times the reference's time, and 4 GB; lists inside of lists must be
as long as the reference's, where numpy stretches them.
"""

from kvlib.lab.functions.problems import Problem

ROOT_FINDER = "find_zero"  # has many right answers: the polynomial must vanish there
# The names end in _plus, since solutions may have functions `check` and `close` of their own.
CHECK = '''
def close_plus(found, wanted, most):
    """Numbers at most `most` + 1e-7 of the wanted one apart, one by one in lists; NaN is close to nothing."""
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(wanted) and all(
            close_plus(*pair, most) for pair in zip(found, wanted))
    numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
    return numbers and (found == wanted or abs(found - wanted) <= most + 1e-7 * abs(wanted) < float("inf"))

def floats_plus(wanted):
    """Whether it is a float, or a list or tuple of nothing else."""
    if isinstance(wanted, (list, tuple)):
        return len(wanted) > 0 and all(isinstance(each, float) for each in wanted)
    return isinstance(wanted, float)

def check_plus(inputs, reference, name, root_finder, most, equal):
    import math
    known, special = {}, {"inf": math.inf, "nan": math.nan}
    exec(reference, known)
    for first, second in zip(eval(inputs, dict(special)), eval(inputs, dict(special))):  # either may change its own
        found = globals()[name](*first)
        if name == root_finder:
            assert abs(known["poly"](*second, found)) <= most
            continue
        wanted = known[name](*second)
        same = eval(equal, {"math": math, "found": found, "wanted": wanted, "given": first, "most": most})
        if not most and floats_plus(wanted):
            most = 1e-6  # from here on, as published
        assert same or most and type(found) is type(wanted) and close_plus(found, wanted, most)
'''
EQUAL = "found == wanted"
DIGITS = "*(str(number).zfill(max(len(str(each)) for each in given)) for number in given)"
RULES = {  # of MBPP+: what counts as equal besides, by the name of the function
    "are_equivalent": "True",
    "sum_div": f"{EQUAL} or found == 0",
    "surface_Area": f"{EQUAL} or abs(found - round(given[0] ** 2 + 2 * given[0] * math.hypot(given[0] / 2, given[1]))) "
    "<= most",
    "digit_distance_nums": f"{EQUAL} or found == sum(abs(int(a) - int(b)) for a, b in zip({DIGITS}))",
    **dict.fromkeys(
        (
            "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
            "intersection_array", "find_dissimilar", "Diff",
        ),
        "set(found) == set(wanted)",
    ),
    **dict.fromkeys(
        ("check_str", "text_match_three", "text_starta_endb"),
        "(found if isinstance(found, bool) else found is not None) == (wanted is not None)",
    ),
}  # fmt: skip


def rows(given: list) -> list[tuple]:
    return [tuple(each) for each in given]


def tuples(given):
    """Lists, and those in them, as tuples."""
    return tuple(map(tuples, given)) if isinstance(given, list) else given


ARGUMENTS = {  # numbers of problems of MBPP+ -> what is done with the arguments that JSON gives
    (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809): (
        lambda *given: map(tuple, given)
    ),
    (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780): lambda *given: map(rows, given),
    (75, 413, 444, 753): lambda first, second: (rows(first), second),
    (106, 750): lambda first, second: (first, tuple(second)),
    (115,): lambda first: ([set(each) if isinstance(each, list) and each else {} for each in first],),
    (124,): lambda first, second: (float(first), complex(second)),
    (250, 307, 405, 446, 617, 720, 763, 808): lambda first, *others: (tuple(first), *others),
    (252,): lambda first: (complex(first),),
    (259, 401, 445): lambda *given: (tuple(rows(each)) for each in given),
    (278,): lambda first: (tuple(tuple(each) if isinstance(each, list) else each for each in first),),
    (580, 615, 791): lambda *given: map(tuples, given),
    (722,): lambda first, *others: ({name: tuple(each) for name, each in first.items()}, *others),
}


def arguments(task_id: str, inputs: list[list]) -> list[list]:
    """The inputs of a problem as its functions take them."""
    name, _, number = task_id.partition("/")
    convert = next((change for known, change in ARGUMENTS.items() if int(number) in known), None)
    return [list(convert(*each)) for each in inputs] if name == "Mbpp" and convert else inputs


def from_plus(row: dict) -> Problem:
    """A row of HumanEval+ or MBPP+. Its two assertions are about the base inputs and about the further ones."""
    reference, name, of_mbpp = row["prompt"] + row["canonical_solution"], row["entry_point"], row["task_id"][0] == "M"
    equal = RULES.get(name, EQUAL) if of_mbpp else EQUAL
    base, plus = (
        f"check_plus({str(arguments(row['task_id'], row[inputs]))!r}, {reference!r}, {name!r}, {ROOT_FINDER!r}, "
        f"{row['atol']!r}, {equal!r})"
        for inputs in ("base_input", "plus_input")
    )
    return Problem(name, row["prompt"], row["canonical_solution"].rstrip(), (CHECK + base, plus))
