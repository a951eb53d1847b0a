"""HumanEval and MBPP as problems: their rows are read by `kvlib.lab.evaluation.benchmarks`."""

import ast
import textwrap

from kvlib.lab.evaluation import benchmarks
from kvlib.lab.functions.problems import Problem


def from_humaneval(row: dict) -> Problem:
    """A row as it is published; its test is one statement more than it has assertions."""
    name = row["entry_point"]
    test = f"{row['test']}\ncheck({name})\n"
    return Problem(name, row["prompt"], row["canonical_solution"].rstrip(), (test,))


def from_mbpp(row: dict) -> Problem:
    """A row in HumanEval's style, without examples of other problems, as AnchorCoder's authors ask it.

    The docstring has the task and the tests as examples; so a model sees what it is judged by. Imports and classes of
    the reference stand above the function; its other functions are for the model to write, and stand behind the body in
    `solution`. The reference is written anew from its syntax tree: published are bodies with tabs, and with any number
    of spaces, and these would not go together with the docstring's four.

    Raises:
        ValueError: if no function of the reference, or more than one, is called by all tests.
    """
    tests = [ast.parse(test.strip()).body[0] for test in row["test_list"]]
    code = ast.parse(row["code"]).body
    functions = {node.name: node for node in code if isinstance(node, ast.FunctionDef)}
    called = set(functions).intersection(*({n.id for n in ast.walk(t) if isinstance(n, ast.Name)} for t in tests))
    if len(called) != 1:
        raise ValueError(f"mbpp {row['task_id']}: the tests call {sorted(called) or 'no function'} of the reference")
    name = called.pop()

    above = [node for node in code if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]
    behind = [node for node in code if node not in above and node is not functions[name]]
    head = "".join(f"{ast.unparse(node)}\n" for node in above) + ("\n\n" if above else "")
    signature, _, body = ast.unparse(functions[name]).partition("\n")
    pairs = [(ast.unparse(test.test.left), ast.unparse(test.test.comparators[0])) for test in tests]
    examples = "".join(f">>> {call}\n{result}\n" for call, result in pairs)
    told = f"{row['text'].strip()}\n\n{examples}".replace("\\", "\\\\")
    docstring = textwrap.indent(f'"""{told}"""\n', "    ")
    return Problem(
        name,
        f"{head}{signature}\n{docstring}",
        "\n\n\n".join([body, *map(ast.unparse, behind)]),
        tuple(filter(None, [row["test_setup_code"], *map(str.strip, row["test_list"])])),
    )


def humaneval() -> list[Problem]:
    """The 164 problems. Errors as of `benchmarks.load`."""
    return [from_humaneval(row) for row in benchmarks.load("humaneval")]


def mbpp(split: str = "test") -> list[Problem]:
    """The 500 test problems, or those of another split. Errors as of `benchmarks.load`."""
    return [from_mbpp(row) for row in benchmarks.load("mbpp", split)]
