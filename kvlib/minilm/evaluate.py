"""What the model card reports: loss on the shipped held-out text, retrieval by task and length, attention sinks."""

import json
import math
import multiprocessing
import os
import re
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib.lab.tasks import TASKS, Sample, sample
from kvlib.minilm import HELDOUT, MODEL
from kvlib.minilm.corpus import load
from kvlib.minilm.tokenizer import BOS, EOS, PAD, encode
from kvlib.minilm.tokens import flatten

LENGTHS = (1024, 2048, 4096)
ANSWER_ROOM = 16  # prompt and answer together stay within the model's positions
FIRST_ROW = 32  # rows that see few tokens say nothing about where attention goes


@lru_cache
def load_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@lru_cache
def heldout_windows(kind: str, length: int) -> torch.Tensor:
    """The held-out text as (windows, length) ids: BOS, then consecutive tokens, the last window padded."""
    tokens = flatten(load_tokenizer(), load(HELDOUT / f"{kind}.jsonl"))
    count = math.ceil(len(tokens) / (length - 1))
    windows = np.full((count, length), PAD, dtype=np.int64)
    windows[:, 0] = BOS
    padded = np.full(count * (length - 1), PAD)
    padded[: len(tokens)] = tokens
    windows[:, 1:] = padded.reshape(count, length - 1)
    return torch.from_numpy(windows)


def text_targets(windows: torch.Tensor) -> torch.Tensor:
    """(windows, length - 1) bool: which predicted tokens are text, neither `</s>` nor padding."""
    return (windows[:, 1:] != EOS) & (windows[:, 1:] != PAD)


@torch.no_grad()
def token_losses(model, windows: torch.Tensor, batch: int = 4) -> torch.Tensor:
    """Loss of each predicted token in nats, (windows, length - 1), on the CPU."""
    rows = []
    for ids in tqdm(windows.split(batch), desc="held-out"):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        rows.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
    return torch.cat(rows)


def heldout_loss(model, kind: str) -> dict:
    """Nats a token, characters a token, bits a character over all held-out text of a kind."""
    windows = heldout_windows(kind, model.config.max_position_embeddings)
    losses = token_losses(model, windows)[text_targets(windows)].double()
    characters = sum(map(len, load(HELDOUT / f"{kind}.jsonl")))
    return {
        "tokens": len(losses),
        "nats_per_token": losses.mean().item(),
        "characters_per_token": characters / len(losses),
        "bits_per_character": losses.sum().item() / characters / math.log(2),
    }


def draw(cell: tuple[str, int, int]) -> Sample:
    task, length, seed = cell
    return sample(task, length - ANSWER_ROOM, seed, tokenizer=load_tokenizer())


@torch.no_grad()
def retrieval(model, lengths: tuple[int, ...], samples: int) -> dict[str, dict[int, float]]:
    """Share of right answers by task and length of the prompt.

    One forward pass over prompt and answer tells what greedy decoding would give: every answer token must be the most
    likely one after those before it, and the token after the answer must not continue it.
    """
    cells = list(product(TASKS, lengths, range(samples)))
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count())) as pool:
        drawn = list(tqdm(pool.imap(draw, cells, chunksize=8), total=len(cells), desc="samples"))
    tokenizer, right = load_tokenizer(), {}
    size = 16 if model.device.type == "cuda" else 1
    for start in tqdm(range(0, len(drawn), size), desc="retrieval"):
        batch = drawn[start : start + size]
        prompts = tokenizer([s.prompt for s in batch]).input_ids
        answers = encode(tokenizer, [s.answer for s in batch])
        rows = [p + a for p, a in zip(prompts, answers)]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for i, row in enumerate(rows):  # padding on the right is never seen by a causal model's earlier positions
            ids[i, : len(row)] = torch.tensor(row)
        best = model(input_ids=ids.to(model.device), use_cache=False).logits.argmax(-1).cpu()
        for i, (cell, prompt, answer) in enumerate(zip(cells[start:], prompts, answers)):
            *said, after = best[i, len(prompt) - 1 : len(prompt) + len(answer)].tolist()
            ended = not re.match(r"\w", tokenizer.decode([after]))
            right.setdefault(cell[:2], []).append(said == answer and ended)
    return {task: {n: sum(right[task, n]) / samples for n in lengths} for task in TASKS}


@torch.no_grad()
def attention_mass(model, windows: int = 8, length: int = 1024) -> dict[str, list[list[float]]]:
    """Mean attention mass by kind of key, as [layer][head], over rows from 32 on of held-out code.

    first: the BOS; first_newline: the first newline of the window; newline: all newlines; end: all `</s>`.
    """
    ids = heldout_windows("code", min(length, model.config.max_position_embeddings))
    ids = ids[:: max(1, len(ids) // windows)][:windows].to(model.device)
    newline = ids == encode(load_tokenizer(), ["\n"])[0][0]
    kinds = {
        "first": ids == BOS,
        "first_newline": newline & (newline.cumsum(1) == 1),
        "newline": newline,
        "end": ids == EOS,
    }
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    mass = dict.fromkeys(kinds, 0.0)
    for i, row in enumerate(ids):
        attentions = model(input_ids=row[None], output_attentions=True, use_cache=False).attentions
        received = torch.stack([a[0, :, FIRST_ROW:].float().mean(1) for a in attentions])  # (layers, heads, keys)
        for kind, where in kinds.items():
            mass[kind] += (received * where[i]).sum(-1) / len(ids)
    model.set_attn_implementation(before)
    return {kind: [[round(x, 4) for x in heads] for heads in values.tolist()] for kind, values in mass.items()}


def evaluate(folder: Path, samples: int, lengths: tuple[int, ...] = LENGTHS) -> dict:
    """Evaluate the exported model in `folder` in float32 and write `evaluation.json` beside it."""
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    result = {
        "heldout": {kind: heldout_loss(model, kind) for kind in ("code", "prose")},
        "retrieval": retrieval(model, lengths, samples),
        "samples": samples,
        "attention_mass": attention_mass(model),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    return result
