"""Problems that others published, MBPP and HumanEval: what AnchorCoder's arms write, and what the references cost them.

    python -m kvlib.lab.evaluation.published    all arms of SmolLM2 whose weights are here, for what the table lacks

Models with anchors read under the method "anchorcoder", others store everything. Both are asked as generated functions
are (`kvlib.lab.evaluation.functions`): no newline behind the docstring, greedy decoding, one cut for all. Of the
problems the table has their numbers; their text belongs to others.
"""

import argparse
import os
from collections.abc import Iterable, Iterator

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.anchored import LISTED, here
from kvlib.anchored.arms import ARMS
from kvlib.lab.evaluation import arms, benchmarks
from kvlib.lab.evaluation.anchored import fed
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.functions import run_written, without_newline
from kvlib.lab.evaluation.prompts import compressed, device_name
from kvlib.lab.functions.problems import Problem
from kvlib.lab.functions.published import from_humaneval, from_mbpp
from kvlib.lab.tasks.prompt import Prompt, begin, cut

TABLE = paths.RESULTS / "03_published.parquet"
SETS = {"mbpp": from_mbpp, "humaneval": from_humaneval}
BLOCK = 50
COSTS = ("stored_bytes", "peak_bytes", "end_bytes", "full_bytes")


def evaluate(model, tokenizer, name: str, block: int = BLOCK) -> pd.DataFrame:
    """One row per problem of a set, in the order of their numbers.

    Args:
        name: of the set. block: problems at a time, at most.

    Returns:
        set, problem: its number there.
        value: 1 = passed. outcome: one of `kvlib.lab.functions.KINDS`.
        bits: per character, what the reference costs behind the prompt; anchors are planted and cost nothing.
        characters: of the reference, with the newline before it. tokens: of the prompt, without anchors.
        stored_bytes, peak_bytes, end_bytes, full_bytes: as of `kvlib.lab.evaluation.functions`.
        torch, device.

    Raises:
        ValueError, FileNotFoundError, ...: as `benchmarks.load`.
    """
    problems, rows = problems_of(name), []
    drawn = [prompt_of(name, number, problem, tokenizer) for number, problem in problems.items()]
    with tqdm(total=len(drawn), desc=name, disable=None) as bar:
        for prompts in blocks(drawn, block):
            columns = score(model, tokenizer, prompts, [problems[prompt.seed] for prompt in prompts])
            rows.append(pd.DataFrame({"set": name, "problem": [prompt.seed for prompt in prompts], **columns}))
            bar.update(len(prompts))
    table = pd.concat(rows).sort_values("problem", ignore_index=True)
    return table.assign(torch=torch.__version__, device=device_name(model))


@torch.no_grad()
def score(model, tokenizer, drawn: list[Prompt], problems: list[Problem]) -> dict[str, list]:
    """Columns of `evaluate` with one entry per problem, of problems that are asked together."""
    asked = arms.asked_of(model, tokenizer, drawn)
    method = Configuration("full" if asked.anchor is None else "anchorcoder", 1.0).make()
    with compressed(asked.prompts, method) as read:
        bits = fed(method, read, asked.logits(read), asked, tokenizer, bits=True)["value"]
    found = run_written(method, asked, problems, tokenizer)
    return {
        "value": found["value"],
        "outcome": found["outcome"],
        "bits": bits,
        "characters": [len(prompt.answer) for prompt in drawn],
        "tokens": asked.tokens,
        **{column: found[column] for column in COSTS},
    }


def problems_of(name: str) -> dict[int, Problem]:
    """The problems of a set by their numbers, of which HumanEval makes "HumanEval/7"."""
    rows = benchmarks.load(name)
    return {int(str(row["task_id"]).rpartition("/")[2]): without_newline(SETS[name](row)) for row in rows}


def prompt_of(name: str, number: int, problem: Problem, tokenizer) -> Prompt:
    """The prompt of a problem without its newline, which the answer begins with."""
    text = begin(tokenizer) + problem.prompt
    return cut(name, number, text, len(text), f"\n{problem.solution}", tokenizer)


def blocks(drawn: Iterable[Prompt], most: int) -> Iterator[list[Prompt]]:
    """At most so many prompts together, none with more than twice the tokens of another: MBPP has one of 4 000."""
    block = []
    for prompt in sorted(drawn, key=lambda prompt: prompt.length):
        if block and (len(block) == most or prompt.length > 2 * block[0].length):
            yield block
            block = []
        block.append(prompt)
    yield block


def known(listed: dict[str, str]) -> pd.DataFrame:
    """The rows of the table that are of arms as they are listed: name -> sha256."""
    if not TABLE.is_file():
        return pd.DataFrame(columns=["model", "set"])
    rows = pd.read_parquet(TABLE)
    return rows[rows["sha256"] == rows["model"].map(listed)]


def add(rows: pd.DataFrame, listed: dict[str, str]) -> None:
    """The table appears at once with these rows, and those that it had of arms as they are listed."""
    table = pd.concat([part for part in (known(listed), rows) if len(part)])
    part = TABLE.with_name(f"{TABLE.name}.{os.getpid()}.part")
    table.sort_values(["model", "set", "problem"]).to_parquet(part, compression="zstd", index=False)
    part.replace(TABLE)
    checksums.record(TABLE)


def main(argv: list[str] | None = None) -> None:
    """Write data/results/03_published.parquet, after each model and set; rows of arms as they are listed stay."""
    parser = argparse.ArgumentParser("python -m kvlib.lab.evaluation.published", description=main.__doc__)
    default = here(name for name, arm in ARMS.items() if arm.base == "smollm2")
    parser.add_argument(
        "--models", nargs="+", choices=ARMS, default=default, metavar="ARM",
        help="default: those of SmolLM2 whose weights are here",
    )  # fmt: skip
    parser.add_argument("--block", type=int, default=BLOCK, help="problems at a time")
    arguments = parser.parse_args(argv)
    listed = dict(pd.read_csv(LISTED, dtype=str)[["arm", "sha256"]].itertuples(index=False))
    if missing := [name for name in arguments.models if name not in listed]:
        parser.error(f"{', '.join(missing)}: not in {LISTED.name}, which `python -m kvlib.anchored list` writes")
    done = set(known(listed)[["model", "set"]].itertuples(index=False, name=None))
    for name in arguments.models:
        if wanted := [each for each in SETS if (name, each) not in done]:
            model, tokenizer = kvlib.load(name)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            for each in wanted:
                rows = evaluate(model, tokenizer, each, arguments.block)
                rows.insert(0, "model", name)
                rows.insert(1, "sha256", listed[name])
                add(rows, listed)
                print(f"{name}, {each}: {rows['value'].sum():.0f} of {len(rows)} passed", flush=True)


if __name__ == "__main__":
    main()
