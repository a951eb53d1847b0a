"""Where anchored models come from: text, rows of tokens, training of arms, adapters.

`python -m kvlib.anchored` lists the steps and what each costs. Nothing here is needed to *use* the shipped adapters.
"""

from collections.abc import Iterable

from kvlib.core.adapters import BUILD as ADAPTERS
from kvlib.core.adapters import FILE
from kvlib.paths import MODELS, ROOT

BUILD = ROOT / "build" / "anchored"  # everything that can be made again and is not committed
LISTED = MODELS / "arms.csv"  # of every arm that was trained: how, and the checksum of its adapter


def here(names: Iterable[str]) -> list[str]:
    """The arms among these whose weights are on this machine."""
    return [name for name in names if any((folder / name / FILE).is_file() for folder in (ADAPTERS, MODELS))]


__all__ = ["ADAPTERS", "BUILD", "LISTED", "here"]
