"""Exact-match evaluation of cache methods: one prefill per batch of prompts, forked for every method and budget.

Every row of a result table is one sample under one configuration, with the bytes that were really stored. The prompt,
question included, is prefilled and compressed; then the answer is fed token by token, and the sample counts if every
token of it was the model's first choice and the choice after it does not continue its last word. That is what greedy
decoding would have to produce, at a fixed cost per sample.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import paths
from kvlib.lab import tasks

PROTOCOL = "question in prompt, teacher-forced exact match"
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Configuration:
    """A method, its budget and, as JSON, its other arguments: what identifies a cell of a table."""

    method: str
    budget: float
    arguments: str = "{}"

    def make(self):
        return kvlib.method(self.method, budget=self.budget, **json.loads(self.arguments))


@dataclass(frozen=True)
class Study:
    """What one result table holds."""

    tasks: tuple[str, ...]
    length: int
    samples: int
    configurations: tuple[Configuration, ...]


STUDIES = {
    "00_kv_cache": Study(
        tasks=("needle", "dict_lookup", "function_lookup"),
        length=2048,
        samples=200,
        configurations=(
            Configuration("full", 1.0),
            *(Configuration(m, b) for m in ("random", "streaming_llm", "h2o", "snapkv", "knorm") for b in BUDGETS),
            *(Configuration("streaming_llm", b, '{"renumber": false}') for b in BUDGETS),
            # an answer is five one-digit tokens, more than half of the default kernel of 7 reaches
            *(Configuration("snapkv", b, '{"kernel": 15}') for b in BUDGETS),
        ),
    )
}


def evaluate(
    model, tokenizer, configurations, task: str, length: int, samples, *, name: str, batch: int = 4
) -> pd.DataFrame:
    """One row per sample and configuration.

    Args:
        configurations: `Configuration`s; samples: sample numbers, which are the tasks' seeds.
        task, length: what `kvlib.lab.tasks.sample` draws.
        name: the model's name for the table; batch: prompts per prefill (left-padded).

    Returns:
        columns model, method, budget, arguments, task, length, sample, value (1 = exact match), stored_bytes (K and V
        after the prompt), full_bytes, clamped, protocol, torch, device.
    """
    rows = []
    samples = list(samples)
    for start in tqdm(range(0, len(samples), batch), desc=f"{task} {length}", file=sys.stdout):
        numbers = samples[start : start + batch]
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        inputs = tokenizer([s.prompt for s in drawn], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        answers = [tokenizer(s.answer, add_special_tokens=False).input_ids for s in drawn]
        snapshot = kvlib.snapshot(model, **inputs)
        for configuration in configurations:
            values, stored, full, clamped = score(model, configuration.make(), snapshot, answers, tokenizer)
            for row, number in enumerate(numbers):
                rows.append(
                    {
                        "model": name,
                        **asdict(configuration),
                        "task": task,
                        "length": length,
                        "sample": number,
                        "value": float(values[row]),
                        "stored_bytes": stored[row],
                        "full_bytes": full[row],
                        "clamped": clamped,
                    }
                )
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    return pd.DataFrame(rows).assign(protocol=PROTOCOL, torch=torch.__version__, device=device)


@torch.no_grad()
def score(model, method, snapshot, answers: list[list[int]], tokenizer):
    """Exact match per row, bytes stored per row, those of a full cache, and whether the prompt forced a clamp."""
    longest = max(map(len, answers))
    fed = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=snapshot.logits.device)
    with method(model) as run:
        cache = run.fork(snapshot)
        stored, full = bytes_per_row(cache, "lengths"), bytes_per_row(cache, "tokens")
        if sum(stored) != run.stored_bytes():
            raise RuntimeError(f"segments add up to {sum(stored)} bytes, the storage has {run.stored_bytes()}")
        clamped = bool(run.clamped)
        choices = [snapshot.logits.argmax(-1)]
        for token in fed.unbind(1):
            choices.append(model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1))
    said = torch.stack(choices, dim=1).tolist()
    right = [
        row[: len(answer)] == answer and tasks.ends(tokenizer.decode([row[len(answer)]]))
        for row, answer in zip(said, answers)
    ]
    return right, stored, full, clamped


def bytes_per_row(cache, counts: str) -> list[int]:
    """K and V bytes of each row: `counts` is "lengths" for what is stored, "tokens" for everything seen."""
    total = 0
    for layer in cache.layers:
        per_token = sum(x.shape[1] * x.element_size() for x in (layer.keys, layer.values))
        tokens = layer.lengths.sum(1) if counts == "lengths" else layer.tokens * layer.lengths.shape[1]
        total = total + tokens * per_token
    return total.tolist()


def verify(table: pd.DataFrame, model, tokenizer, study: Study, samples) -> float:
    """Recompute whole samples of a table, every configuration of them, and return the share of rows that agree.

    Raises:
        ValueError: if fewer than 97 % of the rows have the recorded value, or if stored bytes differ anywhere.
    """
    key = ["method", "budget", "arguments", "task", "sample"]
    name = table["model"].iloc[0]
    again = pd.concat(
        evaluate(model, tokenizer, study.configurations, task, study.length, samples, name=name) for task in study.tasks
    )
    both = again.merge(table, on=key, suffixes=("", "_recorded"), validate="one_to_one")
    if len(both) != len(again):
        raise ValueError(f"the table lacks {len(again) - len(both)} of {len(again)} rows of samples {list(samples)}")
    if (both["stored_bytes"] != both["stored_bytes_recorded"]).any():
        raise ValueError("stored bytes differ from the recorded ones")
    agreement = float((both["value"] == both["value_recorded"]).mean())
    if agreement < 0.97:
        raise ValueError(f"only {agreement:.1%} of {len(both)} recomputed rows agree with the table")
    return agreement


def main() -> None:
    """Make the table of a study."""
    parser = argparse.ArgumentParser(prog="python -m kvlib.lab.evaluate", description=main.__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, help="default: data/results/<study>.parquet")
    parser.add_argument("--batch", type=int, default=4, help="prompts per prefill (default: 4)")
    parser.add_argument("--samples", type=int, help="samples per task (default: the study's)")
    options = parser.parse_args()
    study = STUDIES[options.study]
    out = options.out or paths.RESULTS / f"{options.study}.parquet"
    model, tokenizer = kvlib.load()
    if torch.cuda.is_available():
        model = model.cuda()
    samples = range(options.samples or study.samples)
    table = pd.concat(
        evaluate(
            model, tokenizer, study.configurations, task, study.length, samples, name="minilm", batch=options.batch
        )
        for task in study.tasks
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    table.to_parquet(part, compression="zstd", index=False)
    part.rename(out)
    print(f"{len(table)} rows in {out}")


if __name__ == "__main__":
    main()
