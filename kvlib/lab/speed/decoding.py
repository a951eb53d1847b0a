"""Milliseconds per decoded token of kvlib's methods against stock transformers, on models with random weights.

    python -m kvlib.lab.speed.decoding                      what fits this machine -> data/results/decoding_speed.csv
    python -m kvlib.lab.speed.decoding --settings smollm2-1.8k --methods full h2o --pairs 20 --out FILE

Contestants share a model, and each has a cache: stock with all of the prompt, stock with as many tokens as a compressed
cache holds halfway through, and one for each method. All read their prompt, decode a block that is not counted, and
then decode blocks in turn (`kvlib.lab.speed.turns`), so that all have decoded as much.

On a GPU attention runs without cuDNN, for all contestants: while a cache grows it is by far the slowest there is.

A block is greedy calls of the model, the first of them not timed. The clock is the host's; on a GPU it waits for the
device at the ends of a block only, so that launching kernels costs what it costs in use. `wanted` in the printed table
is what was hoped for, and nothing fails that misses it. A setting's rows are written when it has ended.

Beside the time stand the bytes of keys and values that the last step has read, of the whole batch: what is stored,
unless a method reads sparsely; stock reads a full cache. What was measured before they were counted has none.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from kvlib import paths
from kvlib.core.method import budgeted
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import (
    ANCHOR,
    ANCHORED,
    ARGUMENTS,
    CAPTURED,
    DEFAULT,
    FULL,
    LINE,
    RAGGED,
    SAME,
    SETTINGS,
    STOCK,
    SYSTEMS,
    WANTED,
    Setting,
    build,
    method,
)
from kvlib.lab.speed.turns import Contestant, compared, now, take_turns

LIMIT = 30.0  # seconds of decoding for each method; later turns are left out, but for the first two
IDENTITY = ("setting", "device", "method")  # a measurement replaces the rows of an earlier one with the same
SHOWN = (
    "method budget baseline ms_per_token read_bytes baseline_ms ratio ratio_min ratio_max wanted "
    "prefill_ms prefill_ratio"
)


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
    if setting.lined:
        ids[ids == ANCHOR], ids[:, LINE - 1 :: LINE] = ANCHOR + 1, ANCHOR
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

    blocks = {name: partial(x.decode, setting.tokens) for name, x in contestants.items()}
    turns = take_turns(blocks, setting.pairs, clock, LIMIT * len(names))
    return [
        {"method": name, "budget": getattr(methods[name], "budget", None), "baseline": baseline}
        | compared(name, key, turns, "ms_per_token")
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
    model = build(setting.model, setting.device, setting.dtype)
    names, size = setting.methods, setting.together
    shared = {"setting": name} | setting.facts()
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    return [rounded(shared | row | more) for group in groups for row in contest(setting, model, group, clock)]


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
        choices=[*budgeted(), *RAGGED, *ARGUMENTS, *SYSTEMS, *ANCHORED, *(name + CAPTURED for name in budgeted())],
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
    methods = tuple(dict.fromkeys(given.methods)) if given.methods else None
    changes = {"methods": methods, "pairs": given.pairs, "tokens": given.tokens}
    for name in ["tiny"] if given.tiny else given.settings:
        setting = replace(SETTINGS[name], **{key: value for key, value in changes.items() if value})
        if setting.device == "cuda" and device == "cpu":
            parser.error(f"{name} needs a GPU")
        rows = measure(name, setting, now, command=command(parser, argv))
        write(rows, given.out, IDENTITY)
        print(readable(rows))


if __name__ == "__main__":
    main()
