"""Microseconds of one layer's attention for one decoded token: torch's SDPA, `kvlib.kernels.decode`, FlashInfer.

    python -m kvlib.lab.speed.attention --out FILE.csv            what is not yet in the file; needs a CUDA GPU
    python -m kvlib.lab.speed.attention --out FILE.csv --small    does everything run? In seconds

On a CPU `--small` runs in Triton's interpreter: set TRITON_INTERPRET=1. Its times mean nothing.

Keys and values are random, in bfloat16 (float32 on a CPU), in the shapes of a model's layer. What is read:

    whole                   all of the context; the fastest of SDPA's backends is the baseline
    whole, logits           and the logits are written
    a fifth                 packed segments of a fifth
    whole, 8 bits           and what is stored are codes of 8 bits with a scale for each token
    ragged                  packed segments of lengths that are exponentially distributed, a quarter on average
    4096 slots, kv head     a list for each KV head, in the order of a score, as TidalDecode makes it
    4096 slots, query head  a list for each query head, so that a group shares nothing
    4096 in pages           a list for each query head of pages of 16, as Quest makes it
    5 % ...                 lists of so much of the context

Listed slots and pages are random, so that reads are scattered as far as can be and the lists of a group have the least
in common; where a method's cling together the kernel is faster.

A contestant's calls are captured in a CUDA graph, which reads gibibytes: each call other places, or other slots, of a
storage far larger than the L2 cache. Graphs are replayed in turns (`kvlib.lab.speed.turns`); given are the median and
the quartiles of these turns, and of each turn's ratio to the baseline. `read_bytes` are keys and values as often as a
call asks for them. The output of each graph's first call is compared with SDPA in float32; what is wrong, or does not
run, has no row.

FlashInfer takes part where it is installed, with pages of one token and each KV head of a row as a sequence of its own,
so that heads may differ in length and share nothing; what it plans on the host beforehand is not timed. It does not
write logits. Its kernels for several queries at a time are tried too (`flashinfer, tensor cores`).

The kernel's tiling is the best of a few numbers of programs with its default blocks, and then of a few other blocks. A
case's rows are written when it has ended, and a case that has rows is left out. `budget` in them is what is read, as a
share of the whole.
"""

import argparse
import copy
import csv
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from kvlib.core.layout import starts
from kvlib.kernels import decode
from kvlib.kernels.decode import TILING, Tiling
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import machine
from kvlib.lab.speed.turns import now, take_turns
from kvlib.methods.systems import int8

try:
    import flashinfer
except ImportError:
    flashinfer = None

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
KERNEL, LIBRARY = "decode", "flashinfer"
IDENTITY = ("device", "model", "batch", "context", "read", "kernel")
CASE = IDENTITY[:4]
PAGE = 16
TRIES = 3  # replays of each tiling
LIMIT = 20.0  # no new turn after so many seconds, and two turns
WRONG = 0.02  # relative error of an output
MEMORY = 0.7  # of what is free, for keys and values
AT_ONCE = 2**22  # tokens of which codes are made
WORKSPACE = 2**28  # bytes that FlashInfer may use
TITLE = "{model}, batch {batch}, {context} tokens, {dtype}; {device}; baseline {baseline}"
SHOWN = "read kernel us us_q1 us_q3 ratio gb_per_s error block programs warps stages"


@dataclass(frozen=True)
class Plan:
    """models: name -> query heads, KV heads, head_dim. slots: how many are listed, beside 5 %.

    storage, graph: bytes of keys and values that there are, and that a graph reads, at least. calls: in a graph, at
    least and at most. programs: numbers to try. tiles: (block, warps, stages) to try.
    """

    models: dict[str, tuple[int, int, int]]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    slots: int
    storage: int
    graph: int
    calls: tuple[int, int]
    turns: int
    programs: tuple[int, ...]
    tiles: tuple[tuple[int, int, int], ...]


FULL = Plan(
    models={"Llama-2-7B": (32, 32, 128), "Llama-3.1-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)},
    contexts=(8192, 32_768, 65_536, 131_072),
    batches=(1, 8),
    slots=4096,
    storage=4 * 2**30,
    graph=2 * 2**30,
    calls=(4, 400),
    turns=15,
    programs=(256, 512, 1024, 2048),
    # slots come before what is in them: with lists it takes 5 stages to have two blocks on their way
    tiles=((64, 4, 4), (64, 4, 5), (32, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 3)),
)
SMALL = Plan({"tiny": (4, 2, 16)}, (320,), (1,), 64, 2**16, 0, (1, 1), 2, (8,), ((128, 4, 2),))


class Case:
    """Keys and values of a layer's context `(copies x batch x kv_heads x context, head_dim)`, and a query for each row.

    There are so many copies because consecutive calls have to read different memory.
    """

    def __init__(self, plan: Plan, model: str, batch: int, context: int, device: str):
        self.plan, self.model, self.batch, self.context, self.device = plan, model, batch, context, device
        self.query_heads, self.kv_heads, self.head_dim = plan.models[model]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.tokens = batch * self.kv_heads * context
        self.copies = max(2, math.ceil(plan.storage / self.read_bytes(self.tokens)))

    @property
    def storage_bytes(self) -> int:
        return self.copies * self.read_bytes(self.tokens)

    def fill(self) -> None:
        new = {"dtype": self.dtype, "device": self.device}
        self.key, self.value = (torch.randn(self.copies * self.tokens, self.head_dim, **new) for _ in range(2))
        self.query = 3 * torch.randn(self.batch, self.query_heads, self.head_dim, **new)  # some keys weigh far more

    def read_bytes(self, entries: int) -> int:
        return 2 * entries * self.head_dim * self.dtype.itemsize

    def place(self, call: int, tokens: int) -> int:
        """Where in the storage the `tokens` that a call reads begin."""
        return call % (len(self.key) // tokens) * tokens

    def calls(self, read_bytes: int) -> int:
        return min(max(math.ceil(self.plan.graph / read_bytes), self.plan.calls[0]), self.plan.calls[1])


@dataclass
class Dense:
    """SDPA over the first `length` tokens of each row, packed."""

    case: Case
    read: str
    kernel: str
    length: int
    grouped: bool  # query heads of a group as if they were successive queries; else torch takes care of groups
    tiling = None

    @property
    def entries(self) -> int:
        return self.case.batch * self.case.kv_heads * self.length

    @property
    def read_bytes(self) -> int:
        return self.case.read_bytes(self.entries)

    def __call__(self, call: int) -> torch.Tensor:
        case, begin = self.case, self.case.place(call, self.entries)
        key, value = (
            x[begin : begin + self.entries].view(case.batch, case.kv_heads, self.length, -1)
            for x in (case.key, case.value)
        )
        query = case.query.view(case.batch, case.kv_heads if self.grouped else case.query_heads, -1, case.head_dim)
        with sdpa_kernel(BACKENDS[self.kernel.split(",")[0]]):
            gqa = {} if self.grouped else {"enable_gqa": True}
            return F.scaled_dot_product_attention(query, key, value, **gqa)

    def expected(self) -> torch.Tensor:
        lengths = torch.full((self.case.batch, self.case.kv_heads), self.length)
        return exact(self.case, starts(lengths), lengths)


class Kernel:
    """`decode.attend` over packed segments `lengths` `(batch, kv_heads)`, or over lists in segments of the context.

    Args:
        draw: makes the lists `(batch, kv_heads or query_heads, k)` of a call.
    """

    kernel, stored = KERNEL, None

    def __init__(self, case: Case, read: str, lengths: torch.Tensor, draw: Callable | None = None, scoring=False):
        self.case, self.read, self.scoring, self.tiling = case, read, scoring, TILING
        self.total, self.most, self.starts = int(lengths.sum()), int(lengths.max()), starts(lengths)
        self.lengths = lengths.to(case.device)
        self.slots = [draw()] if draw else None
        self.entries = self.slots[0].numel() if draw else self.total
        calls = case.calls(self.read_bytes)
        if draw:
            self.slots += [draw() for _ in range(1, calls)]
        self.begins = [(self.starts + case.place(call, self.total)).to(case.device) for call in range(calls)]

    @property
    def read_bytes(self) -> int:
        return self.case.read_bytes(self.entries)

    def __call__(self, call: int) -> torch.Tensor:
        case = self.case
        tensors = case.query, case.key, case.value, self.begins[call], self.lengths
        slots = self.slots and self.slots[call]
        return decode.attend(*tensors, self.most, slots=slots, scoring=self.scoring, tiling=self.tiling).output

    def expected(self) -> torch.Tensor:
        return exact(self.case, self.starts, self.lengths.cpu(), self.slots and self.slots[0])

    def tune(self) -> None:
        """Set the best tiling."""
        tried = {}
        for programs in self.case.plan.programs:
            self._try(TILING._replace(programs=programs), tried)
        programs = min(tried, key=tried.get).programs
        for block, warps, stages in self.case.plan.tiles:
            self._try(Tiling(block, programs, warps, stages), tried)
        self.tiling = min(tried, key=tried.get)
        every = ", ".join(f"{'/'.join(map(str, tiling))} {1e6 * seconds:.1f}" for tiling, seconds in tried.items())
        print(f"  {self.read}, us by {'/'.join(Tiling._fields)}: {every}", flush=True)

    def _try(self, tiling: Tiling, tried: dict[Tiling, float]) -> None:
        self.tiling = tiling
        try:
            block, _ = captured(self, len(self.begins))
        except OutOfResources:  # there is less shared memory than the blocks need
            return
        tried[tiling] = median(block() for _ in range(TRIES))


class Coded(Kernel):
    """`decode.attend` over codes of the whole context."""

    def encode(self) -> None:
        """Make codes of all keys and values, a few at a time."""
        pairs = zip(self.case.key.split(AT_ONCE), self.case.value.split(AT_ONCE))
        made = [int8.codes(*pair) for pair in pairs]
        self.stored = {name: torch.cat([x[name] for x in made]) for name in made[0]}

    @property
    def read_bytes(self) -> int:
        return 2 * self.entries * (self.case.head_dim + 2)

    def __call__(self, call: int) -> torch.Tensor:
        if self.stored is None:
            self.encode()
        case, stored = self.case, self.stored
        scales = stored["key_scale"], stored["value_scale"]
        tensors = case.query, stored["key"], stored["value"], self.begins[call], self.lengths
        return decode.attend(*tensors, self.most, scales=scales, tiling=self.tiling).output

    def expected(self) -> torch.Tensor:
        like, stored = copy.copy(self.case), {name: x[: self.total].float() for name, x in self.stored.items()}
        like.key, like.value = (stored[name] * stored[f"{name}_scale"] for name in ("key", "value"))
        return exact(like, self.starts, self.lengths.cpu())


class Paged:
    """FlashInfer's attention over what a `Kernel` reads."""

    tiling = None

    def __init__(self, kernel: Kernel, tensor_cores: bool):
        self.case, self.read, self.entries, self.tensor_cores = kernel.case, kernel.read, kernel.entries, tensor_cores
        self.read_bytes = kernel.read_bytes
        self.kernel = f"{LIBRARY}, tensor cores" if tensor_cores else LIBRARY
        self.total, self.expected, self.parent = kernel.total, kernel.expected, kernel
        self.wrapper = None

    def plan(self) -> None:
        """Say which pages each sequence has, in every call."""
        case, kernel, device = self.case, self.parent, self.case.device
        lengths, begins = kernel.lengths.cpu(), kernel.starts.cpu()
        if kernel.slots is None:
            counts = lengths.flatten()
            place = torch.arange(self.total) - starts(lengths).flatten().repeat_interleave(counts)
            self.pages = [(begins.flatten().repeat_interleave(counts) + place).to(device, torch.int32)]
        else:
            counts = torch.full((kernel.slots[0].shape[:2].numel(),), kernel.slots[0].shape[2])
            first = begins.repeat_interleave(kernel.slots[0].shape[1] // case.kv_heads, 1)[..., None].to(device)
            self.pages = [(first + slots).flatten().to(torch.int32) for slots in kernel.slots]
        ends = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)
        group, page = case.batch * case.query_heads // len(counts), torch.ones(len(counts), dtype=torch.int32)
        self.query = case.query.view(len(counts), group, case.head_dim)
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=self.tensor_cores
        )
        sizes = group, 1, case.head_dim, 1
        self.wrapper.plan(
            ends.to(device), self.pages[0], page.to(device), *sizes, q_data_type=case.dtype, kv_data_type=case.dtype
        )

    def __call__(self, call: int) -> torch.Tensor:
        case, begin = self.case, self.case.place(call, self.total)
        if self.wrapper is None:
            self.plan()
        # the plan follows from the lengths, which are the same in all calls
        self.wrapper._paged_kv_indices_buf = self.pages[call % len(self.pages)]
        stored = (x[begin : begin + self.total].view(-1, 1, 1, case.head_dim) for x in (case.key, case.value))
        return self.wrapper.run(self.query, tuple(stored))


def exact(case: Case, begins: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
    """Attention in float32 of each query over its segment, or over the slots of it that are listed."""
    lists = case.kv_heads if slots is None else slots.shape[1]
    query = case.query.float().view(case.batch, lists, -1, case.head_dim)
    output = torch.empty_like(query)
    for row in range(case.batch):
        for i in range(lists):
            head = i * case.kv_heads // lists
            begin, length = int(begins[row, head]), int(lengths[row, head])
            segment = [x[begin : begin + length] for x in (case.key, case.value)]
            if slots is not None:
                segment = [x[slots[row, i].long()] for x in segment]
            with sdpa_kernel(SDPBackend.MATH):
                output[row, i] = F.scaled_dot_product_attention(query[row, i], *(x.float() for x in segment))
    return output.view(case.query.shape)


def ragged(case: Case) -> torch.Tensor:
    """Lengths `(batch, kv_heads)`, quantiles of an exponential distribution, other heads longest in every row."""
    share = -torch.log1p(-(torch.arange(case.kv_heads) + 0.5) / case.kv_heads)
    lengths = (case.context / 4 * share / share.mean()).long().clamp(1, case.context)
    return torch.stack([lengths.roll(row) for row in range(case.batch)])


def listed(case: Case, heads: int, count: int, page: int = 1) -> torch.Tensor:
    """Slots `(batch, heads, count)` of the highest of random scores of pages, the highest first."""
    score = torch.rand(case.batch, heads, case.context // page, device=case.device)
    pages = score.topk(count // page, dim=-1).indices
    slots = pages[..., None] * page + torch.arange(page, device=case.device)
    return slots.flatten(2).to(torch.int32)


def contestants(case: Case) -> Iterator[Dense | Kernel | Paged]:
    """All of them, FlashInfer's behind the kernel that reads the same."""
    for contestant in own(case):
        yield contestant
        if flashinfer and type(contestant) is Kernel and not contestant.scoring:
            yield from (Paged(contestant, tensor_cores) for tensor_cores in (False, True))


def own(case: Case) -> Iterator[Dense | Kernel]:
    whole = torch.full((case.batch, case.kv_heads), case.context)
    for read, length in (("whole", case.context), ("a fifth", case.context // 5)):
        for name in BACKENDS:
            yield Dense(case, read, name, length, grouped=True)
            if case.query_heads > case.kv_heads:
                yield Dense(case, read, f"{name}, gqa", length, grouped=False)
        yield Kernel(case, read, whole * length // case.context)
    yield Kernel(case, "whole, logits", whole, scoring=True)
    yield Coded(case, "whole, 8 bits", whole)
    yield Kernel(case, "ragged", ragged(case))
    for count, name in ((case.plan.slots, case.plan.slots), (case.context // 20 // PAGE * PAGE, "5 %")):
        yield Kernel(case, f"{name} slots, kv head", whole, partial(listed, case, case.kv_heads, count))
        if case.query_heads > case.kv_heads:
            yield Kernel(case, f"{name} slots, query head", whole, partial(listed, case, case.query_heads, count))
        yield Kernel(case, f"{name} in pages", whole, partial(listed, case, case.query_heads, count, PAGE))


def captured(call: Callable[[int], torch.Tensor], count: int) -> tuple[Callable[[], float], torch.Tensor]:
    """What runs `count` calls and gives the seconds of one, and where it leaves the first one's output."""
    first = call(0)  # compiles, and says if it cannot run
    if not first.is_cuda:

        def block() -> float:
            begin = time.perf_counter()
            for i in range(count):
                call(i)
            return (time.perf_counter() - begin) / count

        return block, first

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = call(0)
        for i in range(1, count):
            call(i)

    def block() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    block()
    return block, first


def measure(case: Case) -> list[dict]:
    """All rows of a case."""
    case.fill()
    blocks, found = {}, {}
    for contestant in contestants(case):
        name = contestant.read, contestant.kernel
        try:
            if isinstance(contestant, Kernel):
                contestant.tune()
            block, output = captured(contestant, case.calls(contestant.read_bytes))
        except (RuntimeError, ValueError) as error:
            print(f"  {', '.join(name)} does not run: {str(error).splitlines()[0]}", flush=True)
            continue
        block()
        expected = contestant.expected()
        error = float((output.float().reshape(expected.shape) - expected).norm() / expected.norm())
        if not error < WRONG:
            print(f"  {', '.join(name)} is WRONG: relative error {error:.3g}", flush=True)
            continue
        blocks[name], found[name] = block, (contestant, error)
    turns = take_turns(blocks, case.plan.turns, now, LIMIT)

    dense = [name for name, (contestant, _) in found.items() if name[0] == "whole" and isinstance(contestant, Dense)]
    baseline = min(dense, key=lambda name: median(turn[name] for turn in turns))
    rows = []
    for name, (contestant, error) in found.items():
        us = spread("us", [1e6 * turn[name] for turn in turns])
        read = contestant.read_bytes
        rows.append(
            {"model": case.model, "query_heads": case.query_heads, "kv_heads": case.kv_heads}
            | {"head_dim": case.head_dim, "dtype": str(case.dtype).removeprefix("torch."), "batch": case.batch}
            | {"context": case.context, "read": name[0], "kernel": name[1], "budget": contestant.entries / case.tokens}
            | {x: getattr(contestant.tiling, x, None) for x in Tiling._fields}
            | us
            | {"baseline": baseline[1]}
            | spread("ratio", [turn[name] / turn[baseline] for turn in turns])
            | {"read_bytes": read, "gb_per_s": read / us["us"] / 1e3, "error": error, "turns": len(turns)}
        )
    return rows


def spread(name: str, values: list[float]) -> dict:
    """Columns with the median and the quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


def readable(rows: list[dict], shown: str, title: str) -> str:
    """The rows of a case as a table for people: some columns below a title, which is made of others."""
    table = [shown.split(), *([str("" if row[x] is None else row[x]) for x in shown.split()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return "\n".join([title.format(**rows[0]), *lines, ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.attention", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="table of which cases are left out, and that gets rows")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (given.small and triton.knobs.runtime.interpret):
        parser.error("without a GPU there is --small only, with TRITON_INTERPRET=1")
    warnings.filterwarnings("ignore", category=UserWarning)  # SDPA's reasons for what a backend cannot do
    torch.manual_seed(0)
    facts = machine(device) | {"triton": triton.__version__, "command": command(parser, argv)}
    facts[LIBRARY] = flashinfer and flashinfer.__version__
    plan, done = SMALL if given.small else FULL, set()
    if given.out.exists():
        with given.out.open(newline="") as file:
            done = {tuple(row[key] for key in CASE) for row in csv.DictReader(file)}
    for model, batch, context in product(plan.models, plan.batches, plan.contexts):
        case = Case(plan, model, batch, context, device)
        title = f"{model}, batch {batch}, {context} tokens"
        if (facts["device"], model, str(batch), str(context)) in done:
            print(f"{title}: in the table", flush=True)
        elif device == "cuda" and case.storage_bytes > MEMORY * torch.cuda.mem_get_info()[0]:
            print(f"{title}: {case.storage_bytes / 2**30:.0f} GiB do not fit", flush=True)
        else:
            print(f"{title} ...", flush=True)
            begin = now()
            rows = [rounded(row | facts) for row in measure(case)]
            write(rows, given.out, IDENTITY)
            print(f"{readable(rows, SHOWN, TITLE)}in {now() - begin:.0f} s\n", flush=True)
        del case  # its memory is needed
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
