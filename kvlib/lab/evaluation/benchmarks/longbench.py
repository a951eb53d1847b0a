"""LongBench: its tasks, and the official prompts, lengths and truncation.

Source: `LongBench/pred.py`, `LongBench/task.md` and `LongBench/config` of THUDM/LongBench (MIT), commit 2e00731. Of
LongBench-E prompts, lengths and truncation are the same.

Departure: samsum's answer ends with its first line that is not empty, which is all that `eval.py` judges; the script
ends it at the token of a newline, and lets no answer begin with one or with the end.
"""

import json
from dataclasses import dataclass

from kvlib.lab.evaluation.benchmarks.files import File, local

LONGBENCH_PROMPTS = File(
    "longbench_dataset2prompt.json", "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
)
LONGBENCH_LENGTHS = File(
    "longbench_dataset2maxlen.json", "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022"
)
LONGBENCH_CONFIG = "LongBench/config of github.com/THUDM/LongBench, commit 2e00731"


@dataclass(frozen=True)
class LongBenchTask:
    """One of the sixteen English and code tasks.

    samples: rows, of LongBench and of LongBench-E (None: not in it). chat: whether prompts go through a chat template;
    few-shot and code prompts never do. Metrics are in `kvlib.lab.evaluation.metrics`, by the same names.
    """

    group: str
    samples: int
    samples_e: int | None
    chat: bool = True


LONGBENCH = {
    "narrativeqa": LongBenchTask("single-document QA", 200, None),
    "qasper": LongBenchTask("single-document QA", 200, 224),
    "multifieldqa_en": LongBenchTask("single-document QA", 150, 150),
    "hotpotqa": LongBenchTask("multi-document QA", 200, 300),
    "2wikimqa": LongBenchTask("multi-document QA", 200, 300),
    "musique": LongBenchTask("multi-document QA", 200, None),
    "gov_report": LongBenchTask("summarisation", 200, 300),
    "qmsum": LongBenchTask("summarisation", 200, None),
    "multi_news": LongBenchTask("summarisation", 200, 294),
    "trec": LongBenchTask("few-shot", 200, 300, chat=False),
    "triviaqa": LongBenchTask("few-shot", 200, 300, chat=False),
    "samsum": LongBenchTask("few-shot", 200, 300, chat=False),
    "passage_count": LongBenchTask("synthetic", 200, 300),
    "passage_retrieval_en": LongBenchTask("synthetic", 200, 300),
    "lcc": LongBenchTask("code", 500, 300, chat=False),
    "repobench-p": LongBenchTask("code", 500, 300, chat=False),
}


@dataclass(frozen=True)
class Setting:
    """The official prompt of a task, to be filled by `template.format(**row)`, and its longest answer in tokens."""

    template: str
    max_new_tokens: int


def longbench_settings() -> dict[str, Setting]:
    """The official settings of the sixteen tasks, from two files in the folder of `KVLIB_DATA`. Errors as in `load`."""
    prompts, lengths = (json.loads(local(f, LONGBENCH_CONFIG)) for f in (LONGBENCH_PROMPTS, LONGBENCH_LENGTHS))
    return {name: Setting(prompts[name], lengths[name]) for name in LONGBENCH}


def cut_middle(prompt: str, limit: int, tokenizer) -> str:
    """LongBench's truncation: of a prompt of more than `limit` tokens the first and the last `limit // 2` stay.

    As published: special tokens count and are then skipped, and the text is tokenised again afterwards, which can give
    a few tokens more than `limit`. To be done before a chat template is applied.
    """
    ids = tokenizer(prompt).input_ids
    if len(ids) <= limit:
        return prompt
    halves = ids[: limit // 2], ids[-(limit // 2) :]
    return "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)
