"""Milliseconds per decoded token where steps are captured as CUDA graphs, with long contexts and whole models.

    python -m kvlib.lab.speed.captured --out FILE.csv            what is not yet in the file; needs a CUDA GPU
    python -m kvlib.lab.speed.captured --out FILE.csv --small    does everything run? In seconds, on a CPU too

No prompt is read: weights are random, and so are the queries, keys and values that methods compress in place of a
prompt's. Keys of later heads are larger, so that heads differ in how spread their attention is, and Ada-KV gives them
different lengths; lists of slots are as scattered as can be. The time of a step follows from how much is read, and from
how scattered it is, not from what it says.

The baseline is stock transformers, but for its attention, with a cache of fixed length: each step writes its token into
the last slot and reads all of them by the fastest of SDPA's backends, with heads that share keys as queries of one head
and without a mask (while a graph is captured, transformers makes one and repeats shared keys, which the fastest
backends do not take). `stock, no context` is what is left of it where 16 tokens are attended to. A token costs what it
costs in use: a replay, and the choice of the next id. Contestants are timed one after the other, since two caches do
not fit. In `fused` cases norms, MLPs and rotation of all contestants are compiled by torch: what lies between products
of matrices is one kernel, not several.

Beside the time stand the bytes that a step reads, weights (but for the table of embeddings) and keys and values, and
`ideal_ms`, in which a device copy would move as many. `speed_up` is over the baseline, `of_bytes` its share of what the
bytes alone would allow, `attention_speed_up` the same without the time of `stock, no context`. `error` is the relative
difference of a captured step's logits from those without `kvlib.kernels.decode`, after a shorter context of the same
kind; of stock the greatest one between the fastest backend and another. `least`, `most`: tokens in the shortest and the
longest segment. A row is written when it was measured, and what has a row is left out.
"""

import argparse
import csv
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama as llama

import kvlib
from kvlib import kernels
from kvlib.core.snapshot import Snapshot
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import FULL, STOCK, build, machine
from kvlib.lab.speed.turns import now, spread

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TRIED = {"cuda": ("cudnn", "flash", "efficient"), "cpu": ("math",)}  # on a GPU math takes minutes
PACKED = "packed"  # the name of stock's attention
NOTHING = f"{STOCK}, no context"
IDENTITY = ("device", "model", "batch", "context", "fused", "method", "budget")
EVICTORS = "snapkv pyramidkv streaming_llm knorm h2o scissorhands tova vatp".split()
SLOW = 3.0  # times the fastest backend: a few tokens say enough
LEAST = 16  # tokens that are next to nothing
SPREAD = 3.0  # keys of the last head are so many times as large as those of the first one
SHOWN = "method budget ms ideal_ms speed_up of_bytes attention_speed_up error least most backend"


@dataclass(frozen=True)
class Case:
    """`batch` contexts of `context` tokens, which methods decode after.

    tokens: in a timed block. blocks: timed ones. short: tokens of the context in which logits are compared. fused: are
    norms, MLPs and rotation compiled? alone: without stock, for the context stands for what is left of a longer one.
    """

    model: str
    batch: int
    context: int
    methods: tuple
    dtype: str = "bfloat16"
    tokens: int = 32
    blocks: int = 5
    short: int = 1024
    fused: bool = False
    alone: bool = False

    def facts(self) -> dict:
        return {x: getattr(self, x) for x in ("model", "dtype", "batch", "context", "fused")}


def readers(budget: int, **quest) -> tuple:
    """Methods that read everything in a few layers and `budget` tokens in the others, and what they are measured by."""
    tidal = kvlib.method("tidaldecode", budget=budget, heads="group")
    return kvlib.method(FULL), tidal, kvlib.method("quest", budget=budget, **quest)


def evictors(share: float, ragged: float) -> tuple:
    each = tuple(kvlib.method(name, budget=share) for name in EVICTORS)
    return kvlib.method(FULL), kvlib.method("adakv", budget=ragged), *each


def one(budget: float | int) -> tuple:
    return kvlib.method(FULL), kvlib.method("snapkv", budget=budget)


def typed(budget: int) -> tuple:
    """UNComp, whose heads have the same lengths whatever ranks them: by what takes the least time."""
    return kvlib.method("uncomp", budget=budget, statistic="participation"), kvlib.method("snapkv", budget=budget)


TARGETS = (
    Case("Llama-2-7B", 1, 131_072, readers(1024)),
    Case("Llama-3.1-8B", 8, 65_536, readers(1024)),
    Case("Llama-3.1-8B", 8, 32_768, evictors(0.2, 0.25)),
)
# when does it pay?
GRID = tuple(
    Case("Llama-3.1-8B", batch, context, (*one(0.2), readers(1024)[1]))
    for batch, context in ((1, 8192), (1, 32_768), (1, 131_072), (8, 8192))
)
PAPERS = (  # what they measured: TidalDecode; SnapKV, with two batches; UNComp, with one text, as many as stock was
    # tried with, and far more, which are made of no more tokens than its largest budget
    Case("Llama-2-7B", 1, 100_000, readers(512)),
    Case("Llama-2-7B", 1, 16_384, one(1024)),
    Case("Llama-2-7B", 8, 16_384, one(1024)),
    Case("Llama-2-7B", 1, 8192, (kvlib.method(FULL), *typed(384))),
    Case("Llama-2-7B", 28, 8192, typed(384)),
    Case("Llama-2-7B", 320, 640, typed(384), alone=True),
    Case("Llama-2-7B", 384, 640, typed(384), alone=True),
)
SMOL = tuple(  # the model that answers in the other lessons, whole
    Case("SmolLM2-135M", batch, 8192, (*readers(1024)[:2], *evictors(0.2, 0.25)[1:4])) for batch in (1, 32)
)
CODED = (Case("Llama-3.1-8B", 8, 32_768, (kvlib.method("int8"),)),)  # beside evictors, at half of the bytes
CASES = (*TARGETS, *(replace(case, fused=True) for case in TARGETS), *GRID, *PAPERS, *CODED, *SMOL)
SMALL = (
    Case("tiny", 1, 96, readers(16, page=4, dense=0), "float32", tokens=1, blocks=2, short=32),
    Case("tiny", 2, 64, evictors(0.5, 0.5)[:2], "float32", tokens=1, blocks=2, short=32),
)


# Contexts that nobody has read


def made_up(model, batch: int, context: int, seed: int = 0) -> Iterator[tuple]:
    """Of every layer random `(query, key, value, scaling)`, as a `Snapshot` has them."""
    config, like = model.config, next(model.parameters())
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    random = torch.Generator(like.device).manual_seed(seed)
    scale = torch.linspace(1, SPREAD, config.num_key_value_heads, dtype=like.dtype, device=like.device)[:, None, None]
    for _ in range(config.num_hidden_layers):
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        new = {"dtype": like.dtype, "device": like.device, "generator": random}
        query, key, value = (torch.randn(batch, count, context, size, **new) for count in heads)
        yield query, key.mul_(scale), value, size**-0.5


def fill(run, batch: int, context: int) -> None:
    """Let the run's method compress a context that is made up, as if it had read it."""
    device = next(run.model.parameters()).device
    positions = torch.arange(context, device=device).expand(batch, -1)
    counts = torch.full((batch,), context)
    run.fork(Snapshot(made_up(run.model, batch, context), torch.ones_like(positions), positions, counts, None))


class Filled(DynamicLayer):
    """A stock layer of fixed length: the newest token is always the last."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def filled(model, batch: int, context: int) -> Cache:
    """A stock cache of a context that is made up."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Filled(key, value) for _, key, value, _ in made_up(model, batch, context)]
    return cache


# Steps


@contextmanager
def fused(model) -> Iterator[None]:
    """Inside the block norms, MLPs and rotation of a Llama are compiled; norms and MLPs stay so."""
    for module in model.modules():
        if isinstance(module, llama.LlamaRMSNorm | llama.LlamaMLP):
            module.compile(dynamic=False)
    with patch.object(llama, "apply_rotary_pos_emb", torch.compile(llama.apply_rotary_pos_emb, dynamic=False)):
        yield


def packed(module, query, key, value, attention_mask=None, scaling=None, **others) -> tuple[torch.Tensor, None]:
    """Attention of one token, for which heads of a group are queries of one head: nothing lies in their future."""
    queries = query.reshape(*key.shape[:2], -1, key.shape[3])
    output = F.scaled_dot_product_attention(queries, key, value, scale=scaling)
    return output.reshape(len(query), 1, *query.shape[1::2]), None


AttentionInterface.register(PACKED, packed)


@contextmanager
def stock(model, batch: int, context: int, backend: str) -> Iterator[Callable]:
    """What decodes a token for each row: `(batch, 1)` ids -> logits `(batch, vocabulary)`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    try:
        with captured(model, batch, context, backend) as step:
            yield step
    finally:
        model.set_attn_implementation(before)


@contextmanager
def captured(model, batch: int, context: int, backend: str) -> Iterator[Callable]:
    """A step of the model, captured if it is on a GPU."""
    cache = filled(model, batch, context)
    ids = torch.ones(batch, 1, dtype=torch.long, device=next(model.parameters()).device)

    def step() -> torch.Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

    if not ids.is_cuda:
        yield lambda new: step()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay(new: torch.Tensor) -> torch.Tensor:
        ids.copy_(new)
        graph.replay()
        return logits

    yield replay


def timed(step: Callable, case: Case, device, most: float = math.inf) -> list[float]:
    """Seconds per token of every block; a few tokens that come first make ready.

    If one of them takes longer than `most`, they are all that is timed.
    """
    ids, seconds = torch.ones(case.batch, 1, dtype=torch.long, device=device), []
    for count in (4, *[case.tokens] * case.blocks):
        begin = now()
        for _ in range(count):
            ids = step(ids).argmax(-1, keepdim=True)
        seconds.append((now() - begin) / count)
        if seconds[0] > most:
            return seconds
    return seconds[1:]


def room(case: Case) -> int:
    """Tokens that `timed` decodes, and one to look at."""
    return 5 + case.tokens * case.blocks


@torch.no_grad()
def logits_after(model, method, case: Case, kernel: bool) -> torch.Tensor:
    """Of the third token behind a short context: captured with the kernel, or eager without it."""
    ids = torch.ones(case.batch, 1, dtype=torch.long, device=next(model.parameters()).device)
    before, kernels.decoding = kernels.decoding, kernels.decoding if kernel else False
    try:
        with method(model) as run:
            fill(run, case.batch, case.short)
            if not kernel:
                return [model(ids, past_key_values=run.cache).logits[:, -1] for _ in range(3)][-1]
            with run.capture(3) as step:
                return [step(ids) for _ in range(3)][-1].clone()
    finally:
        kernels.decoding = before


# Rows


def weight_bytes(model) -> int:
    """Bytes of weights that a step reads: all but the table of embeddings, unless logits are made by it too."""
    total = sum(weight.nbytes for weight in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total - (0 if table is head else table.nbytes)


def copy_rate(device: str) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    size = 2**30 if device == "cuda" else 2**18
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)  # zeros may move faster than what is stored
    target, rates = torch.empty_like(source), []
    for _ in range(5):
        begin = now()
        for _ in range(10):
            target.copy_(source)
        rates.append(20 * source.nbytes / (now() - begin))
    return median(rates)


@torch.no_grad()
def measure_stock(model, case: Case, context: int) -> dict:
    """Columns of stock, by its fastest backend."""
    device, found, logits = next(model.parameters()).device, {}, {}
    ids = torch.ones(case.batch, 1, dtype=torch.long, device=device)
    for backend in TRIED[device.type]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with stock(model, case.batch, min(context, case.short), backend) as step:
                    logits[backend] = step(ids).float()
                with stock(model, case.batch, context, backend) as step:
                    fastest = min(map(median, found.values()), default=math.inf)
                    found[backend] = timed(step, case, device, most=SLOW * fastest)
            except RuntimeError as error:
                reasons = dict.fromkeys(str(x).splitlines()[0] for x in (error, *(each.message for each in said)))
                print(f"  {backend} does not run: {' '.join(reasons)}", flush=True)
        collect()
    if not found:
        raise RuntimeError(f"none of SDPA's backends runs stock on {context} tokens")
    backend = min(found, key=lambda name: median(found[name]))
    print(f"  ms by backend: {', '.join(f'{x} {1e3 * median(times):.4g}' for x, times in found.items())}", flush=True)
    error = max((relative(logits[x], logits[backend]) for x in found if x != backend), default=None)
    config = model.config
    entry = 2 * config.hidden_size // config.num_attention_heads * next(model.parameters()).element_size()
    read = case.batch * context * config.num_hidden_layers * config.num_key_value_heads * entry
    more = {"blocks": len(found[backend]), "read_bytes": read, "backend": backend, "error": error}
    return spread("ms", [1e3 * x for x in found[backend]]) | more


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of what is wrong, as a share."""
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def measure(model, method, case: Case, kernels_shown: int = 0) -> dict:
    """Columns of a method."""
    device = next(model.parameters()).device
    exact = logits_after(model, method, case, kernel=False).float()
    error = relative(logits_after(model, method, case, kernel=True).float(), exact)
    collect()
    with method(model) as run:
        fill(run, case.batch, case.context)
        lengths = torch.stack([layer.lengths for layer in run.cache.layers])
        with run.capture(room(case)) as step:
            seconds = timed(step, case, device)
            if kernels_shown:
                print(longest(step, case, device, kernels_shown), flush=True)
        read = run.read_bytes()
    ends = {"least": int(lengths.min()), "most": int(lengths.max())}
    more = {"blocks": len(seconds), "read_bytes": read, "error": error}
    return spread("ms", [1e3 * x for x in seconds]) | more | ends


def longest(step: Callable, case: Case, device, count: int) -> str:
    """The kernels of a step that take longest, as text."""
    ids = torch.ones(case.batch, 1, dtype=torch.long, device=device)
    with torch.profiler.profile() as profile:
        step(ids)
        now()
    return profile.key_averages().table(sort_by="self_device_time_total", row_limit=count, max_name_column_width=60)


def collect() -> None:
    """Free what is not needed any more, graphs and caches above all."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def known(out: Path) -> list[dict]:
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def find(out: Path, row: dict) -> dict | None:
    """The row of the table that is of the same measurement."""
    wanted = [str(row[key]) for key in IDENTITY]
    return next((found for found in known(out) if [found[key] for key in IDENTITY] == wanted), None)


def compared(row: dict, stock: list[dict | None] | None, rate: float, weights: int) -> dict:
    """The row, beside stock without a context and stock, in this order; None where no row is there yet but this one."""
    total, ratios = int(row["read_bytes"]) + weights, dict.fromkeys(("speed_up", "of_bytes", "attention_speed_up"))
    if stock is not None:
        bare, base = (row if x is None else x for x in stock)
        ms, ms_bare, ms_base = (float(x["ms"]) for x in (row, bare, base))
        ratios |= {
            "speed_up": ms_base / ms,
            "of_bytes": (ms_base / ms) / ((int(base["read_bytes"]) + weights) / total),
            "attention_speed_up": (ms_base - ms_bare) / (ms - ms_bare) if ms > ms_bare else None,
        }
    return row | {"weight_bytes": weights, "copy_gb_per_s": rate / 1e9, "ideal_ms": 1e3 * total / rate} | ratios


def run_case(case: Case, out: Path, facts: dict, kernels_shown: int) -> None:
    """Measure what has no row, stock first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = case.facts() | {"baseline": None if case.alone else STOCK, "budget": 1.0}
    rows = {x: facts | named | label(x) for x in (*(() if case.alone else (STOCK, NOTHING)), *case.methods)}
    if all(find(out, row) for row in rows.values()):
        print("  in the table", flush=True)
        return
    model, rate = build(case.model, device, case.dtype), copy_rate(device)
    with fused(model) if case.fused else nullcontext():
        contest(model, case, rows, rate, out, kernels_shown)


def contest(model, case: Case, rows: dict, rate: float, out: Path, kernels_shown: int) -> None:
    """Measure contestants, one after the other. rows: what is known of each before; rate: of a copy."""
    empty = {"error": None, "least": None, "most": None, "backend": None}
    for x, row in rows.items():
        if find(out, row):
            continue
        begin = now()
        try:
            if x in (NOTHING, STOCK):
                found = measure_stock(model, case, LEAST if x == NOTHING else case.context)
            else:
                found = measure(model, x, case, kernels_shown)
        except (RuntimeError, ValueError) as error:
            if x in (STOCK, NOTHING):  # what everything is compared with
                raise
            print(f"  {row['method']} does not run: {str(error).splitlines()[0]}", flush=True)
            collect()
            continue
        row = row | empty | found
        stock = None if case.alone else [row if x == name else find(out, rows[name]) for name in (NOTHING, STOCK)]
        write([rounded(compared(row, stock, rate, weight_bytes(model)))], out, IDENTITY)
        collect()
        shown = {key: find(out, row)[key] for key in SHOWN.split()}
        print(f"  {', '.join(f'{k} {v}' for k, v in shown.items() if v)}; in {now() - begin:.0f} s", flush=True)


def label(x) -> dict:
    """Columns that name a contestant: a method, or what stands for stock."""
    return {"method": x} if isinstance(x, str) else {"method": x.name, "budget": getattr(x, "budget", 1.0)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.captured", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="table of which rows are left out, and that gets rows")
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=range(len(CASES)))
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the kernels that take longest")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.small:
        parser.error("without a GPU there is --small only")
    facts = machine(device) | {"command": command(parser, argv)}
    for case in SMALL if given.small else [CASES[i] for i in given.cases]:
        print(", ".join(f"{name}={value}" for name, value in case.facts().items()), flush=True)
        run_case(case, given.out, facts, given.kernels)
        collect()


if __name__ == "__main__":
    main()
