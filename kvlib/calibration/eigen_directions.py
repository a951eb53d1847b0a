"""The directions of a model's keys and values that its layers need, for `eigen_attention`.

    python -m kvlib.calibration.eigen_directions MODEL [--error ERROR] [--folder FOLDER]

Singular vectors of the keys and values of every layer over the texts of `kvlib.calibration.key_directions`; as many of
them as the layer's output on these texts needs go into `eigen_attention.safetensors`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

import kvlib
from kvlib import checksums, paths
from kvlib.calibration import fingerprint, key_directions
from kvlib.core.support import attention_modules, decoder_layers
from kvlib.methods.systems.eigen_attention import FILE, directions

ERROR = 0.025  # of a layer's output, the default of the authors' code
STEP, LEAST = 0.02, 0.45  # of the sum of singular values; of `head_dim`


@torch.no_grad()
def bases(model, windows: list[torch.Tensor], error: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the basis of its keys `(head_dim, rank)` and those of its values `(kv_heads, head_dim, rank)`.

    Every layer is searched on what the layers before it make of the texts as they are.
    """
    modules = attention_modules(model)
    layers = decoder_layers(model, modules)
    calls: list[list] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, more, seen=seen: seen.append((args[0], more)), with_kwargs=True)
        for layer, seen in zip(layers, calls)
    ]
    for ids in windows:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    found = zip(layers, modules, calls)
    return [searched(*each, error) for each in tqdm(found, total=len(layers), disable=None)]


def searched(layer, module, calls: list, error: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The bases of one layer from its calls `(hidden states, keyword arguments)`."""
    seen: dict[str, list] = {"key": [], "value": []}
    exact = outputs(layer, module, calls, lambda name, x: seen[name].append(x))
    pairs = [directions(torch.cat(seen["key"]).flatten(0, 1)), directions(torch.cat(seen["value"]).transpose(0, 1))]
    (keys, key_sizes), (values, value_sizes) = pairs

    def fits(key_rank: int, value_rank: int) -> bool:
        cut = {"key": keys[:, :key_rank], "value": values[..., :value_rank]}
        made = outputs(layer, module, calls, lambda name, x: projected(x, cut[name]))
        missed = sum((a - b).double().square().sum() for a, b in zip(exact, made))
        return bool(missed.sqrt() < error * sum(a.double().square().sum() for a in exact).sqrt())

    key_rank, value_rank = ranks(key_sizes, value_sizes, fits)
    return keys[:, :key_rank], values[..., :value_rank]


def ranks(key_sizes: torch.Tensor, value_sizes: torch.Tensor, fits) -> tuple[int, int]:
    """The last ranks of keys and values that fit when the share of the sum of singular values falls step by step.

    Args:
        key_sizes, value_sizes: singular values `(head_dim,)` and `(kv_heads, head_dim)`, largest first.
        fits: says whether the layer's output is near enough with these ranks.
    """
    size = key_sizes.shape[-1]
    best = size, value_sizes.shape[-1]
    shares = [(x.double() / x.double().sum(-1, keepdim=True)).cumsum(-1) for x in (key_sizes, value_sizes)]
    for step in range(round(1 / STEP)):
        threshold = 1 - step * STEP - 1e-9  # the sum of all is 1 up to rounding
        tried = tuple(int((share < threshold).sum(-1).max()) for share in shares)
        if any(rank <= LEAST * whole for rank, whole in zip(tried, (size, value_sizes.shape[-1]))) or not (
            tried == best or fits(*tried)
        ):
            break
        best = tried
    return best


def outputs(layer, module, calls: list, change) -> list[torch.Tensor]:
    """What a layer makes of its calls if `change(name, x)`, unless None, replaces its keys and values.

    `x` is `(tokens, kv_heads, head_dim)`, keys before rotary embedding.
    """
    sources = {"key": getattr(module, "k_norm", None) or module.k_proj, "value": module.v_proj}

    def hook(source, args, x, name):
        changed = change(name, x.reshape(x.shape[1], -1, module.head_dim))
        return None if changed is None else changed.to(x.dtype).view_as(x)

    hooks = [source.register_forward_hook(partial(hook, name=name)) for name, source in sources.items()]
    made = [layer(hidden, **more) for hidden, more in calls]
    for each in hooks:
        each.remove()
    return [x[0] if isinstance(x, tuple) else x for x in made]


def projected(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`x` `(tokens, kv_heads, head_dim)` in the span of a basis `(head_dim, rank)`, or one for each head."""
    return (x.transpose(0, 1) @ basis @ basis.mT).transpose(0, 1).contiguous()


def write(folder: Path, model, name: str, tokenizer, error: float) -> Path:
    """Write the bases of a model, with what they were made of, and note the file's checksum."""
    ids = key_directions.windows(tokenizer)
    found = bases(model, ids, error)
    made = {
        "fingerprint": json.dumps(fingerprint(model)),
        "model": name,
        "error": str(error),
        "texts": f"Moby-Dick from chapter 1 on and held-out code from its first file on, "
        f"{key_directions.WINDOWS} windows of {key_directions.TOKENS} tokens each",
        "tokens": str(sum(x.shape[1] for x in ids)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    named = [(f"{kind}.{i}", x) for i, pair in enumerate(found) for kind, x in zip(("keys", "values"), pair)]
    save_file({place: x.half().cpu().contiguous() for place, x in named}, folder / FILE, metadata=made)
    checksums.record(folder / FILE)
    return folder / FILE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's name, hub id or folder, as for `kvlib.load`")
    parser.add_argument("--error", type=float, default=ERROR, help=f"that a layer's output may have (default: {ERROR})")
    parser.add_argument("--folder", type=Path, help="where to write; default: data/calibration/ and the model's name")
    given = parser.parse_args(arguments)
    model, tokenizer = kvlib.load(given.model, dtype=torch.float32)
    name = Path(given.model).name
    print(write(given.folder or paths.DATA / "calibration" / name, model, name, tokenizer, given.error))


if __name__ == "__main__":
    main()
