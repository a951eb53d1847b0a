"""`python -m kvlib.calibration.selection_layers MODEL`: which layers of a model should choose tokens for TidalDecode.

Two ways: by *mass*, all choices of layers compared by the attention that they hold in a dense trace
(`kvlib.calibration.attention_mass`); by *accuracy*, the authors' procedure: a sweep of the second selection layer over
questions about a text, protocol asked. The best choice wins, the earlier of equals. It is made on one set of prompts,
and told with it is what it scores on a second one, of other families and another kind of text.

The result is `tidaldecode.json` in the folder of the model's calibration, which `selection_layers=NAME` reads.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import kvlib
from kvlib import calibration, checksums, paths
from kvlib.calibration import sweep
from kvlib.calibration.attention_mass import POSITIONS, SelectionLayers, attention_mass, candidates, score
from kvlib.lab import tasks
from kvlib.lab.evaluation.prompts import device_name
from kvlib.methods.tidaldecode import CALIBRATION, CHOICES, WAYS

SEED = 1_000_000  # far from the samples of result tables
PROSE_THEN_CODE = ("number", "number_of_four"), ("constant", "returned")
FAMILIES = {"minilm": (("needle", "function_lookup"), ("dict_lookup", "file_lookup"))}  # it has read nothing but code
LISTED = 100  # scores in a file: the best ones

Scores = dict[SelectionLayers, float]


def mean_mass(
    model, tokenizer, families: Sequence[str], length: int, seeds: Sequence[int], budget, progress: Callable = iter
) -> dict[str, torch.Tensor]:
    """`attention_mass` where the answers to the prompts of these families and seeds are decoded, the mean over them."""
    found = []
    for task, seed in progress([(task, seed) for task in families for seed in seeds]):
        prompt = tasks.sample(task, length, seed, tokenizer=tokenizer)
        ids = tokenizer(prompt.text + prompt.answer, add_special_tokens=False, return_tensors="pt").input_ids
        found.append(attention_mass(model, ids.to(model.device), budget))
    return {heads: torch.stack([each[heads] for each in found]).mean(0) for heads in CHOICES}


def choose(compared: list[SelectionLayers], here: Scores, there: Scores) -> dict:
    """The layers with the highest score here, the earlier of equals, and what they score there.

    Args:
        compared: choices in ascending order. here, there: scores on the first and the second prompts, also of choices
            that are not compared but told.
    """
    best, best_there = (max(compared, key=scores.get) for scores in (here, there))
    listed = {*sorted(compared, key=here.get, reverse=True)[:LISTED], best_there, *(here.keys() - {*compared})}
    return {
        "selection_layers": best,
        "elsewhere": {"best": best_there, "scores": [round(there[chosen], 4) for chosen in (best, best_there)]},
        "scores": {" ".join(map(str, c)): [round(here[c], 4), round(there[c], 4)] for c in here if c in listed},
    }


def triangle(mass: torch.Tensor) -> list[list[float]]:
    """Rows of `M[i, j]` for j >= i: no layer reads what a later one has chosen."""
    return [[round(value, 3) for value in row[i:]] for i, row in enumerate(mass.tolist())]


def store(folder: Path, name: str, model, found: dict[str, dict[str, dict]]) -> Path:
    """Put what was found, `[heads][way]`, into the model's file beside what stands there, and record its checksum.

    Raises:
        ValueError: if the file is that of another model.
    """
    file = folder / CALIBRATION
    recorded = {"model": name, "fingerprint": calibration.fingerprint(model), "choices": {}}
    if file.is_file():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        calibration.require_same(model, recorded["fingerprint"], file)
    for heads, ways in found.items():
        recorded["choices"][heads] = recorded["choices"].get(heads, {}) | ways
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(readable(recorded) + "\n", encoding="utf-8")
    part.replace(file)
    checksums.record(file)
    return file


def readable(value, indent: str = "") -> str:
    """JSON with an entry a line; a list of numbers or words is one entry."""
    inside = indent + " "
    if isinstance(value, dict):
        lines = [f"{inside}{json.dumps(key)}: {readable(item, inside)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return "[\n" + ",\n".join(inside + readable(item, inside) for item in value) + f"\n{indent}]"
    return json.dumps(value)


def shipped(name: str) -> Path | None:
    """The folder of the calibration, if the model is a shipped one."""
    known = {folder.name for folder in paths.MODELS.iterdir() if folder.is_dir()}
    return paths.DATA / "calibration" / name if name in known else None


def tokens(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kvlib.calibration.selection_layers", description=__doc__)
    parser.add_argument("model", help="what `kvlib.load` takes")
    parser.add_argument("--folder", type=Path, help="of the calibration (default: data/calibration/MODEL if shipped)")
    parser.add_argument("--by", choices=WAYS, default="mass")
    parser.add_argument("--heads", nargs="+", choices=CHOICES, default=list(CHOICES), help="(default: all three)")
    parser.add_argument("--budget", type=tokens, default=0.1, help="a share of the prompt, or tokens (default: 0.1)")
    parser.add_argument("--first", type=int, default=2, help="first selection layer (default: 2)")
    parser.add_argument("--count", type=int, default=2, help="selection layers (default: 2)")
    parser.add_argument("--free", action="store_true", help="any first one, with more layers behind an earlier one")
    parser.add_argument("--tasks", nargs="+", help="families to choose on (default: numbers in prose)")
    parser.add_argument("--others", nargs="+", help="families to check the choice on (default: constants in code)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt (default: 2048)")
    parser.add_argument("--prompts", type=int, default=8, help="of each family (default: 8)")
    parser.add_argument("--block", type=int, default=4, help="by accuracy: prompts per prefill (default: 4)")
    parser.add_argument("--rows", type=Path, default=paths.ROOT / "build" / "calibration", help="of a sweep")
    options = parser.parse_args(arguments)
    options.folder = options.folder or shipped(options.model)
    if options.folder is None:
        parser.error("--folder: where the calibration of a model goes that is not shipped")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    first, second = FAMILIES.get(options.model, PROSE_THEN_CODE)
    sets, seeds = (options.tasks or first, options.others or second), range(SEED, SEED + options.prompts)
    model, tokenizer = kvlib.load(options.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    compared = candidates(model.config.get_text_config().num_hidden_layers, options.count, options.first, options.free)
    told = [(options.first,), *compared]  # also what the first selection layer does alone
    scores: list[dict[str, Scores]] = []
    masses: list[dict[str, torch.Tensor]] = []
    for families in sets:
        where, progress = (families, options.length, seeds), lambda blocks: tqdm(blocks, disable=None)
        if options.by == "mass":
            masses.append(mean_mass(model, tokenizer, *where, options.budget, progress))
            scores.append({heads: {c: score(masses[-1][heads], c) for c in told} for heads in options.heads})
        else:
            places = {(h, c): sweep.configuration(options.budget, h, c) for h in options.heads for c in told}
            kept = {"kept": options.rows, "block": options.block, "progress": progress}
            found = sweep.accuracies(model, tokenizer, [*places.values()], *where, **kept)
            scores.append({h: {c: found[places[h, c]] for c in told} for h in options.heads})
    settings = {
        "budget": options.budget,
        "prompts": [[*families] for families in sets],
        "seeds": [seeds[0], seeds[-1]],
        "length": options.length,
        "made": [date.today().isoformat(), f"torch {torch.__version__}", f"transformers {transformers.__version__}"],
        "device": device_name(model),
    }
    stored = {}
    for heads in options.heads:
        cell = choose(compared, *(each[heads] for each in scores))
        more = {"positions": POSITIONS, "mass": triangle(masses[0][heads])} if masses else {}
        stored[heads] = {options.by: cell | settings | more}
        worst, alone = min(scores[0][heads][c] for c in compared), scores[0][heads][told[0]]
        best = scores[0][heads][cell["selection_layers"]]
        print(f"{heads:5} {cell['selection_layers']} {best:.3f}, worst {worst:.3f}, {told[0]} {alone:.3f};", end=" ")
        print(f"elsewhere {cell['elsewhere']}")
    print(store(options.folder, options.model, model, stored))


if __name__ == "__main__":
    main()
