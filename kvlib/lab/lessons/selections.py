"""What readers choose, step by step: the sets of all layers, what one step reads, and the answers that come of it."""

import json
from dataclasses import fields

import pandas as pd
import torch

from kvlib import calibration
from kvlib.calibration.attention_mass import Tracer
from kvlib.core.method import Reader
from kvlib.lab.plotting import printed
from kvlib.methods.tidaldecode import CALIBRATION, CHOICES, TidalDecode


def selection_layers(model, calibrated: str | None) -> tuple[int, int]:
    """The two selection layers of a lesson: those of a calibration for a common set, or the paper's at the same depth.

    A model of fewer than ten layers has no second one at that depth. It takes layers 0 and 2, so that there is a second
    choice to look at: nothing says that they are good ones.
    """
    found = TidalDecode(1, selection_layers=calibrated, heads="all").prepare(model)
    return found if len(found) == 2 else (0, 2)


@torch.no_grad()
def trace(model, snapshot, tokens: list[int], budget: float | int) -> list[tuple[torch.Tensor, dict]]:
    """What each layer attends to and would choose, while full attention reads `tokens` one by one behind a prompt.

    Returns:
        Per token the attention `(layers, query_heads, seen)` in float64, and by kind of `heads` of TidalDecode the
        choice of each layer, as bool of that shape; both on the CPU. seen counts the prompt and the tokens so far.
    """
    tracer, steps = Tracer({heads: TidalDecode(budget, heads=heads) for heads in CHOICES}), []
    with tracer(model) as run:
        run.fork(snapshot)
        for seen, token in enumerate(tokens, snapshot.positions.shape[1] + 1):
            tracer.noted.clear()
            model(torch.tensor([[token]], device=model.device), past_key_values=run.cache)
            attention = torch.stack([weights for weights, _ in tracer.noted]).double().cpu()
            slots = {heads: torch.stack([chosen[heads] for _, chosen in tracer.noted]).cpu() for heads in CHOICES}
            steps.append((attention, {heads: marked(each, seen) for heads, each in slots.items()}))
    return steps


def marked(slots: torch.Tensor, seen: int) -> torch.Tensor:
    """Slots `(..., k)`, -1 = none, as bool `(..., seen)`."""
    mask = torch.zeros(*slots.shape[:-1], seen + 1, dtype=torch.bool)
    return mask.scatter_(-1, slots.where(slots >= 0, seen), True)[..., :seen]


def overlaps(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What sets of two layers share, those of the same head and those of different ones: `(layers, layers)` each.

    `[i, j]` is the mean over heads h (and over heads g other than h) of |T ∩ S| / |T|, with the set T of head h in
    layer j and the set S of head h (of head g) in layer i.

    Args:
        chosen: `(layers, heads, tokens)` bool, no set empty, at least two heads.
    """
    sets = chosen.double()
    both = torch.einsum("igt,jht->ijgh", sets, sets) / sets.sum(-1)[None, :, None]
    same, heads = both.diagonal(dim1=2, dim2=3).sum(-1), chosen.shape[1]
    return same / heads, (both.sum((2, 3)) - same) / (heads * (heads - 1))


def unions(chosen: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Tokens that at least one query head of a KV head has chosen, `(..., kv_heads)`: rows that one pass has to load.

    Args:
        chosen: `(..., query_heads, tokens)` bool; query heads of a KV head are neighbours.
    """
    return chosen.unflatten(-2, (kv_heads, -1)).any(-2).sum(-1)


def similarity(attention: torch.Tensor) -> torch.Tensor:
    """Cosine of the attention of the same head in consecutive layers, `(layers - 1, heads)`.

    Args:
        attention: `(layers, heads, tokens)`.
    """
    return torch.cosine_similarity(attention[:-1], attention[1:], dim=-1)


@torch.no_grad()
def recorded(model, snapshot, token: int, method: Reader) -> tuple[list[dict[str, torch.Tensor]], int]:
    """One decode step of a reader behind a prompt, layer by layer.

    Returns:
        (per layer query `(query_heads, head_dim)`, key and value `(kv_heads, tokens, head_dim)`, scaling, and output
        `(query_heads, head_dim)`, in float64 on the CPU; bytes of keys and values that the step has read)
    """
    layers = []

    class Recording(type(method)):
        def attend(self, view):
            output = super().attend(view)  # (batch, 1, query_heads, head_dim)
            if view.step.decoding:
                parts = {
                    "query": view.query[0, :, 0],
                    "key": view.key[0],
                    "value": view.value[0],
                    "output": output[0, 0],
                }
                layers.append({name: x.double().cpu() for name, x in parts.items()} | {"scaling": view.scaling})
            return output

    same = {field.name: getattr(method, field.name) for field in fields(method)}
    with Recording(**same)(model) as run:
        run.fork(snapshot)
        model(torch.tensor([[token]], device=model.device), past_key_values=run.cache)
        return layers, run.read_bytes()


@torch.no_grad()
def answers(model, tokenizer, snapshot, prompt, methods: dict) -> pd.DataFrame:
    """What the model answers if the question, too, is read token by token, as its answer is: no token sees all.

    Args:
        snapshot: of the prompt's context. prompt: of `kvlib.lab.tasks.sample`.
        methods: name -> method.

    Returns:
        A row per method; columns "read, %", of the full cache's bytes in the last step, answer, and found.
    """
    _, question, lead = prompt.ids(tokenizer)
    count, rows = len(prompt.answer_ids(tokenizer)), {}
    for name, method in methods.items():
        with method(model) as run:
            run.fork(snapshot)
            written = []
            for token in question + lead:
                logits = model(torch.tensor([[token]], device=model.device), past_key_values=run.cache).logits
            while len(written) < count:
                written.append(logits[:, -1].argmax(-1, keepdim=True))
                logits = model(written[-1], past_key_values=run.cache).logits
            share = run.read_bytes() / run.full_bytes()
        answer = tokenizer.decode(torch.cat(written, 1)[0], skip_special_tokens=True)
        found = answer.strip().startswith(prompt.answer.strip())
        rows[printed(name)] = {"read, %": round(100 * share, 1), "answer": answer, "found": found}
    return pd.DataFrame.from_dict(rows, orient="index")


def by_second_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Mean recall and mass of TidalDecode with a set per query head, for every second selection layer in the table.

    Args:
        table: rows that the measure "recall" has written (`kvlib.lab.evaluation.recall`).
    """
    arguments = table["arguments"].map(json.loads)
    only = arguments.map(lambda given: [*given] == ["selection_layers"] and len(given["selection_layers"]) == 2)
    rows = table[only & table["method"].eq("tidaldecode")]
    second = arguments[rows.index].map(lambda given: given["selection_layers"][1]).rename("second selection layer")
    return rows.groupby(second)[["value", "agreement"]].mean().set_axis(["recall", "mass"], axis=1)


def sweep(name: str, way: str, elsewhere: bool = False) -> pd.DataFrame:
    """The recorded score of every second selection layer of a calibration: a row per layer, a column per kind of heads.

    Args:
        name, way: whose, and "accuracy" or "mass", as in `kvlib.calibration.selection_layers`.
        elsewhere: the scores on the second set of prompts.

    Raises:
        ValueError: if there is no such calibration.
    """
    choices = json.loads(calibration.find(name, CALIBRATION).read_text(encoding="utf-8"))["choices"]
    columns = {heads: ways[way]["scores"] for heads, ways in choices.items() if way in ways}
    if not columns:
        raise ValueError(f"{name!r} was not calibrated by {way}")
    pairs = {
        heads: {int(chosen.split()[1]): both[elsewhere] for chosen, both in scores.items() if " " in chosen}
        for heads, scores in columns.items()
    }
    return pd.DataFrame(pairs).sort_index().rename_axis("second selection layer")
