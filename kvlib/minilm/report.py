"""What the model card reports: loss on the shipped held-out text, tasks by family and length, where attention goes."""

import json
import math
import multiprocessing
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlib.lab.tasks import DROPPED, FAMILIES, Prompt, find, judge, sample
from kvlib.lab.tasks.probes import DISTANCES
from kvlib.minilm import HELDOUT, MODEL
from kvlib.minilm.corpus import load
from kvlib.minilm.heads import attention_report
from kvlib.minilm.tokenizer import BOS, EOS, PAD
from kvlib.minilm.tokens import flatten

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ATTENTION_WINDOWS, ATTENTION_LENGTH = 8, 1024


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


@dataclass(frozen=True)
class Cell:
    """One number of the report: a family at a length, with one option of it where it is swept."""

    task: str
    length: int
    option: tuple[tuple[str, float], ...] = ()


def cells(lengths: tuple[int, ...]) -> list[Cell]:
    """All families and the long answers by length; needles by length and depth; definitions by distance; floors.

    The floor of the group "code" is what is completed without the source. At lengths too short for them, completions of
    real code are left out.
    """
    families = [Cell(task, length) for task in (*FAMILIES, *DROPPED, "long_generation") for length in lengths]
    needles = [Cell("needle", length, (("depth", depth),)) for length in lengths for depth in DEPTHS]
    distances = [Cell("distance", max(lengths), (("lines", lines),)) for lines in DISTANCES]
    floors = [Cell(c.task, c.length, (("source", False),)) for c in families if find(c.task).group == "code"]
    every = families + needles + distances + floors
    return [c for c in every if c.length >= find(c.task).shortest]


def draw(job: tuple[Cell, int]) -> Prompt:
    cell, seed = job
    return sample(cell.task, cell.length, seed, tokenizer=load_tokenizer(), **dict(cell.option))


@torch.no_grad()
def answered(model, drawn: list[Prompt], size: int) -> list[float]:
    """Share of each answer's lines that greedy decoding gets right before its first mistake: 1 or 0 for one line.

    One forward pass over prompt and answer tells what greedy decoding would give: every answer token must be the most
    likely one after those before it, and the token after the answer must not continue it.
    """
    tokenizer, shares = load_tokenizer(), []
    for start in tqdm(range(0, len(drawn), size), desc="answers"):
        batch = drawn[start : start + size]
        prompts = [[*chain(*prompt.ids(tokenizer))] for prompt in batch]
        answers = [prompt.answer_ids(tokenizer) for prompt in batch]
        rows = [p + a for p, a in zip(prompts, answers)]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for i, row in enumerate(rows):  # padding on the right is never seen by a causal model's earlier positions
            ids[i, : len(row)] = torch.tensor(row)
        ids = ids.to(model.device)
        # Without a mask grouped queries in float32 would go to CUDA's unfused attention, at gigabytes a layer.
        best = model(input_ids=ids, attention_mask=ids != PAD, use_cache=False).logits.argmax(-1).cpu()
        for asked, row, prompt, answer in zip(batch, best.tolist(), prompts, answers):
            shares.append(judge(asked, row[len(prompt) - 1 : len(prompt) + len(answer)], tokenizer))
    return shares


def retrieval(model, lengths: tuple[int, ...], samples: int) -> list[dict]:
    """One record per cell: task, length, its option, score (mean of `answered`), n; a quarter of n by depth."""
    sizes = {
        cell: max(1, samples // 4) if dict(cell.option).keys() == {"depth"} else samples for cell in cells(lengths)
    }
    jobs = [(cell, seed) for cell, size in sizes.items() for seed in range(size)]
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count())) as pool:
        drawn = list(tqdm(pool.imap(draw, jobs, chunksize=8), total=len(jobs), desc="samples"))
    shares = iter(answered(model, drawn, 16 if model.device.type == "cuda" else 1))
    return [
        {"task": cell.task, "length": cell.length, **dict(cell.option)}
        | {"score": sum(next(shares) for _ in range(size)) / size, "n": size}
        for cell, size in sizes.items()
    ]


def report(folder: Path, samples: int, lengths: tuple[int, ...] = LENGTHS) -> dict:
    """Evaluate the exported model in `folder` in float32; writes `evaluation.json` and `attention.csv` beside it."""
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    result = {
        "heldout": {kind: heldout_loss(model, kind) for kind in ("code", "prose")},
        "retrieval": retrieval(model, lengths, samples),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    windows = heldout_windows("code", min(ATTENTION_LENGTH, model.config.max_position_embeddings))
    windows = windows[:: max(1, len(windows) // ATTENTION_WINDOWS)][:ATTENTION_WINDOWS]
    heads = attention_report(model, load_tokenizer(), windows)
    heads.round(5).to_csv(folder / "attention.csv", index=False, lineterminator="\n")
    return result
