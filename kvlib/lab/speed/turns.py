"""Contestants that share a model and are timed in turn, A B C A B C ..., so that a drift of the machine hits all alike.

A ratio is taken turn by turn: given are the median, the least and the greatest of these pairs.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from statistics import median

import torch
from tqdm import tqdm


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


def take_turns(blocks: dict[str, Callable[[], float]], pairs: int, clock: Callable[[], float], limit: float) -> list:
    """For every turn the seconds that each contestant's block gives; no new turn after `limit` seconds and two turns.

    Returns:
        A dict for each turn, contestant -> seconds.
    """
    turns, begin = [], clock()
    for _ in tqdm(range(pairs), desc="turns", leave=False, disable=None):
        if len(turns) < 2 or clock() - begin < limit:
            turns.append({name: block() for name, block in blocks.items()})
    return turns


def compared(name: str, baseline: str, turns: list[dict], column: str) -> dict:
    """Columns of a contestant against a baseline: milliseconds in `column`, and the ratio of the two in each turn."""
    ms = spread(column, [1e3 * turn[name] for turn in turns])
    ratio = spread("ratio", [turn[name] / turn[baseline] for turn in turns])
    return ms | {"baseline_ms": 1e3 * median(turn[baseline] for turn in turns)} | ratio | {"pairs": len(turns)}


def spread(name: str, values: list[float]) -> dict:
    """Columns with the median, the least and the greatest."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def now() -> float:
    """The host's clock in seconds, once the device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
