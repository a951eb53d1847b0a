"""A model spread over several devices keeps the same sets as on one: how many are the same, and what a token costs.

    python -m kvlib.lab.speed.devices cuda:0 cuda:1              all methods with a budget -> data/results/devices.csv
    python -m kvlib.lab.speed.devices cpu cuda:0 --methods h2o --tokens 8 --out FILE

Layers are dealt out evenly, as `device_map="auto"` does where there is room, by the function of accelerate that
`from_pretrained` calls; a CPU computes the layers that it has. Both models read the same two prompts of different
lengths, padded on the left, and decode greedily in turn (`kvlib.lab.speed.turns`). A set is what a head of a layer
stores of a row at the end. On devices of two kinds sums are rounded differently, and sets can differ by a tie.
"""

import argparse
from pathlib import Path

import accelerate
import torch
from tqdm import tqdm

import kvlib
from kvlib import paths
from kvlib.core.method import budgeted
from kvlib.core.support import attention_modules, decoder_layers
from kvlib.lab import tasks
from kvlib.lab.evaluation.prompts import padded
from kvlib.lab.speed.rows import command, rounded, write
from kvlib.lab.speed.settings import machine, method, processor
from kvlib.lab.speed.turns import Contestant, compared, now, take_turns

IDENTITY = ("model", "places", "devices", "method")
ONE, SPREAD = "one device", "spread"
TASK, SEEDS = "saying", (0, 1)
SHORTER = 0.7  # the second prompt
LIMIT = 60.0  # seconds of decoding for each method


def spread(model, places: list[str]):
    """The model, its layers dealt out to these devices in order; what stands before and behind them is on the ends."""
    layers = {id(layer): i for i, layer in enumerate(decoder_layers(model, attention_modules(model)))}
    where, place = {}, places[0]
    for name, module in model.named_modules():
        if id(module) in layers:
            place = where[name] = places[len(places) * layers[id(module)] // len(layers)]
        elif not any(module.children()) and not any(name.startswith(f"{layer}.") for layer in where):
            where[name] = place
    return accelerate.dispatch_model(model, where, main_device=places[0], force_hooks=True)


def prompts(tokenizer, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of two prompts, of which the second is shorter."""
    lengths = (tokens, round(SHORTER * tokens))
    drawn = [tasks.sample(TASK, length, seed, tokenizer=tokenizer) for length, seed in zip(lengths, SEEDS)]
    return padded([tokenizer(each.text, add_special_tokens=False).input_ids for each in drawn], device)


def sets(run) -> list[list[int]]:
    """What each head of each layer stores of each row."""
    layers = [run.kept(layer).tolist() for layer in range(len(run.cache.layers))]
    return [head for layer in layers for row in layer for head in row]


def measure(models: dict, inputs: tuple, name: str, budget: float, tokens: int, pairs: int) -> dict:
    """One row: a method on both models."""
    chosen = method(name, budget)
    both = {key: Contestant(model, inputs[0], now, chosen, inputs[1]) for key, model in models.items()}
    said = {key: [] for key in both}

    def block(key: str) -> float:
        seconds = both[key].decode(tokens)
        said[key].append(both[key].next.tolist())
        return seconds

    for key, contestant in both.items():
        contestant.read()
        block(key)
    turns = take_turns({key: lambda key=key: block(key) for key in both}, pairs, now, LIMIT)
    kept = [sets(contestant.run) for contestant in both.values()]
    parts = list(both[SPREAD].run.cache.parts())
    return {
        "method": name,
        "budget": budget,
        "sets": len(kept[0]),
        "equal_sets": sum(one == other for one, other in zip(*kept)),
        "blocks": len(said[ONE]),
        "blocks_equal": sum(one == other for one, other in zip(said[ONE], said[SPREAD])),
        "stored_bytes": both[SPREAD].run.stored_bytes(),
        "last_device_bytes": sum(int(x.row_bytes().sum()) for x in parts if x.ends.device == parts[-1].ends.device),
    } | compared(SPREAD, ONE, turns, "ms_per_token")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.speed.devices", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("places", nargs="+", metavar="DEVICE", help="cuda:0, cuda:1 ..., cpu; the first has the inputs")
    parser.add_argument("--model", default="smollm2", help="what kvlib.load takes; default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=budgeted(), metavar="METHOD", default=budgeted())
    parser.add_argument("--budget", type=float, default=0.2, help="share that is kept; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the longer prompt; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="in a timed block; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=5, help="timed blocks of each model; default: %(default)s")
    parser.add_argument("--out", type=Path, default=paths.RESULTS / "devices.csv", help="default: %(default)s")
    given = parser.parse_args(argv)
    if "cpu" in given.places and given.places[0] != "cpu":
        parser.error("name the CPU first: behind a GPU accelerate takes it for a place where weights wait")
    torch.set_float32_matmul_precision("highest")
    model, tokenizer = kvlib.load(given.model)
    models = {ONE: model.to(given.places[0]), SPREAD: spread(kvlib.load(given.model)[0], given.places)}
    inputs = prompts(tokenizer, given.prompt, given.places[0])
    kinds = [torch.cuda.get_device_name(place) if place != "cpu" else processor() for place in given.places]
    shared = {"model": given.model, "places": " ".join(given.places), "devices": " + ".join(kinds)}
    shared |= {"dtype": str(model.dtype).removeprefix("torch."), "batch": 2, "prompt_tokens": given.prompt}
    more = {key: value for key, value in machine(torch.device(given.places[0]).type).items() if key != "device"}
    for name in tqdm(given.methods, disable=None):
        budget = 1.0 if name == "full" else given.budget
        row = measure(models, inputs, name, budget, given.tokens, given.pairs)
        row = rounded(shared | row | more | {"command": command(parser, argv)})
        write([row], given.out, IDENTITY)
        print(*(f"{key} {row[key]}" for key in "method sets equal_sets blocks blocks_equal ratio".split()), flush=True)


if __name__ == "__main__":
    main()
