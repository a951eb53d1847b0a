"""The task catalogue: sixteen families in the six groups of LongBench, two probes, and two that complete lines of code.

A task states facts (assignments, dictionary entries, functions) among lines of real source code and asks about them at
the end: `assert blue_river == ` wants `48213`. Everything is drawn from a seed. Training and test samples share no
name, no value and no filler text, so a right answer was read from the prompt. Two families complete identifiers of real
code instead, and `COMPLETIONS` whole lines of it.

Scoring: an answer is right when the text that is generated starts with it and it ends there (`correct`). A line that is
completed is compared with the answer as LongBench does it.
"""

from kvlib.lab.tasks import single_document, multi_document, aggregation, few_shot, synthetic, code, probes, completions  # noqa: F401, I001
from kvlib.lab.tasks.catalogue import CATALOGUE, GROUPS, REAL_CODE, SHORTEST, Draft, Family, Sample, find
from kvlib.lab.tasks.composing import Filler, compose, filler
from kvlib.lab.tasks.sampling import correct, draft, ends, judge, sample, share_of_lines
from kvlib.lab.tasks.words import Draw

FAMILIES = {name: family for name, family in CATALOGUE.items() if family.group in GROUPS}
PROBES = {name: family for name, family in CATALOGUE.items() if family.group == "probe"}
NATURAL: dict[str, Family] = {}  # families in natural language
COMPLETIONS = {name: family for name, family in CATALOGUE.items() if family.group == "completion"}

__all__ = [
    "CATALOGUE", "COMPLETIONS", "FAMILIES", "GROUPS", "NATURAL", "PROBES", "REAL_CODE", "SHORTEST", "Draft", "Draw",
    "Family", "Filler", "Sample", "compose", "correct", "draft", "ends", "filler", "find", "judge", "sample",
    "share_of_lines",
]  # fmt: skip
