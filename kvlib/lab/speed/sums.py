"""Milliseconds of column sums of one layer's attention beside that attention, of a prompt: `kvlib.kernels.column_sums`.

    python -m kvlib.lab.speed.sums --out FILE.csv            what is not yet in the file; needs a CUDA GPU
    python -m kvlib.lab.speed.sums --out FILE.csv --small    does everything run? In seconds

On a CPU `--small` runs in Triton's interpreter: set TRITON_INTERPRET=1. Its times mean nothing.

Queries, keys and values are random, in bfloat16 (float32 on a CPU), in the shapes of a model's layer, and queries as a
model makes them: tokens before heads. Works are:

    forward           causal attention by each of SDPA's backends; the fastest one is the baseline
    forward, lse      the same, which also keeps log-sum-exps (`kvlib.core.packed.LogSumExps`)
    log-sum-exps      the first pass alone
    sums, lse         column sums, the second pass, with log-sum-exps given
    sums              both passes
    sums, positions   both, as for a padded batch: every block is masked
    window            both, of the last 64 queries
    window, lse       the second pass of these

Calls are captured in CUDA graphs, which are replayed in turns (`kvlib.lab.speed.turns`); given are the median and the
quartiles of these turns, and of each turn's ratio to the baseline. `extra_mib` is the most memory that a call holds
beyond its inputs. `error` is the largest difference to the blocked pass in float32, relative to 1 + what is right; the
mean column sum of a prompt is 1. What is wrong, or does not run, has no row.

The first two of the kernel's works try all tilings, and the others take the best of each. New tilings take seconds to
compile, for each dimension of heads. A case's rows are written when it has ended, and a case that has rows is left out.
"""

import argparse
import csv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import sdpa_kernel
from triton.runtime.errors import OutOfResources

from kvlib.core import attention, packed
from kvlib.kernels import column_sums as kernel
from kvlib.kernels.column_sums import Tiling
from kvlib.lab.speed.attention import BACKENDS, captured, readable, spread
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import machine
from kvlib.lab.speed.turns import now, take_turns

KERNEL = "kvlib"
IDENTITY = ("device", "model", "batch", "context", "work", "kernel")
CASE = IDENTITY[:4]
TRIES = 3  # replays of each tiling
LIMIT = 5.0  # no new turn after so many seconds, and two turns
WRONG = 1e-3  # of an error
TITLE = "{model}, {context} tokens, {dtype}; {device}; baseline {baseline}"
SHOWN = "work kernel ms ms_q1 ms_q3 ratio tflops extra_mib error kept block warps stages"


@dataclass(frozen=True)
class Plan:
    """models: name -> query heads, KV heads, head_dim. window: queries. tilings: to try.

    logits: computed in a graph at least; calls: in a graph at most.
    """

    models: dict[str, tuple[int, int, int]]
    contexts: tuple[int, ...]
    window: int
    turns: int
    tilings: tuple[Tiling, ...]
    logits: float
    calls: int


FULL = Plan(
    models={"Llama-3.1-8B": (32, 8, 128), "Llama-2-7B": (32, 32, 128), "SmolLM2-135M": (9, 3, 64)},
    contexts=(8192, 32_768),
    window=64,
    turns=15,
    tilings=(
        Tiling(128, 64, 4, 2),
        Tiling(128, 64, 4, 3),
        Tiling(128, 128, 4, 2),
        Tiling(128, 128, 8, 2),
        Tiling(128, 128, 8, 3),
        Tiling(256, 64, 8, 2),
        Tiling(64, 128, 4, 2),
        Tiling(64, 64, 4, 3),
    ),
    logits=2e10,
    calls=50,
)
SMALL = Plan({"tiny": (2, 1, 16)}, (40,), 16, 2, (Tiling(32, 32, 4, 2), Tiling(64, 64, 4, 2)), 0, 1)


class Case:
    """Queries, keys and values of a prompt of `context` tokens, in one layer."""

    def __init__(self, plan: Plan, model: str, context: int, device: str):
        self.plan, self.model, self.context = plan, model, context
        self.query_heads, self.kv_heads, self.head_dim = plan.models[model]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        new = {"dtype": self.dtype, "device": device}
        self.query = 2 * torch.randn(1, context, self.query_heads, self.head_dim, **new).transpose(1, 2)
        self.key, self.value = torch.randn(2, 1, self.kv_heads, context, self.head_dim, **new)
        self.window = self.query[:, :, -plan.window :]
        places = torch.arange(context, device=device)
        self.places = places[None], places.expand(1, self.kv_heads, context)
        self.tilings = {}  # log-sum-exps or sums -> the best one

    def logits(self, queries: int) -> int:
        """Dot products behind causal attention of the last queries."""
        return self.query_heads * (queries * (self.context - queries) + queries * (queries + 1) // 2)

    def calls(self, queries: int) -> int:
        return max(1, min(self.plan.calls, int(self.plan.logits / self.logits(queries))))

    @cached_property
    def norms(self) -> torch.Tensor:
        """Log-sum-exps by the reference."""
        query, key, scaling = self.query.float(), self.key.float(), self.head_dim**-0.5
        rows = attention.blocks(query.contiguous(), key, None, None, scaling, self.block)
        return torch.cat([logits.logsumexp(-1) for logits in rows], dim=3).flatten(1, 2)

    def sums(self, query: torch.Tensor) -> torch.Tensor:
        """Column sums by the reference."""
        return attention.column_sums(query.float().contiguous(), self.key.float(), block=self.block)

    @property
    def block(self) -> int:
        """Query rows of which a gibibyte holds the logits."""
        return max(1, 2**28 // (self.query_heads * self.context))


@dataclass
class Contestant:
    """Work on a case, done by `call(tilings)`.

    queries: how many there are. products: matrix products for each logit. expected: what is right, where that is looked
    at. tuned: whose tiling is found here.
    """

    work: str
    kernel: str
    call: Callable[[dict[str, Tiling]], torch.Tensor]
    queries: int
    products: int
    expected: torch.Tensor | None = None
    tuned: str | None = None


def contestants(case: Case) -> Iterator[Contestant]:
    query, key, window, places = case.query, case.key, case.window, case.places
    rows, last, lse = query.shape[2], window.shape[2], case.norms

    def forward(backend: str) -> torch.Tensor:
        group = {"enable_gqa": True} if case.query_heads > case.kv_heads else {}
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(query, key, case.value, is_causal=True, **group)

    def keeping(backend: str) -> torch.Tensor:
        with packed.LogSumExps() as kept:
            forward(backend)
        return kept.found

    def norms(tilings, query=query, *places):
        return kernel.log_sum_exps(query, key, *places, tiling=tilings.get("log-sum-exps"))

    def sums(tilings, query=query, *places, lse=None):
        lse = norms(tilings, query, *places) if lse is None else lse
        return kernel.column_sums(query, key, *places, lse=lse, tiling=tilings.get("sums"))

    for name in BACKENDS:
        yield Contestant("forward", name, lambda _, name=name: forward(name), rows, 2)
    for name in ("cudnn", "flash"):
        yield Contestant("forward, lse", name, lambda _, name=name: keeping(name), rows, 2, lse)
    whole, end = case.sums(query), case.sums(window)
    yield Contestant("log-sum-exps", KERNEL, norms, rows, 1, lse, "log-sum-exps")
    yield Contestant("sums, lse", KERNEL, lambda tilings: sums(tilings, lse=lse), rows, 1, whole, "sums")
    yield Contestant("sums", KERNEL, sums, rows, 2, whole)
    yield Contestant("sums, positions", KERNEL, lambda _: sums({}, query, *places), rows, 2, whole)
    yield Contestant("window", KERNEL, lambda tilings: sums(tilings, window), last, 2, end)
    ends = lse[:, :, -last:]
    yield Contestant("window, lse", KERNEL, lambda tilings: sums(tilings, window, lse=ends), last, 1, end)


def tune(case: Case, contestant: Contestant) -> None:
    """Find the best tiling for a contestant's kernel."""
    tried = {}
    for tiling in case.plan.tilings:
        try:
            block, _ = captured(lambda _, tiling=tiling: contestant.call({contestant.tuned: tiling}), 1)
        except OutOfResources:  # there is less shared memory than the blocks need
            continue
        tried[tiling] = median(block() for _ in range(TRIES))
    case.tilings[contestant.tuned] = min(tried, key=tried.get)
    every = ", ".join(f"{'/'.join(map(str, tiling))} {1e3 * seconds:.2f}" for tiling, seconds in tried.items())
    print(f"  {contestant.work}, ms by {'/'.join(Tiling._fields)}: {every}", flush=True)


def extra(call: Callable[[], torch.Tensor]) -> float | None:
    """Mebibytes that a call holds at most beyond what there was; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case) -> list[dict]:
    """All rows of a case."""
    blocks, found = {}, {}
    for contestant in contestants(case):
        name = contestant.work, contestant.kernel
        try:
            if contestant.tuned:
                tune(case, contestant)
            calls = case.calls(contestant.queries)
            block, output = captured(lambda _, call=contestant.call: call(case.tilings), calls)
            memory = extra(lambda call=contestant.call: call(case.tilings))
        except RuntimeError as error:
            print(f"  {', '.join(name)} does not run: {str(error).splitlines()[0]}", flush=True)
            continue
        block()
        error = None
        if contestant.expected is not None:
            right = contestant.expected
            error = float(((output - right).abs() / (1 + right.abs())).max())
            if not error < WRONG:
                print(f"  {', '.join(name)} is WRONG: error {error:.3g}", flush=True)
                continue
        blocks[name], found[name] = block, (contestant, error, memory)
    turns = take_turns(blocks, case.plan.turns, now, LIMIT)

    forwards = [name for name in found if name[0] == "forward"]
    baseline = min(forwards, key=lambda name: median(turn[name] for turn in turns))
    rows = []
    for name, (contestant, error, memory) in found.items():
        ms = spread("ms", [1e3 * turn[name] for turn in turns])
        tiling = case.tilings.get(contestant.tuned)
        work = 2 * case.head_dim * contestant.products * case.logits(contestant.queries)
        rows.append(
            {"model": case.model, "query_heads": case.query_heads, "kv_heads": case.kv_heads}
            | {"head_dim": case.head_dim, "dtype": str(case.dtype).removeprefix("torch."), "batch": 1}
            | {"context": case.context, "work": name[0], "kernel": name[1]}
            | {x: getattr(tiling, x, None) for x in Tiling._fields}
            | ms
            | {"baseline": baseline[1]}
            | spread("ratio", [turn[name] / turn[baseline] for turn in turns])
            | {"tflops": work / ms["ms"] / 1e9, "extra_mib": memory, "error": error, "turns": len(turns)}
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.sums", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="table of which cases are left out, and that gets rows")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--contexts", nargs="+", type=int, metavar="TOKENS", help=f"in place of {' '.join(map(str, FULL.contexts))}"
    )
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (given.small and triton.knobs.runtime.interpret):
        parser.error("without a GPU there is --small only, with TRITON_INTERPRET=1")
    warnings.filterwarnings("ignore", category=UserWarning)  # SDPA's reasons for what a backend cannot do
    facts = machine(device) | {"triton": triton.__version__, "command": command(parser, argv)}
    plan, done = SMALL if given.small else FULL, set()
    if given.out.exists():
        with given.out.open(newline="") as file:
            done = {tuple(row[key] for key in CASE) for row in csv.DictReader(file)}
    for model, context in product(plan.models, given.contexts or plan.contexts):
        title = f"{model}, {context} tokens"
        if (facts["device"], model, "1", str(context)) in done:
            print(f"{title}: in the table", flush=True)
            continue
        print(f"{title} ...", flush=True)
        begin = now()
        torch.manual_seed(0)
        with torch.no_grad():
            rows = [rounded(row | facts) for row in measure(Case(plan, model, context, device))]
        write(rows, given.out, IDENTITY)
        print(f"{readable(rows, SHOWN, TITLE)}in {now() - begin:.0f} s\n", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
