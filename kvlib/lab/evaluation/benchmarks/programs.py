"""HumanEval(+) and MBPP(+): what a model reads, where its answer ends, and what is run.

Source, HumanEval: the prompt without white space around it and what ends an answer are those of
`bigcode_eval/tasks/humaneval.py` in bigcode-project/bigcode-evaluation-harness (Apache 2.0), commit 8fc5bae; openai's
human-eval leaves both to its user. MBPP: `mbpp/README.md` of google-research/google-research, with tasks 2, 3 and 4 as
examples. MBPP+: prompt and endings are those that `evalplus/codegen.py` and `evalplus/provider/utility.py` have for
models that complete text, in evalplus/evalplus (Apache 2.0), commit 26d6d00.

Departures: greedy decoding, where the harness samples at a temperature of 0.2; 512 tokens of an answer, there of prompt
and answer together; HumanEval+ is asked as HumanEval is, while evalplus has other endings; evalplus allows 768 tokens,
puts MBPP+ into the template of a model that has one, and runs only what of an answer the function needs; StarCoder's
`<file_sep>` ends nothing. Not published, and ours: a blank line between MBPP's examples, "\\n" for their line ends, and
the most tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvlib.lab.evaluation.benchmarks.plus import from_plus
from kvlib.lab.functions import run
from kvlib.lab.functions.published import from_humaneval

MAX_NEW_TOKENS = 512
SECONDS, MEGABYTES = 20, 1024  # of CPU time and address space, for all inputs of a problem
ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
PLUS_ENDS = ('\n"""', "\nassert", "\nif __name__", "\ndef main(", "\nprint(", "<|endoftext|>", "<|endofmask|>", "</s>")
BEGIN, DONE = "[BEGIN]", "[DONE]"
EXAMPLES = (2, 3, 4)
COMPLETED = {"humaneval": from_humaneval, "humaneval+": from_plus}
TASKS = (*COMPLETED, "mbpp", "mbpp+")


@dataclass(frozen=True)
class Program:
    """A program to be written: what is read, what of it is run above the answer, what is run behind, what ends it."""

    prompt: str
    above: str
    asserts: tuple[str, ...]
    ends: tuple[str, ...]


def programs(task: str, rows: Sequence[dict], examples: Sequence[dict] = ()) -> list[Program]:
    """The programs of a task. examples: rows of MBPP's split "prompt"."""
    if task == "mbpp":
        solved = [row for row in examples if row["task_id"] in EXAMPLES]
        shown = "".join(f"{asked(row)}\n{row['code'].strip()}\n{DONE}\n\n" for row in solved).replace("\r\n", "\n")
        return [
            Program(f"{shown}{asked(row)}\n", "", (row["test_setup_code"], *row["test_list"]), (DONE,)) for row in rows
        ]
    if task == "mbpp+":
        return [Program(f"{row['prompt'].strip()}\n", "", from_plus(row).asserts, PLUS_ENDS) for row in rows]
    problems = [COMPLETED[task](row) for row in rows]
    return [Program(text := each.prompt.strip(), text, each.asserts, ENDS) for each in problems]


def asked(row: dict) -> str:
    """A problem of MBPP, up to where its program begins."""
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n{BEGIN}"
    )


def before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of the ends, all of it if there is none."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]


def passed(text: str, above: str, asserts: Sequence[str], ends: Sequence[str]) -> float:
    """1 if what was written holds all assertions: pass@1."""
    return float(run(above, before(text, ends), asserts, seconds=SECONDS, megabytes=MEGABYTES).passed)
