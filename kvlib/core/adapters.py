"""Models that are another one with a few weights changed: adapters of low rank (LoRA), kept in eight bits.

A folder holds one file, `adapter.safetensors`. Its header names the model, how the adapter is built in, and what the
configuration says of it; its tensors are those of `peft`, each row of a factor (for the second factor each column) as
whole numbers from -127 to 127 with a scale. Loaded, the adapter is added to the weights: what `kvlib.load` returns is
a plain transformers model.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvlib.paths import ROOT

FILE = "adapter.safetensors"
BUILD = ROOT / "build" / "anchored" / "adapters"  # of arms that are not shipped
HEADER, SCALE = "adapter", ".scale"
STEPS = 127


def write(folder: Path, base: str, config: dict, tensors: dict[str, torch.Tensor], lora: dict | None) -> None:
    """Write an adapter, or all weights of a model (`lora=None`), in bfloat16.

    Args:
        base: a name that `kvlib.load` takes. config: what the model's configuration says beside the base's.
        tensors: those of an adapter under the names of `peft`, or a model's. lora: arguments of `peft.LoraConfig`.
    """
    packed = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if lora is None:
            packed[name] = tensor.to(torch.bfloat16).contiguous()
        elif along(name) is None:
            packed[name] = tensor.float().contiguous()
        else:
            packed[name], packed[name + SCALE] = quantised(tensor.float(), along(name))
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"base": base, "config": config, "lora": lora}, sort_keys=True)
    part = folder / f"{FILE}.part"
    save_file(packed, part, {HEADER: header})  # one entry: of several the order would be a matter of chance
    part.replace(folder / FILE)


def along(name: str) -> int | None:
    """The dimension over which numbers share a scale: all but that of the rank; None for what stays as it is."""
    return next((dim for part, dim in (("lora_A", 1), ("lora_B", 0)) if part in name), None)


def quantised(tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and their scales, which are 0 where all numbers are."""
    scale = tensor.abs().amax(dim, keepdim=True) / STEPS
    return (tensor / scale.where(scale > 0, 1)).round().to(torch.int8), scale


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The header of an adapter and its tensors, in float32."""
    with safe_open(folder / FILE, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
        packed = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no dictionary)
    one = torch.ones(())
    return header, {
        name: tensor * packed.get(name + SCALE, one) for name, tensor in packed.items() if not name.endswith(SCALE)
    }


def apply(model, header: dict, tensors: dict[str, torch.Tensor]):
    """The model with an adapter in its weights, or with other weights, and what its configuration says then.

    Raises:
        ValueError: for an adapter that does not fit the model.
    """
    if header["lora"] is None:
        model.load_state_dict(tensors, strict=False)  # a tied head is not listed
    else:
        import peft  # here, because it takes seconds, and few models need it

        with warnings.catch_warnings():  # peft asks for a name that transformers is about to change
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            with_adapter = peft.get_peft_model(model, peft.LoraConfig(**header["lora"]))
        found = peft.set_peft_model_state_dict(model, tensors)
        if found.unexpected_keys:
            raise ValueError(f"the adapter has {found.unexpected_keys[0]}, which {type(model).__name__} has not")
        model = with_adapter.merge_and_unload()
    for name, value in header["config"].items():
        setattr(model.config, name, value)
    return model
