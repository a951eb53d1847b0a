"""Training sequences: even ones are source text (one in twenty is prose), odd ones retrieval tasks.

Sequence `g` of a run, counted through its short and its long phase, depends on (seed, g) alone, so any number of ranks
or workers, and a resumed run, see the same data. Each sequence starts with the only BOS in it; documents inside are
separated by `</s>`.
"""

import hashlib
import json
import math
import random
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from kvlib.lab import definitions
from kvlib.lab.tasks import CATALOGUE, SHORTEST, Draw, compose, draft
from kvlib.minilm import MODEL
from kvlib.minilm.recipe import Recipe
from kvlib.minilm.tokenizer import BOS, EOS, PAD, encode
from kvlib.minilm.tokens import load_tokens

PROSE_EVERY = 20
LEAST = 3 * SHORTEST // 2  # tokens of a task
# How often each family occurs: more of what needs two steps or gathers, less of what the others teach on the way.
MIX = {name: 1.0 for name, family in CATALOGUE.items() if family.trained and name != "distance"}
MIX |= {"file_lookup": 3.0, "where_defined": 3.0, "collect": 2.0, "exports": 2.0, "count": 1.5}
MIX |= {"needle": 0.5, "label": 0.5}
QUESTIONS = 8  # asked of one context at most: more answers to learn from for the same context


class TokenFiller:
    """Filler lines (see `kvlib.lab.tasks.Filler`) cut from a token array instead of from a text."""

    def __init__(self, tokens: np.ndarray, tokenizer):
        self.tokens, self.backend = tokens, tokenizer.backend_tokenizer

    def lines(self, rng: random.Random, tokens: int) -> list[str]:
        size = tokens + tokens // 8 + 600  # the cut lines and the lines that will not fit
        start = rng.randrange(max(1, len(self.tokens) - size))
        return self.backend.decode(self.tokens[start : start + size].tolist()).split("\n")[1:-1]


class Sequences(Dataset):
    """Item g: (ids (length,) int64, weights (length,) float32); a weight is that of predicting this token."""

    def __init__(self, recipe: Recipe, code: np.ndarray, prose: np.ndarray, tokenizer):
        self.recipe, self.code, self.prose, self.tokenizer = recipe, code, prose, tokenizer
        self.filler = TokenFiller(code, tokenizer)

    def __len__(self) -> int:
        return self.recipe.first(self.recipe.steps)

    def digest(self) -> str:
        """A hash of what the sequences follow from beside the recipe: tokens, tokenizer, and the code of the tasks."""
        made_by = map(definitions.name_of, (Sequences, draft, *(CATALOGUE[task].make for task in MIX)))
        parts = [definitions.digest(*made_by), json.dumps(MIX), self.tokenizer.backend_tokenizer.to_str()]
        digest = hashlib.sha256("\n".join(parts).encode())
        digest.update(self.code.tobytes())
        digest.update(self.prose.tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text windows are counted anew in the long phase: its epochs are its own."""
        switch = self.recipe.first(self.recipe.short_steps)
        start, length = (0, self.recipe.short) if g < switch else (switch, self.recipe.length)
        ids, weights = self.retrieval(g, length) if g % 2 else self.text(g // 2 - (start + 1) // 2, length)
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def text(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Window `index` of the source text: every window once an epoch, in a new order and cut at other places."""
        before = index // PROSE_EVERY  # prose windows so far
        is_prose = index % PROSE_EVERY == PROSE_EVERY - 1
        tokens, nth = (self.prose, before) if is_prose else (self.code, index - before)
        size = length - 1
        windows = len(tokens) // size - 1  # one less, so that a shifted window still fits
        epoch, place = divmod(nth, windows)
        shift, order = epoch_order(self.recipe.seed, is_prose, epoch, windows, size)
        start = shift + order[place] * size
        ids = np.concatenate([[BOS], tokens[start : start + size]]).astype(np.int64)
        return ids, np.ones(len(ids), dtype=np.float32)

    def retrieval(self, g: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Retrieval tasks of mixed lengths, packed; the space that is left over is padding of weight 0."""
        rng = random.Random(f"{self.recipe.seed} {g}")
        ids, weights = [BOS], [1.0]
        while (left := length - len(ids)) >= LEAST:
            tokens = left if rng.random() < 1 / 3 else round(math.exp(rng.uniform(math.log(LEAST), math.log(left))))
            if left - tokens < LEAST:  # too little would remain for another task
                tokens = left
            for part, weight in self.task(rng, tokens - 1):
                ids += part
                weights += [weight] * len(part)
            ids.append(EOS)
            weights.append(1.0)
        missing = length - len(ids)
        ids += [PAD] * missing
        weights += [0.0] * missing
        return np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32)

    def task(self, rng: random.Random, tokens: int) -> list[tuple[list[int], float]]:
        """One context with several questions, at most `tokens` tokens: [(ids, weight), ...]."""
        (task,) = rng.choices(list(MIX), MIX.values())
        drawn = draft(task, tokens, Draw(rng, "train"))
        asked = drawn.questions[: max(1, min(QUESTIONS, tokens // SHORTEST))]
        texts = [text for question, answer in asked for text in (question, answer, "\n")]
        parts = encode(self.tokenizer, texts)
        room = tokens - sum(map(len, parts))
        context = compose(drawn, room, rng, self.filler, self.count, ends=True)
        parts = encode(self.tokenizer, [context]) + parts
        return [(ids, self.recipe.answer_weight if i % 3 == 2 else 1.0) for i, ids in enumerate(parts)]

    def count(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in encode(self.tokenizer, texts)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, is_prose: bool, epoch: int, windows: int, size: int) -> tuple[int, np.ndarray]:
    """How far the windows of an epoch are shifted, and their order."""
    rng = np.random.default_rng([seed, is_prose, epoch, size])
    return int(rng.integers(size)), rng.permutation(windows)


def load_sequences(recipe: Recipe) -> Sequences:
    """The sequences of the built corpus. Raises FileNotFoundError with the command that builds it."""
    return Sequences(recipe, load_tokens("code"), load_tokens("prose"), AutoTokenizer.from_pretrained(MODEL))


def loader(sequences: Sequences, first_step: int, rank: int, world: int, workers: int) -> DataLoader:
    """Batches of this rank from `first_step` on: each step's sequences are dealt out in contiguous shares."""
    recipe = sequences.recipe
    shares = []
    for step in range(first_step, recipe.steps):
        share = recipe.shape(step)[0] // world
        start = recipe.first(step) + rank * share
        shares.append(range(start, start + share))
    return DataLoader(
        sequences,
        batch_sampler=shares,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
