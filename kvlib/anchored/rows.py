"""What all arms of a model learn from: rows of tokens of the same text, without anchors, which `train` plants.

Of four rows two are source text, one retrieval tasks (those of minilm's training) and one functions. A row holds as
many whole lines as fit with an anchor behind each. Row g depends on (model, g) alone. Text is tokenised line by line,
as it has to be where anchors stand, and for arms without anchors as it is.
"""

import hashlib
import json
import lzma
import math
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import kvlib
from kvlib.anchored import BUILD
from kvlib.anchored.arms import LONGEST, Arm
from kvlib.lab import functions
from kvlib.lab.tasks import SHORTEST, Draw, Filler, compose, draft
from kvlib.methods.anchors import plant, split
from kvlib.minilm import BUILD as CORPUS
from kvlib.minilm import corpus
from kvlib.minilm.data import LEAST, MIX, QUESTIONS
from kvlib.minilm.schedule import Schedule
from kvlib.minilm.tokenizer import encode

TEXT = BUILD / "text.jsonl.xz"
PACKED_BYTES = 12 * 2**20  # what may travel to a machine with a GPU
UNWRITTEN = 200_000  # bytes that the packer has read and not yet written
DOCUMENT_CHARACTERS = 60_000  # longer files are cut: more packages
END = {"minilm": "</s>", "smollm2": "<|endoftext|>"}
SPECIAL = ("<s>", "</s>", "<pad>", "<ANCHOR>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>")
ANSWER = 4  # weight of a token of an answer
KINDS = ("text", "retrieval", "text", "functions")  # of rows g = 0, 1, 2, 3, ...

Segments = list[tuple[str, int]]  # text and weight; "" ends a document


def pack() -> None:
    """Write files of minilm's training corpus, in the order of a lot, as many as fit into `PACKED_BYTES`."""
    texts = corpus.load(CORPUS / "corpus" / "train-code.jsonl")
    random.Random(0).shuffle(texts)
    BUILD.mkdir(parents=True, exist_ok=True)
    packer, packed, files, size = lzma.LZMACompressor(preset=6), b"", 0, 0
    for text in tqdm(texts, desc="text"):
        if not any(token in text for token in SPECIAL):
            packed += packer.compress((json.dumps(text[:DOCUMENT_CHARACTERS]) + "\n").encode())
            files, size = files + 1, size + len(text[:DOCUMENT_CHARACTERS])
            if len(packed) > PACKED_BYTES - UNWRITTEN:
                break
    TEXT.write_bytes(packed + packer.flush())
    print(f"{files} of {len(texts)} files, {size / 1e6:.0f} MB, {TEXT.stat().st_size / 2**20:.1f} MiB packed")


def build(base: str, schedule: Schedule, processes: int) -> None:
    """Write the rows of a schedule's steps as arrays: tokens, weights and where rows start, line by line and as it is.

    Raises FileNotFoundError with the command that makes the text.
    """
    if not TEXT.is_file():
        raise FileNotFoundError(f"{TEXT.name} is missing; make it with: python -m kvlib.anchored text")
    count, folder = schedule.first(schedule.steps), BUILD / "rows" / base
    context = multiprocessing.get_context("fork")
    # Not `multiprocessing.Pool`, which starts processes for ever if `start` fails in them.
    with ProcessPoolExecutor(processes, context, start, (base, schedule)) as pool:
        tables = [g for g in range(count) if KINDS[g % len(KINDS)] != "text"]
        drawn = pool.map(row, tables, chunksize=16)
        writer = Writer(base)  # behind the fork, but before rows are waited for: here an error says what is wrong
        made = dict(zip(tables, tqdm(drawn, desc="rows", total=len(tables))))
        texts = writer.texts(load_text(), (length_of(g, schedule) for g in range(count) if g not in made))
        made |= dict(zip((g for g in range(count) if g not in made), texts))
        rows = pool.map(both, (made[g] for g in range(count)), chunksize=64)
        found = list(tqdm(rows, desc="tokens", total=count))
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in zip(("lines", "plain"), zip(*found)):
        np.save(folder / f"{name}-ids.npy", np.concatenate([ids for ids, _ in each]))
        np.save(folder / f"{name}-weights.npy", np.concatenate([weights for _, weights in each]))
        np.save(folder / f"{name}-starts.npy", np.cumsum([0, *(len(ids) for ids, _ in each)]))


def length_of(g: int, schedule: Schedule) -> int:
    return schedule.short if g < schedule.first(schedule.short_steps) else schedule.length


def load_text() -> list[str]:
    with lzma.open(TEXT, "rt") as file:
        return [json.loads(line) for line in file]


class Writer:
    """Makes rows for one model's tokenizer."""

    def __init__(self, base: str):
        _, self.tokenizer = kvlib.load(base)
        self.begin, self.end = self.tokenizer("").input_ids, self.tokenizer.convert_tokens_to_ids(END[base])

    def lines(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, line by line."""
        pieces = [*map(split, texts)]
        flat = encode(self.tokenizer, [piece for each in pieces for piece in each])
        found = iter(flat)
        return [[token for _ in each for token in next(found)] for each in pieces]

    def cost(self, texts: list[str]) -> list[int]:
        """Tokens of each text with its anchors, or a few more: lines are not looked at one by one."""
        return [len(ids) + text.count("\n") + len(ids) // LONGEST for ids, text in zip(self.lines(texts), texts)]

    def texts(self, documents: list[str], lengths: Iterator[int]) -> Iterator[Segments]:
        """Rows of consecutive lines of the documents, which begin anew when all have been read."""
        length, row, used = next(lengths), [], len(self.begin)
        while True:
            for document in documents:
                lines = split(document)
                for line, cost in zip(lines, self.cost(lines)):
                    if used + cost + 1 > length:
                        yield row
                        row, used, length = [], len(self.begin), next(lengths, 0)
                        if not length:
                            return
                    row.append((line, 1))
                    used += cost
                row.append(("", 1))
                used += 1

    def retrieval(self, rng: random.Random, length: int, filler: Filler) -> Segments:
        """Retrieval tasks of mixed lengths, as in minilm's training (`kvlib.minilm.data`)."""
        row, left = [], length - len(self.begin)
        while left >= LEAST:
            tokens = left if rng.random() < 1 / 3 else round(math.exp(rng.uniform(math.log(LEAST), math.log(left))))
            if left - tokens < LEAST:  # too little would remain for another task
                tokens = left
            (task,) = rng.choices(list(MIX), MIX.values())
            drawn = draft(task, tokens, Draw(rng, "train"))
            asked = drawn.questions[: max(1, min(QUESTIONS, tokens // SHORTEST))]
            parts = [(text, weight) for q, a in asked for text, weight in ((q, 1), (a, ANSWER), ("\n", 1))]
            room = tokens - 1 - sum(self.cost([text for text, _ in parts]))
            context = compose(drawn, room, rng, filler, self.cost, ends=True)
            row += [(context, 1), *parts, ("", 1)]
            left -= 1 + sum(self.cost([context, *(text for text, _ in parts)]))
        return row

    def functions(self, rng: random.Random, length: int) -> Segments:
        """As many functions as there is room for, each a document."""
        row, left = [], length - len(self.begin)
        while True:
            text = functions.problem(rng.randrange(2**48), "train").text
            left -= self.cost([text])[0] + 1
            if left < 0:
                return row
            row += [(text, 1), ("", 1)]

    def ids(self, row: Segments, line_by_line: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of a row; as it is, neighbours of one weight are tokenised together."""
        if not line_by_line:
            merged = []
            for text, weight in row:
                if merged and text and merged[-1][0] and merged[-1][1] == weight == 1:
                    merged[-1] = (merged[-1][0] + text, weight)
                else:
                    merged.append((text, weight))
            row = merged
        texts = [text for text, _ in row]
        found = self.lines(texts) if line_by_line else encode(self.tokenizer, texts)
        ids, weights = [*self.begin], [1] * len(self.begin)
        for tokens, (text, weight) in zip(found, row):
            ids += tokens if text else [self.end]
            weights += [weight] * (len(tokens) if text else 1)
        return np.array(ids, dtype=np.uint16), np.array(weights, dtype=np.uint8)


worker = None  # of a process of the pool: its writer, the schedule and the text between facts


def start(base: str, schedule: Schedule) -> None:
    global worker
    worker = Writer(base), schedule, Filler("\n".join(load_text()))


def row(g: int) -> Segments:
    writer, schedule, filler = worker
    rng, length = random.Random(f"anchored {g}"), length_of(g, schedule)
    if KINDS[g % len(KINDS)] == "retrieval":
        return writer.retrieval(rng, length, filler)
    return writer.functions(rng, length)


def both(row: Segments) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    writer, _, _ = worker
    return writer.ids(row, True), writer.ids(row, False)


class Rows(Dataset):
    """Item n of an arm: (ids (length,) int64, weights (length,) float32), anchors planted, in the order of its seed.

    Rows of an arm whose anchors do not mind lines may not fit: what is too long is cut. The space behind shorter ones
    is filled with ends of documents of weight 0, which no token before them sees.
    """

    def __init__(self, arm: Arm, tokenizer, planted: dict | None):
        self.recipe, self.planted, folder = arm.schedule, planted, BUILD / "rows" / arm.base
        name = "plain" if planted is None else "lines"
        if not (folder / f"{name}-ids.npy").is_file():
            raise FileNotFoundError(f"{folder} has no rows; make them with: python -m kvlib.anchored rows")
        self.ids, self.weights = (np.load(folder / f"{name}-{each}.npy", "r") for each in ("ids", "weights"))
        self.starts = np.load(folder / f"{name}-starts.npy")
        self.end = tokenizer.convert_tokens_to_ids(END[arm.base])
        rng, first = np.random.default_rng(arm.seed), self.recipe.first(self.recipe.short_steps)
        self.order = np.concatenate([rng.permutation(first), first + rng.permutation(len(self) - first)])

    def __len__(self) -> int:
        return self.recipe.first(self.recipe.steps)

    def digest(self) -> str:
        """A hash of tokens, weights and what is planted."""
        digest = hashlib.sha256(json.dumps(self.planted, sort_keys=True).encode())
        for array in (self.ids, self.weights, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.order[n]
        at, length = slice(self.starts[g], self.starts[g + 1]), length_of(g, self.recipe)
        ids, weights = self.ids[at].astype(np.int64), self.weights[at].astype(np.float32)
        if self.planted is not None:
            anchor, ends, longest = (self.planted[name] for name in ("anchor", "ends", "longest"))
            planted = np.array(plant(ids.tolist(), anchor, set(ends), longest))
            spread = np.ones(len(planted), dtype=np.float32)
            spread[planted != anchor] = weights
            ids, weights = planted, spread
        missing = max(0, length - len(ids))
        ids, weights = np.pad(ids, (0, missing), constant_values=self.end), np.pad(weights, (0, missing))
        return torch.from_numpy(ids[:length]), torch.from_numpy(weights[:length])
