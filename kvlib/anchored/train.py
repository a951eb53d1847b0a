"""Training of an arm: adapters of low rank on the projections of attention and the anchor's embedding, or all weights.

Nothing but `Rows` draws a random number after the adapters are there, so a checkpoint needs the trained weights, the
optimiser's state and the step only.
"""

import shutil
import time
from contextlib import nullcontext

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

import kvlib
from kvlib import checksums
from kvlib.anchored import ADAPTERS, BUILD, LISTED
from kvlib.anchored.arms import ARMS, SHIPPED, Arm, settings
from kvlib.anchored.rows import Rows
from kvlib.core import adapters
from kvlib.lab.tasks.code import heldout_files
from kvlib.methods.anchor_training import training
from kvlib.methods.anchorcoder import SETTINGS
from kvlib.methods.anchors import anchored
from kvlib.minilm.data import loader
from kvlib.minilm.train import Run, compile_layers, losses
from kvlib.paths import MODELS

LORA = {
    "r": 32,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
EVERY = 20  # steps between entries of a curve
SAVED = 200  # steps between checkpoints
WINDOWS, WINDOW = 24, 4000  # of held-out code, in characters: for the curve and for the choice of a learning rate


class Trained(torch.nn.ParameterDict):
    """The weights of a model that are trained, under their names."""

    def __init__(self, model):
        super().__init__({n.replace(".", "/"): p for n, p in model.named_parameters() if p.requires_grad})


def prepare(arm: Arm, device: str):
    """The model of an arm before its first step, its tokenizer, and the arguments of its adapters.

    The anchor's row of the embedding, which is the head's too, begins as the newline's.
    """
    model, tokenizer = kvlib.load(arm.base)
    model.to(device).train()
    found = settings(arm, tokenizer, model.config.num_hidden_layers)
    setattr(model.config, SETTINGS, found)
    torch.manual_seed(arm.seed)
    lora = None if arm.whole else dict(LORA)
    if found is not None:
        with torch.no_grad():
            rows = model.get_input_embeddings().weight
            rows[found["anchor"]] = rows[tokenizer("\n", add_special_tokens=False).input_ids[0]]
        if lora is not None:
            lora["trainable_token_indices"] = [found["anchor"]]
    if lora is not None:
        import peft  # here, because it takes seconds

        peft.get_peft_model(model, peft.LoraConfig(**lora))  # puts the adapters into `model`
        model.get_input_embeddings().num_embeddings = model.config.vocab_size  # which peft's wrapper does not say
    return model, tokenizer, lora


def attention(model):
    """The attention with which a model is trained: as its configuration says, or its own.

    Masks as they are: by blocks a step took 123 ms instead of 92 with rows of 1024 tokens, and 129 instead of 141 with
    4096 (minilm-TML-4, H200, layers not compiled).
    """
    planted = getattr(model.config, SETTINGS, None)
    return nullcontext() if planted is None else training(model, kvlib.method("anchorcoder"))


def train(name: str, minutes: float, workers: int, device: str = "cuda") -> bool:
    """Train an arm, or go on with it; True when it is done, and its adapter written and listed.

    After `minutes` a checkpoint is written and False returned.
    """
    started, arm = time.monotonic(), ARMS[name]
    schedule, cuda = arm.schedule, device == "cuda"
    model, tokenizer, lora = prepare(arm, device)
    rows = Rows(arm, tokenizer, getattr(model.config, SETTINGS))
    trained, run = Trained(model), Run(BUILD / "runs" / name, schedule, rows.digest())
    options = {"betas": (0.9, 0.95), "weight_decay": schedule.weight_decay, "fused": cuda}
    adamw, per_step = torch.optim.AdamW(trained.values(), schedule.lr, **options), schedule.sequences * schedule.length
    step, spent = run.resume(trained, adamw)
    since, lap = step, time.monotonic()
    cost = losses
    with attention(model):
        if cuda:
            torch.compiler.reset()  # of an arm that this process has trained before
            compile_layers(model)
            cost = torch.compile(losses, dynamic=False)
        bar = tqdm(loader(rows, step, 0, 1, workers), name, total=schedule.steps, initial=step, disable=None)
        for ids, weights in bar:
            ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
            for group in adamw.param_groups:
                group["lr"] = schedule.rate(step)
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                loss, answer_loss, answers = cost(model(ids, use_cache=False).logits, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), schedule.clip)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            step += 1
            if step % EVERY == 0 or step == schedule.steps:
                row = {"step": step, "tokens": step * per_step, "loss": loss.item()}
                row |= {"answer_loss": (answer_loss / answers.clamp(min=1)).item(), "lr": schedule.rate(step - 1)}
                speed = (step - since) * per_step / (time.monotonic() - lap)
                row |= {"tokens_per_second": round(speed)}
                if step == schedule.steps:
                    with torch.compiler.set_stance("force_eager"):  # not worth compiling
                        row["heldout_loss"] = heldout(model, tokenizer)
                run.log(row)
                since, lap = step, time.monotonic()
                late = time.monotonic() - started > 60 * minutes
                if (late or step % SAVED == 0) and step < schedule.steps:
                    run.save(trained, adamw, step, spent + time.monotonic() - started)
                    if late:
                        return False
    run.save(trained, adamw, step, spent + time.monotonic() - started)
    write(name, model, lora, run, spent + time.monotonic() - started)
    return True


@torch.no_grad()
def heldout(model, tokenizer) -> float:
    """Bits per character of held-out code, anchors and what they cost included; inside the training's attention."""
    planted, total, characters = getattr(model.config, SETTINGS), 0.0, 0
    model.eval()
    for file in heldout_files()[:WINDOWS]:
        text = file["text"][:WINDOW]
        ids = anchored(text, tokenizer, planted) if planted else tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([tokenizer("").input_ids + ids], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(ids, use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        characters += len(text)
    model.train()
    return total / characters / torch.tensor(2.0).log().item()


def write(name: str, model, lora: dict | None, run: Run, seconds: float) -> None:
    """Write the adapter of a finished run, or its weights, and list it."""
    arm, found = ARMS[name], getattr(model.config, SETTINGS)
    if lora is None:
        tensors = model.state_dict()
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")  # the embedding again
    else:
        import peft

        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    config = {} if found is None else {SETTINGS: found}
    adapters.write(ADAPTERS / name, arm.base, config, tensors, lora)
    file = ADAPTERS / name / adapters.FILE
    hardware = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    row = {"arm": name, "base": arm.base, "anchors": arm.anchors, "per": arm.per, "mhpe": arm.spread, "laa": arm.second}
    row |= {"weights": "all" if arm.whole else "LoRA", "seed": arm.seed, "steps": run.recipe.steps}
    row |= {"tokens": run.rows[-1]["tokens"], "rows": run.data, "heldout_bits": round(run.rows[-1]["heldout_loss"], 4)}
    row |= {"bytes": file.stat().st_size, "minutes": round(seconds / 60, 1), "hardware": hardware}
    row |= {"torch": torch.__version__, "sha256": checksums.digest(file)}
    pd.DataFrame([row]).to_csv(run.folder / "arm.csv", index=False, lineterminator="\n")


def gather() -> None:
    """List all arms that have been trained here, keep the lines of the others, and ship what is to be shipped."""
    known = [pd.read_csv(LISTED, dtype=str)] if LISTED.is_file() else []
    known += [pd.read_csv(file, dtype=str) for file in (BUILD / "runs").glob("*/arm.csv")]
    arms = pd.concat(known).drop_duplicates("arm", keep="last").set_index("arm")
    arms.loc[[name for name in ARMS if name in arms.index]].to_csv(LISTED, lineterminator="\n")
    checksums.record(LISTED)
    for name in SHIPPED:
        if (ADAPTERS / name / adapters.FILE).is_file():
            (MODELS / name).mkdir(exist_ok=True)
            shutil.copy(ADAPTERS / name / adapters.FILE, MODELS / name / adapters.FILE)
            checksums.record(MODELS / name / adapters.FILE)
