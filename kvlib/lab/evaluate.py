"""Exact-match evaluation of cache methods: one prefill per block of prompts, forked for every method and budget.

The prompt is prefilled and compressed; then the model's first choices at every token of the answer are compared with
it. That is what greedy decoding would give, up to its first mistake, at a fixed cost per sample.

Protocols:
    prompt: the question is part of what is prefilled, so a method that looks at the end of the prompt sees it.
    decoded: the context is prefilled and compressed; then the question is fed token by token.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch

import kvlib
from kvlib.lab import tasks
from kvlib.lab.statistics import paired_difference

PROTOCOLS = ("prompt", "decoded")
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
BLOCK = 4  # prompts per prefill
MEASURED = ("value", "stored_bytes", "read_bytes", "full_bytes", "prefill_flops", "clamped")
AGREEMENT = 0.97  # of recomputed rows: another CPU or a GPU rounds differently, which can tip a close first choice


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
    """What one result table holds: every configuration on the same samples of every task, for every model.

    length: tokens of prompt and answer. samples: their number per task and model; sample n has the seed n.
    """

    tasks: tuple[str, ...]
    length: int
    samples: int
    configurations: tuple[Configuration, ...]
    models: tuple[str, ...] = ("minilm",)
    protocol: str = "prompt"

    def __post_init__(self):
        for task in self.tasks:
            tasks.find(task)
        for configuration in self.configurations:
            configuration.make()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r}: {' or '.join(PROTOCOLS)}")


STUDIES = {
    "00_kv_cache": Study(
        tasks=("needle", "dict_lookup", "function_lookup"),
        length=2048,
        samples=200,
        configurations=(
            Configuration("full", 1.0),
            *(Configuration(m, b) for m in ("random", "streaming_llm", "h2o", "snapkv", "knorm") for b in BUDGETS),
            *(Configuration("streaming_llm", b, '{"renumber": false}') for b in BUDGETS),
            Configuration("streaming_llm", 0.2, '{"sinks": 0}'),
            Configuration("knorm", 0.5),
            # an answer is five one-digit tokens, more than half of the default kernel of 7 reaches
            *(Configuration("snapkv", b, '{"kernel": 15}') for b in BUDGETS),
        ),
        models=("minilm", "minilm-gqa"),
    )
}


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = "prompt",
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration.

    Args:
        samples: sample numbers, which are the tasks' seeds. task, length: what `kvlib.lab.tasks.sample` draws.
        name: the model's name for the table; block: prompts per prefill (left-padded; 1 in the protocol "decoded").
        progress: wraps the list of blocks, for example `tqdm`.

    Returns:
        columns model, method, budget, arguments, task, length, protocol, sample, value (1 = right; of long answers the
        share of lines before the first mistake), stored_bytes (K and V after the prompt), read_bytes (K and V in the
        first decode step: what is stored, unless the method reads sparsely), full_bytes, prefill_flops, clamped,
        torch, device.

    Raises:
        ValueError: for an unknown task or protocol, or if `length` exceeds the model's window.
    """
    check_window(window_of(model), length)
    samples, rows = list(samples), []
    sparse = any(configuration.make().hooks("attend") for configuration in configurations)
    size = 1 if protocol == "decoded" or sparse else block  # questions differ in length; reads are counted per pass
    for numbers in progress([samples[i : i + size] for i in range(0, len(samples), size)]):
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        snapshot, question = prefill(model, tokenizer, drawn, protocol)
        answers = [tokenizer(s.answer, add_special_tokens=False).input_ids for s in drawn]
        for configuration in configurations:
            columns = score(model, configuration.make(), snapshot, question, answers, tokenizer)
            rows += [
                {**asdict(configuration), "sample": number, **dict(zip(columns, cells))}
                for number, *cells in zip(numbers, *columns.values())
            ]
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    places = {"task": task, "length": length, "protocol": protocol}
    table = pd.DataFrame(rows).assign(model=name, **places, torch=torch.__version__, device=device)
    order = ["model", "method", "budget", "arguments", *places, "sample"]
    return table[[*order, *(column for column in table if column not in order)]]


def window_of(model) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_window(window: int | None, length: int) -> None:
    if window is not None and length > window:
        raise ValueError(f"length={length}: the model's window is {window} tokens")


def prefill(model, tokenizer, drawn: list, protocol: str):
    """The snapshot of the prompts, or of their contexts, and the question's ids `(batch, tokens)` still to be fed."""
    prompts = [s.prompt if protocol == "prompt" else s.prompt[: -len(s.question)] for s in drawn]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    snapshot = kvlib.snapshot(model, inputs.input_ids, inputs.attention_mask)
    if protocol == "prompt":
        return snapshot, inputs.input_ids[:, :0]
    question = tokenizer([s.question for s in drawn], add_special_tokens=False, return_tensors="pt").input_ids
    return snapshot, question.to(model.device)


@torch.no_grad()
def score(model, method, snapshot, question: torch.Tensor, answers: list[list[int]], tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per row of the snapshot, for one method."""
    longest = max(map(len, answers))
    fed = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=snapshot.logits.device)
    with method(model) as run:
        cache = run.fork(snapshot)
        stored, full = bytes_per_row(cache, "lengths"), bytes_per_row(cache, "tokens")
        if sum(stored) != run.stored_bytes():
            raise RuntimeError(f"segments add up to {sum(stored)} bytes, the storage has {run.stored_bytes()}")
        clamped, reads = run.clamped_rows.tolist(), stored
        first = snapshot.logits.argmax(-1)
        for token in question.unbind(1):
            first = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        # Shorter answers are filled up, which one pass would count as part of a prompt that is too long.
        window = window_of(model)
        full_house = window is not None and int(snapshot.counts.max()) + question.shape[1] + longest > window
        stepwise = one_by_one(method) or full_house
        steps = fed.split(1, dim=1) if stepwise else [fed]
        chosen, alive = [first[:, None]], torch.ones(len(fed), dtype=torch.bool, device=fed.device)
        for tokens in steps:
            if stepwise:
                alive &= chosen[-1][:, 0] == tokens[:, 0]
                if not alive.any():
                    break  # every row has made its first mistake or is done
            chosen.append(model(tokens, past_key_values=cache).logits.argmax(-1))
            if method.hooks("attend") and len(chosen) == 2:
                reads = [run.read_bytes()]  # of the one row
    said = torch.cat(chosen, dim=1)
    said = torch.nn.functional.pad(said, (0, longest + 1 - said.shape[1]), value=-1).tolist()
    return {
        "value": [tasks.judge(answer, row, tokenizer) for answer, row in zip(answers, said)],
        "stored_bytes": stored,
        "read_bytes": reads,
        "full_bytes": full,
        "prefill_flops": [prefill_flops(model, n) for n in snapshot.counts.tolist()],
        "clamped": clamped,
    }


def one_by_one(method) -> bool:
    """Whether what a method computes depends on tokens after the prompt coming one at a time."""
    if method.evicts and method.evicts_in_decode:
        return True
    return any(method.hooks(name) for name in ("attend", "before_layer", "on_token_ids"))


def bytes_per_row(cache, counts: str) -> list[int]:
    """K and V bytes of each row: `counts` is "lengths" for what is stored, "tokens" for everything seen."""
    total = 0
    for layer in cache.layers:
        per_token = sum(x.shape[1] * x.element_size() for x in (layer.keys, layer.values))
        tokens = layer.lengths.sum(1) if counts == "lengths" else layer.tokens * layer.lengths.shape[1]
        total = total + tokens * per_token
    return total.tolist()


def prefill_flops(model, tokens: int) -> int:
    """Multiplications and additions of a dense causal prefill: weights, q·k and a·v, and one row of logits."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - (1 if tied else 2) * embedding
    pairs = config.num_hidden_layers * config.num_attention_heads * tokens * (tokens + 1) // 2
    return 2 * weights * tokens + 4 * head_dim * pairs + 2 * embedding


def verify(
    table: pd.DataFrame, model, tokenizer, study: Study, samples: Iterable[int], *, name: str = "minilm"
) -> float:
    """Recompute whole samples of a table, every configuration of them, and return the share of rows that agree.

    Raises:
        ValueError: if fewer than 97 % of the rows have the recorded value, if the recomputed values are all in all
            higher or lower (the 95 % interval of the mean difference excludes 0), or if another column differs.
    """
    key = ["method", "budget", "arguments", "task", "length", "protocol", "sample"]
    samples = list(samples)
    again = pd.concat(
        evaluate(
            model, tokenizer, study.configurations, task, study.length, samples, name=name, protocol=study.protocol
        )
        for task in study.tasks
    )
    recorded = table[table["model"] == name]
    both = again.merge(recorded, on=key, suffixes=("", "_recorded"), validate="one_to_one")
    if len(both) != len(again):
        raise ValueError(f"the table lacks {len(again) - len(both)} of {len(again)} rows of samples {samples}")
    for column in MEASURED[1:]:
        if (both[column] != both[f"{column}_recorded"]).any():
            raise ValueError(f"{column} differs from what the table records")
    agreement = float((both["value"] - both["value_recorded"]).abs().lt(1e-9).mean())
    if agreement < AGREEMENT:
        raise ValueError(f"only {agreement:.1%} of {len(both)} recomputed rows agree with the table")
    # by sample: its configurations share a prefill, in which one close choice may tip for all of them
    means = both.groupby(["task", "sample"])[["value", "value_recorded"]].mean()
    gap = paired_difference([means["value"]], [means["value_recorded"]])
    if gap.low > 0 or gap.high < 0:
        raise ValueError(f"recomputed values differ by {gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}] on average")
    return agreement
