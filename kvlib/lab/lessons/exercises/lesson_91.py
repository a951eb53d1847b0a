"""Exercises of 91_performance."""

import itertools
import math

from kvlib.lab.checks import expect, number

MODELS = {  # weight bytes of a step, layers, KV heads, head_dim
    "Llama-3.1-8B": (15_009_849_344, 32, 8, 128),
    "Llama-2-7B": (13_214_687_232, 32, 32, 128),
    "a small model": (200_000_000, 30, 3, 64),
}


def check_ideal_ms(function) -> None:
    """`function(weight_bytes, layers, kv_heads, head_dim, tokens, batch, gb_per_s)`: ms of a step."""
    for (name, shape), tokens, batch, rate in itertools.product(MODELS.items(), (1000, 65_536), (1, 6), (50.0, 4100.0)):
        weights, layers, heads, dim = shape
        found = number(function(*shape, tokens, batch, rate), "ideal_ms")
        entry = 2 * 2 * layers * heads * dim
        cache = batch * tokens * entry
        expected = (weights + cache) / rate / 1e6
        hints = {
            (weights + cache / 2) / rate / 1e6: "; a token has a key and a value, 16 bits an entry",
            (weights + 2 * cache) / rate / 1e6: "; an entry has 16 bits, two bytes",
            (weights + cache / batch) / rate / 1e6: "; every text has a cache of its own",
            batch * expected: "; the weights are read once for the whole batch",
            (batch * weights + cache) / rate / 1e6: "; the weights are read once for the whole batch",
            (weights + cache / layers) / rate / 1e6: "; every layer has a cache",
            (weights + cache / heads) / rate / 1e6: "; every KV head has keys and values",
            cache / rate / 1e6: "; the weights are read, too",
            expected / 1e3: "; milliseconds are asked for",
            expected * 1e6: "; GB/s are a million bytes a millisecond",
            expected * 1e3: "; a GB is a billion bytes, and a second a thousand milliseconds",
            expected * 1e9 / 2**30: "; a GB is a billion bytes, not a GiB",
        }
        close = (hint for wrong, hint in hints.items() if math.isclose(found, wrong, rel_tol=1e-6))
        case = f"{name}, {batch} x {tokens} tokens, {rate:g} GB/s"
        right = math.isclose(found, expected, rel_tol=1e-6)
        expect(right, f"{case}: {expected:.4g} ms are expected, found {found:.4g}{next(close, '')}")
    print("ideal_ms is right")


def check_speed_up(function) -> None:
    """`function(no_context_ms, cache_bytes, share, gb_per_s)`: how many times faster."""
    for bare, cache, share, rate in itertools.product((4.9, 7.4), (1e9, 6.9e10), (0.2, 1.0), (4170.0, 2000.0)):
        found = number(function(bare, cache, share, rate), "speed_up")
        whole = cache / rate / 1e6
        expected = (bare + whole) / (bare + share * whole)
        hints = {
            1 / expected: "; that is how many times slower: time before over time after",
            1 / share: "; what does not shrink with the cache takes time, too",
            (bare + whole) / (bare + (1 - share) * whole): "; `share` is what is still read",
            (bare + whole) / (share * whole): "; after it the weights are still read",
            whole / (bare + share * whole): "; before it the weights are read, too",
        }
        scaled = {factor * whole for factor in (1e6, 1e3, 1e-3)}
        hints |= {(bare + x) / (bare + share * x): "; GB/s are a million bytes a millisecond" for x in scaled}
        close = (hint for wrong, hint in hints.items() if math.isclose(found, wrong, rel_tol=1e-9))
        case = f"{bare} ms without a context, {cache / 1e9:g} GB, share {share}, {rate:g} GB/s"
        right = math.isclose(found, expected, rel_tol=1e-9)
        expect(right, f"{case}: {expected:.4f} is expected, found {found:.4f}{next(close, '')}")
    print("speed_up is right")


def check_largest_batch(function) -> None:
    """`function(memory, weight_bytes, token_bytes, tokens, share, answer)`: texts that fit."""
    cases = itertools.product((80e9, 150e9), (13.2e9, 90e9), (524_288, 131_072), (1000, 8192), (1.0, 0.0474), (0, 256))
    for memory, weights, token, tokens, share, answer in cases:
        found = number(function(memory, weights, token, tokens, share, answer), "largest_batch")
        held = int(share * tokens) + answer
        exact = (memory - weights) / (held * token)
        expected = max(0, math.floor(exact))
        hints = {
            max(0, math.ceil(exact)): "; the last one does not fit as a whole",
            max(0, math.floor(memory / (held * token))): "; the weights need room",
            max(0, math.floor(memory / (weights + held * token))): "; the weights are there once",
            max(
                0, math.floor((memory - weights) / max(1, int(share * tokens) * token))
            ): "; the answer is stored whole",
            max(0, math.floor((memory - weights) / max(1, int(share * (tokens + answer)) * token))): (
                "; of the answer nothing is evicted"
            ),
            max(0, math.floor((memory - weights) / ((tokens + answer) * token))): "; of the text a share is left",
            max(
                0, math.floor((memory - weights) / ((share * tokens + answer) * token))
            ): "; a share of a token is not kept",
            math.floor(exact): "; no batch is smaller than none",
        }
        hint = next((hint for wrong, hint in hints.items() if found == wrong), "")
        case = (
            f"{memory / 1e9:g} GB, weights {weights / 1e9:g} GB, {token} bytes a token, {tokens} tokens, share {share}"
        )
        case += f", an answer of {answer}"
        expect(found == expected, f"{case}: {expected} are expected, found {found:g}{hint}")
    print("largest_batch is right")
