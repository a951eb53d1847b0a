"""The task catalogue: one way to draw a prompt of any family, `sample`, and to score what a model writes, `score`.

`FAMILIES`: fourteen families in the six groups of LongBench, for the embedded models. A task states facts (assignments,
dictionary entries, functions) among lines of real source code and asks about them at the end: `assert blue_river == `
wants `48213`. Everything is drawn from a seed. Training and test samples share no name, no value and no filler text, so
a right answer was read from the prompt. Two of them complete identifiers of real code instead.

`NATURAL`: families in natural language, for other models; those that passed the pilot (`kvlib.lab.tasks.natural`).

`DROPPED`: two more of the first kind, with which the models were trained or tested, but that are in no mean. The answer
of `count` is a digit, chosen before anything is evicted; `override` the models answer worse than somebody who guesses.

`PROBES` and `COMPLETIONS` (of whole lines) stand beside the families, `LABEL_FREE` has no answer that is right;
`DISTANT` is one probe at each of its distances, `WRITTEN` functions that are run. `UNBROKEN` are lines and bits behind
prompts that end before the newline. `SPELLED` is a needle in fewer tokens. `BOOKS` need files of others.
"""

from kvlib.lab.tasks import single_document, multi_document, aggregation, few_shot, synthetic, code, probes, completions  # noqa: F401, I001
from kvlib.lab.tasks import natural, unbroken, written  # noqa: F401
from kvlib.lab.tasks.catalogue import CATALOGUE, GROUPS, Family, find
from kvlib.lab.tasks.composing import Draft, Filler, compose, filler
from kvlib.lab.tasks.natural.passed import PASSED
from kvlib.lab.tasks.planted import SHORTEST, draft
from kvlib.lab.tasks.prompt import Prompt
from kvlib.lab.tasks.sampling import sample
from kvlib.lab.tasks.scoring import judge, new_tokens, score
from kvlib.lab.tasks.words import Draw


def of_group(*groups: str) -> dict[str, Family]:
    return {name: family for name, family in CATALOGUE.items() if family.group in groups}


DROPPED = {name: find(name) for name in ("count", "override")}
FAMILIES = {name: family for name, family in of_group(*GROUPS).items() if name not in {*natural.FAMILIES, *DROPPED}}
NATURAL = {name: find(name) for name in PASSED}
PROBES, COMPLETIONS, LABEL_FREE = of_group("probe"), of_group("completion"), of_group("label-free")
DISTANT, WRITTEN, UNBROKEN = of_group("distance"), of_group("function"), of_group("unbroken")
SPELLED, BOOKS = of_group("spelling"), of_group("book")

__all__ = [
    "BOOKS", "CATALOGUE", "COMPLETIONS", "DISTANT", "DROPPED", "FAMILIES", "GROUPS", "LABEL_FREE", "NATURAL", "PROBES",
    "SHORTEST", "SPELLED", "UNBROKEN", "WRITTEN", "Draft", "Draw", "Family", "Filler", "Prompt", "compose", "draft",
    "filler", "find", "judge", "new_tokens", "sample", "score",
]  # fmt: skip
