"""The corpus as tokens: one flat uint16 array per kind of text, documents separated by `</s>`.

The arrays travel to the training machine compressed (47 MiB) and are unpacked there once.
"""

import lzma
import os

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from kvlib.minilm import BUILD, MODEL
from kvlib.minilm.corpus import load
from kvlib.minilm.tokenizer import EOS, encode

FOLDER = BUILD / "tokens"
KINDS = ("code", "prose")


def flatten(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one array, each followed by `</s>`."""
    parts = []
    for start in tqdm(range(0, len(texts), 256), desc="tokens"):
        parts += [np.array([*ids, EOS], dtype=np.uint16) for ids in encode(tokenizer, texts[start : start + 256])]
    return np.concatenate(parts)


def build() -> None:
    """Write build/minilm/tokens/<kind>.u16.xz from the training corpus."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        tokens = flatten(tokenizer, load(BUILD / "corpus" / f"train-{kind}.jsonl"))
        path = FOLDER / f"{kind}.u16.xz"
        path.write_bytes(lzma.compress(tokens.tobytes(), preset=6))
        path.with_suffix("").unlink(missing_ok=True)  # an unpacked copy of older tokens
        print(f"{kind:6} {len(tokens) / 1e6:6.2f} M tokens, {path.stat().st_size / 2**20:5.1f} MiB")


def load_tokens(kind: str) -> np.ndarray:
    """The array of one kind, memory-mapped; unpacked on first use. Raises FileNotFoundError with the command."""
    packed = FOLDER / f"{kind}.u16.xz"
    flat = packed.with_suffix("")
    if not flat.is_file():
        if not packed.is_file():
            raise FileNotFoundError(f"{packed.name} is missing; make it with: python -m kvlib.minilm tokens")
        part = flat.with_suffix(f".{os.getpid()}")  # ranks unpack side by side; the last rename wins
        part.write_bytes(lzma.decompress(packed.read_bytes()))
        part.replace(flat)
    return np.memmap(flat, dtype=np.uint16, mode="r")
