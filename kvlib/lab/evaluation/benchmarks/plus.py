"""HumanEval+: problems of HumanEval whose solutions are compared with the reference on many more inputs.

Source: `evalplus/eval/__init__.py` and `evalplus/evaluate.py` of evalplus/evalplus (Apache 2.0), commit 26d6d00: what
is equal, and how close numbers must be. The columns of the file are those of `evalplus/data/humaneval.py`; the file
itself has not been seen from here. The code is ours.

Departures: the reference runs in the same process as the solution, both within limits for all inputs together, of time
and memory, there for every input 4 seconds or four times the reference's time, and 4 GB; lists inside of lists must be
as long as the reference's, where numpy stretches them.
"""

import json

from kvlib.lab.functions.problems import Problem

ROOT_FINDER = "find_zero"  # has many right answers: the polynomial must vanish there
CHECK = '''
def close(found, wanted, most):
    """Numbers at most `most` + 1e-7 of the wanted one apart, one by one in lists; NaN is close to nothing."""
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(wanted) and all(
            close(*pair, most) for pair in zip(found, wanted))
    numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
    return numbers and (found == wanted or abs(found - wanted) <= most + 1e-7 * abs(wanted) < float("inf"))

def floats(wanted):
    """Whether it is a float, or a list or tuple of nothing else."""
    if isinstance(wanted, (list, tuple)):
        return len(wanted) > 0 and all(isinstance(each, float) for each in wanted)
    return isinstance(wanted, float)

def check(text, reference, name, root_finder, most):
    import json
    known = {}
    exec(reference, known)
    for first, second in zip(json.loads(text), json.loads(text)):  # either may change its arguments
        found = globals()[name](*first)
        if name == root_finder:
            assert abs(known["poly"](*second, found)) <= most
            continue
        wanted = known[name](*second)
        if not most and floats(wanted):
            most = 1e-6  # from here on, as published
        assert found == wanted or most and type(found) is type(wanted) and close(found, wanted, most)
'''


def from_plus(row: dict) -> Problem:
    """A row of HumanEval+. Its two assertions are about the base inputs and about the further ones."""
    reference = row["prompt"] + row["canonical_solution"]
    base, plus = (
        f"check({json.dumps(row[inputs])!r}, {reference!r}, {row['entry_point']!r}, {ROOT_FINDER!r}, {row['atol']!r})"
        for inputs in ("base_input", "plus_input")
    )
    return Problem(row["entry_point"], row["prompt"], row["canonical_solution"].rstrip(), (CHECK + base, plus))
