"""Whether figures drawn from tables are those that are committed."""

import json
from pathlib import Path

from kvlib.paths import ROOT


def compare(before: Path, after: Path = ROOT / "figures" / "manifest.json") -> None:
    """Raise if a figure drawn from tables is another one, or missing, in one of two manifests."""
    old, new = (
        {name: entry["sha256"] for name, entry in json.loads(path.read_text()).items() if not entry["live"]}
        for path in (before, after)
    )
    if changed := sorted(name for name in old | new if old.get(name) != new.get(name)):
        raise ValueError(
            f"Figures drawn from tables have changed: {', '.join(changed)}. Look at them, then commit them. If no "
            "number in them has moved, the cause is another version of matplotlib or another type of machine."
        )
    print(f"{len(new)} figures drawn from tables are unchanged")
