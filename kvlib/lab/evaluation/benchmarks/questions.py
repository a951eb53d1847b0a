"""Samples of the benchmarks as questions: what a model reads, by the official prompts, and how its answer is judged.

Tasks: "longbench/qasper" and the like, "longbench/qasper_e" of LongBench-E, "longbench-v2", "ruler/vt" and the like,
"humaneval", "humaneval+", "mbpp". The last three run what the model has written, in a process with limits
(`kvlib.lab.functions.run`), which holds accidents off and not attacks.
"""

from dataclasses import dataclass, replace
from functools import partial

from kvlib.lab.evaluation import metrics
from kvlib.lab.evaluation.benchmarks import choices, load, programs, ruler
from kvlib.lab.evaluation.benchmarks.longbench import LONGBENCH, cut_middle, longbench_settings
from kvlib.nearest import unknown

TEMPLATE_ROOM = 64  # tokens that a chat template may add; Llama 3.1's adds 36
RULER_SAMPLES = 100  # published are 500: `scripts/config_tasks.sh` of NVIDIA/RULER
TASKS = (
    *(f"longbench/{name}" for name in LONGBENCH),
    *(f"longbench/{name}_e" for name, task in LONGBENCH.items() if task.samples_e),
    "longbench-v2",
    *(f"ruler/{name}" for name in ruler.TASKS),
    *programs.TASKS,
)


@dataclass(frozen=True)
class Question:
    """One sample.

    prompt: what the user says if `chat`, and the model has a chat template; else plain text. lead: how the answer
    begins. max_new_tokens: its most tokens. judge: text of the answer -> score from 0 to 1, with arguments that JSON
    can write. ends: texts that end the answer, behind its leading newlines.
    """

    prompt: str
    lead: str
    max_new_tokens: int
    chat: bool
    judge: partial
    ends: tuple[str, ...] = ()


def questions(task: str, tokenizer, length: int, window: int | None, samples: int | None = None) -> list[Question]:
    """The first samples of a task.

    Args:
        task: one of `TASKS`. samples: at most so many; None: all, of RULER `RULER_SAMPLES`.
        length: the most tokens of a prompt, of RULER of prompt and answer. LongBench's prompts lose their middle,
            functions are asked whole.
        window: the model's, into which prompt, answer and `TEMPLATE_ROOM` must go; None: it is not known.

    Raises:
        ValueError: for an unknown task, or if RULER's length exceeds the window.
        Others: as of `load`.
    """
    if task not in TASKS:
        raise unknown("benchmark", task, TASKS)
    group, _, name = task.partition("/")
    room = None if window is None else window - TEMPLATE_ROOM
    if group == "ruler":
        if window is not None and length > window:
            raise ValueError(f"length={length}: the model's window is {window} tokens")
        return [from_ruler(name, length, seed, tokenizer) for seed in range(samples or RULER_SAMPLES)]
    rows = load(task)[:samples]
    if group in programs.TASKS:
        examples = load(task, "prompt") if task == "mbpp" else ()
        return [from_program(each) for each in programs.programs(task, rows, examples)]
    if group == "longbench":
        plain = name.removesuffix("_e")
        setting, chat = longbench_settings()[plain], LONGBENCH[plain].chat
        asked = [
            Question(
                setting.template.format(**row), "", setting.max_new_tokens, chat,
                partial(metrics.score, plain, answers=list(row["answers"]), classes=row["all_classes"]),
                ("\n",) if plain == "samsum" else (),
            )
            for row in rows
        ]  # fmt: skip
    else:
        asked = [
            Question(
                choices.prompt(row), "", choices.MAX_NEW_TOKENS, True, partial(choices.score, answer=row["answer"])
            )
            for row in rows
        ]
    return [shortened(question, length, room, tokenizer) for question in asked]


def shortened(question: Question, length: int, room: int | None, tokenizer) -> Question:
    """Without the middle of a long prompt."""
    limit = length if room is None else min(length, room - question.max_new_tokens)
    if limit < 2:
        raise ValueError(f"an answer of {question.max_new_tokens} tokens leaves no room for a prompt")
    return replace(question, prompt=cut_middle(question.prompt, limit, tokenizer))


def from_ruler(name: str, length: int, seed: int, tokenizer) -> Question:
    made = ruler.sample(name, length, seed, tokenizer, TEMPLATE_ROOM if tokenizer.chat_template else 0)
    return Question(made.prompt, made.lead, made.max_new_tokens, True, partial(ruler.score, answers=made.answers))


def from_program(program: programs.Program) -> Question:
    """A program to be written, judged by pass@1 of greedy decoding; no chat, as for models that complete text."""
    judge = partial(programs.passed, above=program.above, asserts=program.asserts, ends=program.ends)
    return Question(program.prompt, "", programs.MAX_NEW_TOKENS, False, judge, program.ends)
