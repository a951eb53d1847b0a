"""Tasks in natural language, for any instruction-tuned or base model: facts among the sentences of a novel.

A family (`FAMILIES`) draws a task from a seed: facts, a question, how the answer begins, and the answers. `sample` puts
it into a text, in the model's chat format if it has one. Answers stand at all depths, evenly, but never in the first 32
or the last 64 tokens of the context, which methods keep whatever is asked.
"""

from kvlib.lab.tasks.natural import facts, lists, memory, needles, programs  # noqa: F401
from kvlib.lab.tasks.natural.composing import Prompt, sample
from kvlib.lab.tasks.natural.family import FAMILIES, Family, find
from kvlib.lab.tasks.natural.scoring import judge, new_tokens, score
from kvlib.lab.tasks.natural.texts import Text, novel, prose, sentences

__all__ = [
    "FAMILIES", "Family", "Prompt", "Text", "find", "judge", "new_tokens", "novel", "prose", "sample", "score",
    "sentences",
]  # fmt: skip
