"""HumanEval+: problems of HumanEval whose solutions are compared with the reference on many more inputs.

Source: the files of evalplus (Apache 2.0) and the comparison of `evalplus/eval`; the code is ours. Departures: the
reference runs in the same process as the solution, both within limits for all inputs together instead of one by one.
"""

import json

from kvlib.lab.functions.problems import Problem

ROOT_FINDER = "find_zero"  # has many right answers: the polynomial must vanish there
CHECK = '''
def same(found, wanted, most):
    """Equal, or numbers at most `most` + 1e-7 of the wanted one apart, one by one."""
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        if found == wanted or found != found and wanted != wanted:
            return True
        return abs(found - wanted) <= most + 1e-7 * abs(wanted)
    if isinstance(wanted, (list, tuple)):
        return type(found) is type(wanted) and len(found) == len(wanted) and all(
            same(*pair, most) for pair in zip(found, wanted))
    return found == wanted

def check(text, reference, name, root_finder, most):
    import json
    known = {}
    exec(reference, known)
    for first, second in zip(json.loads(text), json.loads(text)):  # either may change its arguments
        found = globals()[name](*first)
        if name == root_finder:
            assert abs(known["poly"](*second, found)) <= most
        else:
            assert same(found, known[name](*second), most)
'''


def from_plus(row: dict) -> Problem:
    """A row of HumanEval+ with its base and further inputs; an `atol` of 0 is 1e-6 for floats, as published."""
    inputs = json.dumps([*row["base_input"], *row["plus_input"]])
    reference = row["prompt"] + row["canonical_solution"]
    call = f"check({inputs!r}, {reference!r}, {row['entry_point']!r}, {ROOT_FINDER!r}, {row['atol'] or 1e-6!r})"
    return Problem(row["entry_point"], row["prompt"], row["canonical_solution"].rstrip(), (CHECK + call,))
