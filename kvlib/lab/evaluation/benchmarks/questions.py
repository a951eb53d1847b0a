"""Samples of the benchmarks as questions: what a model reads, by the official prompts, and how its answer is judged.

Tasks: "longbench/qasper" and the like, "longbench/qasper_e" of LongBench-E, "longbench-v2", "ruler/vt" and the like,
"humaneval", "humaneval+", "mbpp", "mbpp+". The last four run what the model has written, in a process with limits
(`kvlib.lab.functions.run`), which holds accidents off and not attacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvlib.lab.evaluation import metrics
from kvlib.lab.evaluation.benchmarks import choices, programs, ruler
from kvlib.lab.evaluation.benchmarks.loading import digest, load
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH, cut_middle, longbench_settings
from kvlib.lab.evaluation.benchmarks.registry import BENCHMARKS
from kvlib.lab.functions import child
from kvlib.nearest import unknown

TEMPLATE_ROOM = 64  # tokens that a chat template may add; Llama 3.1's adds 36


@dataclass(frozen=True)
class Question:
    """One sample.

    prompt: what the user says if `chat`, and the model has a chat template; else plain text. lead: how the answer
    begins. max_new_tokens: its most tokens. judge: text of the answer -> score from 0 to 1. ends: texts that end the
    answer, behind its leading newlines.
    """

    prompt: str
    lead: str
    max_new_tokens: int
    chat: bool
    judge: Callable[[str], float]
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark's task, for a `kvlib.lab.results.study.Study` what a `kvlib.lab.tasks.Family` is of made-up ones.

    read: () -> all that its questions are made of beside the tokenizer, as JSON can write it. ask: (that, numbers of
        samples, tokenizer, length, window) -> their questions.
    samples: how many there are. outside: what judges answers in a process of its own, where no name leads.
    """

    read: Callable[[], object]
    ask: Callable[..., list[Question]]
    samples: float
    outside: tuple[Callable, ...] = ()
    metric = "published"

    @property
    def functions(self) -> tuple[Callable, ...]:
        """What questions and their scores follow from beside the data."""
        return self.ask, *self.outside

    def source(self) -> str:
        """The sha256 of the data. Errors as of `kvlib.lab.evaluation.benchmarks.load`."""
        return digest(self.read)


# Filled below, not here: what finds a task (`kvlib.lab.definitions`) should not follow from all others.
TASKS: dict[str, Task] = {}


def find(task: str) -> Task:
    """The task of that name. Raises ValueError with the nearest name."""
    if task not in TASKS:
        raise unknown("benchmark", task, TASKS)
    return TASKS[task]


def read_longbench(name: str) -> dict:
    """Of LongBench or, as in "qasper_e", LongBench-E."""
    plain, rows = name.removesuffix("_e"), load(f"longbench/{name}")
    return {"task": plain, "rows": rows, **vars(longbench_settings()[plain])}


def ask_longbench(data: dict, samples: Sequence[int], tokenizer, length: int, window: int | None) -> list[Question]:
    """Prompts lose their middle to have at most `length` tokens, and to leave room in the window."""
    task, asked = data["task"], []
    for row in map(data["rows"].__getitem__, samples):
        judge = partial(metrics.score, task, answers=row["answers"], classes=row["all_classes"])
        ends = ("\n",) if task == "samsum" else ()
        prompt, chat = data["template"].format(**row), LONGBENCH[task].chat
        asked.append(
            shortened(Question(prompt, "", data["max_new_tokens"], chat, judge, ends), length, window, tokenizer)
        )
    return asked


def ask_v2(data: list[dict], samples: Sequence[int], tokenizer, length: int, window: int | None) -> list[Question]:
    """Prompts are shortened as those of LongBench."""
    asked = []
    for row in map(data.__getitem__, samples):
        judge = partial(choices.score, answer=row["answer"])
        question = Question(choices.prompt(row), "", choices.MAX_NEW_TOKENS, True, judge)
        asked.append(shortened(question, length, window, tokenizer))
    return asked


def shortened(question: Question, length: int, window: int | None, tokenizer) -> Question:
    """Without the middle of a long prompt: it, its answer and `TEMPLATE_ROOM` go into the window."""
    limit = length if window is None else min(length, window - TEMPLATE_ROOM - question.max_new_tokens)
    if limit < 2:
        raise ValueError(f"an answer of {question.max_new_tokens} tokens leaves no room for a prompt")
    return replace(question, prompt=cut_middle(question.prompt, limit, tokenizer))


def read_ruler(name: str) -> dict:
    read = ruler.TASKS[name].read
    return {"task": name, "text": read and read()}


def ask_ruler(data: dict, samples: Sequence[int], tokenizer, length: int, window: int | None) -> list[Question]:
    """Prompts and answers of `length` tokens. Raises ValueError if that exceeds the window."""
    if window is not None and length > window:
        raise ValueError(f"length={length}: the model's window is {window} tokens")
    room, judge = TEMPLATE_ROOM if tokenizer.chat_template else 0, ruler.TASKS[data["task"]].score
    made = (ruler.sample(data["task"], length, seed, tokenizer, room, data["text"]) for seed in samples)
    return [Question(s.prompt, s.lead, s.max_new_tokens, True, partial(judge, answers=s.answers)) for s in made]


def read_programs(name: str) -> dict:
    return {"task": name, "rows": load(name), "examples": load(name, "prompt") if name == "mbpp" else []}


def ask_programs(data: dict, samples: Sequence[int], tokenizer, length: int, window: int | None) -> list[Question]:
    """Programs to be written, whole whatever the length; no chat, as for models that complete text."""
    rows = [data["rows"][number] for number in samples]
    return [
        Question(
            each.prompt, "", programs.MAX_NEW_TOKENS, False,
            partial(programs.passed, above=each.above, asserts=each.asserts, ends=each.ends), each.ends,
        )
        for each in programs.programs(data["task"], rows, data["examples"])
    ]  # fmt: skip


def rows_of(name: str) -> int:
    return BENCHMARKS[name].files["test"].rows


TASKS.update(
    {
        name: Task(partial(read_longbench, name.partition("/")[2]), ask_longbench, rows_of(name))
        for name in BENCHMARKS
        if name.startswith("longbench/")
    }
)
TASKS["longbench-v2"] = Task(partial(load, "longbench-v2"), ask_v2, rows_of("longbench-v2"))
TASKS.update(
    {f"ruler/{name}": Task(partial(read_ruler, name), ask_ruler, made.samples) for name, made in ruler.TASKS.items()}
)
TASKS.update(
    {name: Task(partial(read_programs, name), ask_programs, rows_of(name), (child.main,)) for name in programs.TASKS}
)
