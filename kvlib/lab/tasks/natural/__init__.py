"""Tasks in natural language, for any instruction-tuned or base model: facts among the sentences of a novel.

A family draws a task from a seed: facts, a question, how the answer begins, and the answers. They are put into a text,
in the model's chat format if it has one. Answers stand at all depths, evenly, but never in the first 32 or the last 64
tokens of the context, which methods keep whatever is asked. `FAMILIES` are all that the pilot tried.
"""

from kvlib.lab.tasks.catalogue import CATALOGUE, GROUPS
from kvlib.lab.tasks.natural import books, facts, label_free, lists, memory, needles, programs, spelled  # noqa: F401
from kvlib.lab.tasks.natural.composing import in_code, in_prose
from kvlib.lab.tasks.natural.texts import Text, novel, prose, sentences

FAMILIES = {
    name: family for name, family in CATALOGUE.items() if family.draw in (in_code, in_prose) and family.group in GROUPS
}

__all__ = ["FAMILIES", "Text", "novel", "prose", "sentences"]
