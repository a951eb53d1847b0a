"""Projections of low rank that stand for those of a model's keys and values, for `cskv`.

    python -m kvlib.calibration.cskv_projections MODEL [--keys SHARE] [--values SHARE] [--steps STEPS] [--folder FOLDER]

How large each input channel of the projections is over the texts of `kvlib.calibration.key_directions`, and projections
that begin from that and are fitted to the keys and values of these texts, by gradient descent on all tokens at once.
With `--steps 0` the file has the first only, which is small, and is good for all shares.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.calibration import fingerprint, key_directions
from kvlib.core.support import attention_modules, kv_heads
from kvlib.methods.systems.cskv import CSKV, FILE
from kvlib.methods.systems.lowrank import exact, projection

STEPS, RATE = 300, 1e-3


@torch.no_grad()
def observed(model, windows: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """What a model does on these windows.

    Returns:
        mean size of the inputs of the projections, `(layers, hidden_size)`; for "keys" and "values" of each layer K'K
        `(width, width)`, K being the keys of all heads and tokens before rotary embedding, less the bias. What a map
        makes of K has an error that follows from K'K.
    """
    sizes, squares, hooks = [], {"keys": [], "values": []}, []

    def watch(i, name, bias):
        def hook(module, args, x):
            rows = exact(x).reshape(x.shape[1], -1) - (bias if isinstance(bias, float) else bias.flatten())
            squares[name][i] += (rows.double().mT @ rows.double()).cpu()

        return hook

    for i, module in enumerate(attention_modules(model)):
        sizes.append(0.0)
        for name, kind in zip(squares, "kv"):
            bias = projection(module, kind, kv_heads(model))[1]
            squares[name].append(0.0)
            source = getattr(module, f"{kind}_norm", None) or getattr(module, f"{kind}_proj")
            hooks.append(source.register_forward_hook(watch(i, name, bias)))

        def size(module, args, i=i):
            sizes[i] += exact(args[0]).abs().sum((0, 1)).cpu()

        hooks.append(module.k_proj.register_forward_pre_hook(size))
    for ids in windows:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return torch.stack(sizes) / sum(ids.shape[1] for ids in windows), squares


def missed(squares: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """|K - K D B|^2 / |K|^2 from K'K."""
    rest = torch.eye(len(squares), dtype=squares.dtype) - down @ up
    return ((squares @ rest) * rest).sum() / squares.trace()


@torch.enable_grad()
def fitted(squares: torch.Tensor, down: torch.Tensor, up: torch.Tensor, steps: int) -> tuple[torch.Tensor, ...]:
    """D and B after so many steps of Adam, the rate falling to 0."""
    maps = [x.detach().cpu().clone().requires_grad_() for x in (down, up)]
    optimizer = torch.optim.Adam(maps, RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    squares = (squares / squares.trace()).to(maps[0].dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        missed(squares, *maps).backward()
        optimizer.step()
        schedule.step()
    return tuple(x.detach() for x in maps)


def write(folder: Path, model, name: str, tokenizer, method: CSKV, steps: int) -> Path:
    """Write what was found of a model, with what it was made of, and note the file's checksum."""
    ids = key_directions.windows(tokenizer)
    activations, squares = observed(model, ids)
    tensors, heads, errors = {"activations": activations}, kv_heads(model), []
    for i, module in tqdm([*enumerate(attention_modules(model))] if steps else [], disable=None):
        for kind, which in zip("kv", squares):
            weight = projection(module, kind, heads)[0].flatten(0, 1).cpu()
            first = method.maps(which, weight, heads, {"activations": activations[i].to(weight)})
            last = fitted(squares[which][i], *first, steps)
            errors.append([float(missed(squares[which][i].to(weight), *maps)) for maps in (first, last)])
            for x, place in zip(last, ("down", "up")):
                tensors.setdefault(f"{which}.{place}", []).append(x.half())
    made = {
        "fingerprint": json.dumps(fingerprint(model)),
        "model": name,
        "steps": str(steps),
        "missed": json.dumps([[round(x, 5) for x in pair] for pair in errors]),
        "texts": f"Moby-Dick from chapter 1 on and held-out code from its first file on, "
        f"{key_directions.WINDOWS} windows of {key_directions.TOKENS} tokens each",
        "tokens": str(sum(x.shape[1] for x in ids)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    stacked = {place: x if torch.is_tensor(x) else torch.stack(x) for place, x in tensors.items()}
    save_file({place: x.contiguous() for place, x in stacked.items()}, folder / FILE, metadata=made)
    checksums.record(folder / FILE)
    return folder / FILE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's name, hub id or folder, as for `kvlib.load`")
    parser.add_argument("--keys", type=float, default=CSKV.keys, help=f"share of `head_dim` (default: {CSKV.keys})")
    parser.add_argument("--values", type=float, default=CSKV.values, help=f"the same (default: {CSKV.values})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the fit (default: {STEPS})")
    parser.add_argument("--folder", type=Path, help="where to write; default: data/calibration/ and the model's name")
    given = parser.parse_args(arguments)
    model, tokenizer = kvlib.load(given.model, dtype=torch.float32)
    name, method = Path(given.model).name, CSKV(keys=given.keys, values=given.values)
    print(write(given.folder or paths.DATA / "calibration" / name, model, name, tokenizer, method, given.steps))


if __name__ == "__main__":
    main()
