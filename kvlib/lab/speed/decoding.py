"""Milliseconds per decoded token of kvlib's methods against stock transformers, on models with random weights.

    python -m kvlib.lab.speed.decoding                      what fits this machine -> data/results/decoding_speed.csv
    python -m kvlib.lab.speed.decoding --settings smollm2-1.8k --methods full h2o --pairs 20 --out FILE

Contestants share a model, and each has a cache: stock with all of the prompt, stock with as many tokens as a compressed
cache holds halfway through, and one for each method. All read their prompt, decode a block that is not counted, and
then decode blocks in turn, A B C A B C ..., so that a drift of the machine hits all alike and all have decoded as much.
A ratio is taken turn by turn: given are the median, the least and the greatest of these pairs.

On a GPU attention runs without cuDNN, for all contestants: while a cache grows it is by far the slowest there is.

A block is greedy calls of the model, the first of them not timed. The clock is the host's; on a GPU it waits for the
device at the ends of a block only, so that launching kernels costs what it costs in use. `wanted` in the printed table
is what was hoped for, and nothing fails that misses it. A setting's rows are written when it has ended.

Beside the time stand the bytes of keys and values that the last step has read, of the whole batch: what is stored,
unless a method reads sparsely; stock reads a full cache. What was measured before they were counted has none.
"""

import argparse
import csv
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from tqdm import tqdm

import kvlib
from kvlib import paths
from kvlib.lab.speed.settings import (
    ARGUMENTS,
    CAPTURED,
    DEFAULT,
    FULL,
    RAGGED,
    SAME,
    SETTINGS,
    STOCK,
    WANTED,
    Setting,
    method,
)

LIMIT = 30.0  # seconds of decoding for each method; later turns are left out, but for the first two
IDENTITY = ("setting", "device", "method")  # a measurement replaces the rows of an earlier one with the same
SHOWN = (
    "method budget baseline ms_per_token read_bytes baseline_ms ratio ratio_min ratio_max wanted "
    "prefill_ms prefill_ratio"
)


class Contestant:
    """A prompt `(batch, tokens)`, read and continued greedily by a method or by stock; `clock` gives seconds.

    A method's block is opened anew for every block of tokens, with the cache that the last one left: so contestants
    can take turns on one model.
    """

    def __init__(self, model, ids: torch.Tensor, clock: Callable[[], float], method=None, mask=None):
        self.model, self.ids, self.clock, self.method, self.padding = model, ids, clock, method, mask
        self.run = self.cache = None

    @property
    def length(self) -> float:
        """Tokens in the cache, the mean over layers and KV heads."""
        return self.seen * self.run.stored_bytes() / self.run.full_bytes() if self.run else self.seen

    def read(self) -> float:
        """Seconds to read the prompt into a new cache."""
        self.run, self.cache, self.seen, self.mask = None, None, 0, self.padding  # frees the old cache first
        with self._applied():
            begin = self.clock()
            self._step(self.ids)
            return self.clock() - begin

    def decode(self, tokens: int) -> float:
        """Seconds per token of a block of `tokens`, after one that is not timed."""
        with self._applied():
            self._step(self.next)
            begin = self.clock()
            for _ in range(tokens):
                self._step(self.next)
            return (self.clock() - begin) / tokens

    @contextmanager
    def _applied(self):
        with torch.no_grad(), self.method(self.model) if self.method else nullcontext() as self.run:
            yield

    def _step(self, ids: torch.Tensor) -> None:
        if self.mask is not None and self.seen:
            self.mask = torch.cat([self.mask, self.mask[:, -1:]], dim=1)
        output = self.model(ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.next = output.past_key_values, output.logits[:, -1:].argmax(-1)
        self.seen += ids.shape[1]


class Captured(Contestant):
    """A method whose steps are captured anew for every block; the first four, which make ready, are not timed."""

    def decode(self, tokens: int) -> float:
        with self._applied():
            self._step(self.next)
            with self.run.capture(tokens + 3) as step:
                for _ in range(3):
                    self.next = step(self.next).argmax(-1, keepdim=True)
                begin = self.clock()
                for _ in range(tokens):
                    self.next = step(self.next).argmax(-1, keepdim=True)
                seconds = (self.clock() - begin) / tokens
        self.seen += tokens + 3
        return seconds


def contest(setting: Setting, model, names: tuple[str, ...], clock: Callable[[], float]) -> list[dict]:
    """Rows of the methods `names`, measured in turn with each other and with their baselines."""
    ids = torch.randint(model.config.vocab_size, (setting.batch, setting.prompt), device=setting.device)
    mask = left_padding(setting).to(ids.device) if setting.padded else None
    methods = {name: method(name, setting.budget) for name in names}
    contestants = {
        name: (Captured if name.endswith(CAPTURED) else Contestant)(model, ids, clock, x, mask)
        for name, x in ({STOCK: None} | methods).items()
    }
    prefills = [{name: x.read() for name, x in contestants.items()} for _ in range(setting.prefills)]
    held = {name: x.length for name, x in contestants.items()}
    for contestant in contestants.values():
        contestant.decode(setting.tokens)

    baselines = {name: {x: x for x in (STOCK, FULL) if x in contestants and x != name} for name in names}
    for name in names:
        if held[name] < setting.prompt and not setting.padded:
            length = short_prompt(setting, held[name], contestants[name].length)
            baselines[name][SAME] = key = f"{STOCK}, {length} tokens"
            if key not in contestants:
                contestants[key] = Contestant(model, ids[:, :length], clock)
                contestants[key].read()
                contestants[key].decode(setting.tokens)

    turns = take_turns(contestants, setting.pairs, setting.tokens, clock, LIMIT * len(names))
    return [
        {"method": name, "budget": methods[name].budget, "baseline": baseline}
        | compared(name, key, turns)
        | {"prefill_ms": 1e3 * median(x[name] for x in prefills)}
        | {"prefill_ratio": median(x[name] / x[STOCK] for x in prefills)}  # to stock, whatever the baseline
        | sizes(contestants[name].run)
        for name in names
        for baseline, key in baselines[name].items()
    ]


def left_padding(setting: Setting) -> torch.Tensor:
    """A mask `(batch, prompt)`, 1 = real, of rows that are half as long as the prompt, up to all of it."""
    lengths = torch.linspace(setting.prompt / 2, setting.prompt, setting.batch).long()
    return (torch.arange(setting.prompt) >= setting.prompt - lengths[:, None]).long()


def short_prompt(setting: Setting, held: float, later: float) -> int:
    """Prompt with which a stock cache, halfway through the timed blocks, is as long as a compressed one.

    held, later: the compressed cache's tokens after the prompt and a block later. Some grow as stock does, some do not.
    """
    block = setting.tokens + 1
    return max(1, round(held + ((later - held) / block - 1) * (1 + setting.pairs / 2) * block))


def take_turns(contestants: dict, pairs: int, tokens: int, clock: Callable[[], float], limit: float) -> list[dict]:
    """For every turn the seconds per token of each contestant; no new turn after `limit` seconds and two turns."""
    turns, begin = [], clock()
    for _ in tqdm(range(pairs), desc="turns", leave=False, disable=None):
        if len(turns) < 2 or clock() - begin < limit:
            turns.append({name: contestant.decode(tokens) for name, contestant in contestants.items()})
    return turns


def compared(name: str, baseline: str, turns: list[dict]) -> dict:
    """Columns of a method against a baseline: milliseconds per token, and the ratio of the two in each turn."""
    ms = spread("ms_per_token", [1e3 * turn[name] for turn in turns])
    ratio = spread("ratio", [turn[name] / turn[baseline] for turn in turns])
    return ms | {"baseline_ms": 1e3 * median(turn[baseline] for turn in turns)} | ratio | {"pairs": len(turns)}


def spread(name: str, values: list[float]) -> dict:
    """Columns with the median, the least and the greatest."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def sizes(run) -> dict:
    """Bytes of K and V after the last block, of the whole batch: what is stored, what its last step has read, what is
    allocated if the library tells, and a full cache, all of which stock reads."""
    allocated = run.allocated_bytes() if hasattr(run, "allocated_bytes") else None
    return {
        "stored_bytes": run.stored_bytes(),
        "read_bytes": run.read_bytes(),
        "allocated_bytes": allocated,
        "full_bytes": run.full_bytes(),
    }


def measure(name: str, setting: Setting, clock: Callable[[], float], **more) -> list[dict]:
    """All rows of a setting, numbers to four digits. more: columns to add."""
    torch.set_num_threads(setting.threads or torch.get_num_threads())
    if setting.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length: 5 ms a call while a cache grows
    model, names, size = setting.build(), setting.methods, setting.together
    shared = {"setting": name} | setting.facts()
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    rows = [shared | row | more for group in groups for row in contest(setting, model, group, clock)]
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def now() -> float:
    """The host's clock in seconds, once the device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def write(rows: list[dict], out: Path) -> None:
    """Put rows into a table, sorted, in place of those that `IDENTITY` says are of the same measurement."""
    new = {tuple(row[key] for key in IDENTITY) for row in rows}
    if out.exists():
        with out.open(newline="") as file:
            rows = rows + [row for row in csv.DictReader(file) if tuple(row[key] for key in IDENTITY) not in new]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: [str(row[key]) for key in (*IDENTITY, "budget", "baseline")]))


def readable(rows: list[dict]) -> str:
    """The rows of a setting as a table for people."""
    table = pd.DataFrame(rows)
    wanted = [WANTED.get(case) for case in zip(table.method, table.budget, table.baseline)]
    table["wanted"] = ["" if x is None else f"≤ {x:.2f}" for x in wanted]
    head = "{setting}: {model}, {dtype}, batch {batch}, {prompt_tokens} tokens; {device}, {pairs} pairs"
    return f"{head.format(**rows[0])}\n{table[SHOWN.split()].to_string(index=False)}\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.decoding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=DEFAULT[device], help="default: %(default)s")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*kvlib.METHODS, *RAGGED, *ARGUMENTS, *(name + CAPTURED for name in kvlib.METHODS)],
        metavar="METHOD",
        help="default: the setting's",
    )
    parser.add_argument("--pairs", type=int, help="timed blocks of each contestant; default: the setting's")
    parser.add_argument("--tokens", type=int, help="tokens in a timed block; default: the setting's")
    parser.add_argument("--tiny", action="store_true", help="the setting `tiny`: does everything run? In seconds")
    parser.add_argument("--out", type=Path, default=paths.RESULTS / "decoding_speed.csv", help="default: %(default)s")
    given = parser.parse_args(argv)
    if any(number is not None and number < 1 for number in (given.pairs, given.tokens)):
        parser.error("--pairs and --tokens are whole numbers >= 1")
    words = list(sys.argv[1:] if argv is None else argv)
    if "--out" in words:  # where the table went is nobody's business
        del words[words.index("--out") : words.index("--out") + 2]
    command = shlex.join([*parser.prog.split(), *words])
    methods = tuple(dict.fromkeys(given.methods)) if given.methods else None
    changes = {"methods": methods, "pairs": given.pairs, "tokens": given.tokens}
    for name in ["tiny"] if given.tiny else given.settings:
        setting = replace(SETTINGS[name], **{key: value for key, value in changes.items() if value})
        if setting.device == "cuda" and device == "cpu":
            parser.error(f"{name} needs a GPU")
        rows = measure(name, setting, now, command=command)
        write(rows, given.out)
        print(readable(rows))


if __name__ == "__main__":
    main()
