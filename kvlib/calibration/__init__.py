"""What methods learn of a model beforehand: one folder per model, whose files say whose they are.

`data/calibration/NAME` has those of shipped models; any other folder is given by its path.
"""

from pathlib import Path

import torch

from kvlib import paths
from kvlib.core import support

TOLERANCE = 1e-3  # of norms: rounding weights to 16 bits moves them by less, training on by more


def fingerprint(model) -> dict:
    """What tells a model from others, whatever its dtype: its sizes, and the norm of each layer's attention weights."""
    config = model.config.get_text_config()
    norms = [
        torch.stack([p.detach().double().norm() for p in module.parameters()]).norm().item()
        for module in support.attention_modules(model)
    ]
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "query_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "attention_norms": [round(norm, 4) for norm in norms],
    }


def require_same(model, recorded: dict, file: Path) -> None:
    """Raise ValueError unless `recorded`, a fingerprint, is that of the model."""
    own = fingerprint(model)
    pairs = list(zip(own["attention_norms"], recorded["attention_norms"]))
    sizes = all(own[name] == recorded.get(name) for name in own if name != "attention_norms")
    if not sizes or len(pairs) < own["layers"] or any(abs(a - b) > TOLERANCE * a for a, b in pairs):
        raise ValueError(f"{file} is the calibration of another model: calibrate this one")


def find(source: str | Path, name: str) -> Path:
    """The file `name` of a shipped model's calibration, or of a folder.

    Raises:
        ValueError: if there is none.
    """
    shipped = paths.DATA / "calibration" / source
    file = (shipped if shipped.is_dir() else Path(source)) / name
    if not file.is_file():
        known = sorted(folder.parent.name for folder in paths.DATA.glob(f"calibration/*/{name}"))
        raise ValueError(f"no {name} for {str(source)!r}: a folder that has it, or one of {', '.join(known) or 'none'}")
    return file
