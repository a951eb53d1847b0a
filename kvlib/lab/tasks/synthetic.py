"""What long-context models are commonly probed with."""

from kvlib.lab.tasks.composing import Draft
from kvlib.lab.tasks.multi_document import files
from kvlib.lab.tasks.planted import family
from kvlib.lab.tasks.words import Draw

GROUP = "synthetic"


@family(GROUP, trained=True)
def needle(draw: Draw, tokens: int, depth: float | None = None) -> Draft:
    """One constant hidden in source code at `depth` (0 = first place for it, 1 = last), random when not given."""
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: between 0 and 1")
    (name,), (value,) = draw.names(1), draw.values(1)
    depth = draw.depth() if depth is None else float(depth)
    return Draft([(depth, f"{name.upper()} = {value}\n")], [(f"assert {name.upper()} == ", str(value))], {name})


@family(GROUP, trained=True)
def where_defined(draw: Draw, tokens: int) -> Draft:
    """Files with functions; asked for the file in which a function is defined."""
    headers, facts, spans = files(draw, tokens)
    each = 2 if tokens >= 256 else 1
    functions, values = draw.names(each * len(spans)), draw.values(each * len(spans))
    questions = []
    for i, (function, value) in enumerate(zip(functions, values)):
        file, start, end = spans[i // each]
        facts.append((draw.rng.uniform(start, end), f"\n\ndef {function}():\n    return {value}\n\n\n"))
        questions.append((f'assert {function}.__module__ == "', f'{file}"'))
    return Draft(facts, questions, {*headers, *functions})
