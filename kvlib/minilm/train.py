"""Training: plain AdamW on next-token prediction, on one CPU or on several GPUs under torchrun.

After initialisation nothing draws a random number outside `data.py`, where sequence g is a function of (seed, g). A
checkpoint therefore needs weights, optimiser and step only, and a resumed run continues the identical loss curve.
"""

import csv
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import LlamaForCausalLM

from kvlib.minilm.data import Sequences, loader
from kvlib.minilm.recipe import Recipe
from kvlib.minilm.report import heldout_windows, text_targets, token_losses

COLUMNS = ("step", "tokens", "loss", "answer_loss", "lr", "tokens_per_second", "heldout_loss")
HELDOUT_WINDOWS = 16  # enough for a curve; the final evaluation takes all
HELDOUT_EVERY = 250  # steps


def optimizer(model, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay on matrices only; embeddings (tied to the output) and norms are left alone."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def losses(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(training loss, summed loss of answer tokens, their number) from logits (B, T, V), ids and weights (B, T).

    The training loss is divided by the number of positions, not by the sum of weights, so that the mean over ranks is
    the loss of the whole step.
    """
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    answers = (weights > 1).float()
    return (each * weights).mean(), (each * answers).sum(), answers.sum()


def compile_layers(model) -> None:
    """Compile layer by layer, in place, which leaves the names of the weights as they are.

    Where the whole model is traced, transformers builds a causal mask, and a mask keeps flash attention out: 123 ms a
    step instead of 29 (32,768 tokens, H200), and twice the time to compile. Both lengths are compiled for themselves.
    """
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    model.model.norm.compile(dynamic=False)


class Run:
    """A folder with `checkpoint.pt`, `curve.csv` and at last `training.json`; `data` is a hash of what is learnt."""

    def __init__(self, folder: Path, recipe: Recipe, data: str):
        self.folder, self.recipe, self.data = folder, recipe, data
        self.checkpoint, self.curve = folder / "checkpoint.pt", folder / "curve.csv"
        self.rows = []

    def resume(self, model, adamw) -> tuple[int, float]:
        """(first step, seconds spent so far). Raises ValueError when the folder holds another recipe's run."""
        if not self.checkpoint.is_file():
            return 0, 0.0
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{self.folder} holds a run of another recipe; choose another --out")
        if state["data"] != self.data:
            raise ValueError(f"{self.folder} holds a run on other tasks, tokens or tokenizer; choose another --out")
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])
        with self.curve.open() as file:
            self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= state["step"]]
        return state["step"], state["seconds"]

    def save(self, model, adamw, step: int, seconds: float) -> None:
        state = {"model": model.state_dict(), "optimizer": adamw.state_dict(), "recipe": asdict(self.recipe)}
        state["data"] = self.data
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")  # a run killed while writing keeps the older checkpoint
        torch.save(state | {"step": step, "seconds": seconds}, part)
        part.replace(self.checkpoint)

    def log(self, row: dict) -> None:
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.curve.with_suffix(".csv.part")  # a run killed while writing keeps the older rows
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.curve)


def train(
    sequences: Sequences, folder: Path, minutes: float, workers: int, log_every: int = 10, save_every: int = 500
) -> bool:
    """Train on `sequences` by their recipe, or go on with the run in `folder`; True when all steps are done.

    After `minutes` a resumable checkpoint is written and False returned. Raises ValueError when the sequences of a
    step cannot be dealt out evenly over the ranks.
    """
    started = time.monotonic()
    recipe = sequences.recipe
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if recipe.sequences % world:
        raise ValueError(f"{recipe.sequences} sequences a step cannot be shared by {world} processes")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(recipe.config()).to(device)
    adamw = optimizer(model, recipe)
    run = Run(folder, recipe, sequences.digest())
    first, spent = run.resume(model, adamw)
    if first == recipe.steps and (folder / "training.json").is_file():
        return True  # as finished before: this start would count as training, on this machine
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        compile_layers(model)
    loss_of = torch.compile(losses, dynamic=False) if cuda else losses
    forward = DistributedDataParallel(model) if world > 1 else model
    windows = heldout_windows("code", recipe.length)[:HELDOUT_WINDOWS]

    def finish(step: int) -> None:
        if rank == 0:
            run.save(model, adamw, step, spent + time.monotonic() - started)
        if world > 1:
            dist.barrier()
            time.sleep(0.2)  # gloo's thread needs the interpreter to drop the barrier's tensor, or its end never comes
            dist.destroy_process_group()

    step, since, lap = first, first, time.monotonic()
    batches = loader(sequences, first, rank, world, workers)
    for ids, weights in tqdm(batches, initial=first, total=recipe.steps, desc="train", disable=rank > 0 or None):
        ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        for group in adamw.param_groups:
            group["lr"] = recipe.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss, answer_loss, answers = loss_of(forward(input_ids=ids, use_cache=False).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        step += 1

        if step % log_every == 0 or step == recipe.steps:
            late = torch.tensor(float(time.monotonic() - started > 60 * minutes), device=device)
            totals = torch.stack([loss.detach() / world, answer_loss.detach(), answers, late])
            if world > 1:  # every rank must see the same sum, or one would stop without the others
                dist.all_reduce(totals)
            mean_loss, answer_loss, answers, late = totals.tolist()
            if rank == 0:
                per_step = recipe.sequences * recipe.length
                row = {"step": step, "tokens": step * per_step, "loss": mean_loss}
                row |= {"answer_loss": answer_loss / max(1, answers), "lr": recipe.rate(step - 1)}
                row |= {"tokens_per_second": round((step - since) * per_step / (time.monotonic() - lap))}
                if step % HELDOUT_EVERY == 0 or step == recipe.steps:
                    with torch.compiler.set_stance("force_eager"):  # not worth compiling
                        row["heldout_loss"] = token_losses(model, windows)[text_targets(windows)].mean().item()
                run.log(row)
            since, lap = step, time.monotonic()
            if late and step < recipe.steps:
                finish(step)
                return False
        if step % save_every == 0 and rank == 0 and step < recipe.steps:
            run.save(model, adamw, step, spent + time.monotonic() - started)

    finish(step)
    if rank == 0:
        write_summary(run, model, spent + time.monotonic() - started, device, world)
    return True


def write_summary(run: Run, model, seconds: float, device: torch.device, world: int) -> None:
    """What the model card needs to know about how the model was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    summary = {
        "recipe": asdict(run.recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": run.data,
        "tokens": run.recipe.steps * run.recipe.sequences * run.recipe.length,
        "hardware": f"{world} x {name}",
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (run.folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
