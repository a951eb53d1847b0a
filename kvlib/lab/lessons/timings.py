"""Where the time of a decoding step goes: parts of what was measured, and the machine at hand."""

from statistics import median

import pandas as pd
import torch

from kvlib.lab.plotting import series
from kvlib.lab.speed.captured import NOTHING
from kvlib.lab.speed.settings import STOCK
from kvlib.lab.speed.turns import now

CASE = ["model", "batch", "context", "fused"]  # of one device
PARTS = ["weights", "small kernels, gaps", "context"]


def steps(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `captured_speed.csv` by (model, batch, context, fused, method), with columns to compare and to draw.

    Beside `PARTS` in ms, which add up to a step: `bytes_allow`, the speed-up if bytes were all that takes time, at the
    rate of a copy; `predicted`, that of a step that takes as long as stock without a context, and as its bytes of the
    context at that rate; `ideal_context`, ms.
    """
    if table["device"].nunique() > 1:
        raise ValueError(f"rows of several devices: {', '.join(table['device'].unique())}; choose one")
    rows = table.set_index([*CASE, "method"]).sort_index()
    stock, bare = (rows.xs(name, level="method").reindex(rows.droplevel("method").index) for name in (STOCK, NOTHING))
    found = rows.assign(weights=rows["weight_bytes"] / rows["copy_gb_per_s"] / 1e6)
    found["ideal_context"] = rows["read_bytes"] / rows["copy_gb_per_s"] / 1e6
    found["small kernels, gaps"] = bare["ms"].to_numpy() - found["weights"]
    found["context"] = rows["ms"] - bare["ms"].to_numpy()
    found["bytes_allow"] = stock["ideal_ms"].to_numpy() / rows["ideal_ms"]
    whole = stock["read_bytes"].to_numpy() / rows["copy_gb_per_s"] / 1e6
    found["predicted"] = (bare["ms"].to_numpy() + whole) / (bare["ms"].to_numpy() + found["ideal_context"])
    return found


def look(method: str) -> dict:
    """Keyword arguments of `axes.plot`; stock, whose attention is dense, is grey."""
    return series("full") | {"color": "#777777", "label": "stock"} if method == STOCK else series(method)


def stacked(axes, found: pd.DataFrame, labels: list[str]) -> None:
    """A bar for each row, its parts on top of each other; a line where the context would end at the rate of a copy."""
    left = pd.Series(0.0, index=found.index)
    places = range(len(found))[::-1]
    for part, color in zip(PARTS, ("#777777", "#cccccc", "#56b4e9")):
        axes.barh(places, found[part], left=left, color=color, height=0.7, label=part)
        if part != PARTS[-1]:
            left = left + found[part]
    for place, start, ideal in zip(places, left, found["ideal_context"]):
        axes.plot([start + ideal] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5)
    axes.set_yticks(places, labels)
    axes.grid(axis="y", visible=False)


def roofline(device: str, size: int = 1024, megabytes: int = 64) -> tuple[float, float, pd.DataFrame]:
    """Two numbers of a device, and how fast it does what a model consists of.

    Args:
        size: of the square matrices of a product. megabytes: of what is read once, more than caches hold.

    Returns:
        bytes per second that a copy reads and writes; operations per second of the product of two matrices; and by
        work the bytes that have to move, the operations, and seconds (the median of five), with its intensity in
        operations per byte, and operations per second.
    """
    dim, entries = 64, megabytes * 2**18
    matrix, many = torch.randn(size, size, device=device), torch.randn(entries, device=device)
    target, weights, keys = torch.empty_like(many), many.view(-1, 1024), many.view(-1, dim)
    vector, queries = torch.randn(1024, device=device), torch.randn(dim, 8, device=device)
    rate = 8 * entries / median(timed(lambda: target.copy_(many)) for _ in range(5))
    works = {
        "product of matrices: reading a prompt": (lambda: matrix @ matrix, 3 * size**2, 2 * size**3),
        "weights times vector: a token": (lambda: weights @ vector, entries, 2 * entries),
        "keys times one query: a token": (lambda: keys @ queries[:, 0], entries, 2 * entries),
        "keys times eight queries: a group": (lambda: keys @ queries, entries, 16 * entries),
    }
    rows = {}
    for name, (work, moved, operations) in works.items():
        seconds = median(timed(work) for _ in range(5))
        rows[name] = {"bytes": 4 * moved, "operations": operations, "seconds": seconds}
    found = pd.DataFrame.from_dict(rows, orient="index")
    found["intensity"] = found["operations"] / found["bytes"]
    found["per_second"] = found["operations"] / found["seconds"]
    return rate, found["per_second"].iloc[0], found


def timed(work, times: int = 4) -> float:
    """Seconds of one of `times` calls, after one that makes ready."""
    work()
    begin = now()
    for _ in range(times):
        work()
    return (now() - begin) / times


def live(model, snapshot, methods: dict, tokens: int, repeats: int) -> pd.DataFrame:
    """Milliseconds of captured steps behind a prompt, and MB: of keys and values read in the last step, stored, and
    allocated for them. Methods take turns; without a GPU the same steps run one by one.

    Args:
        snapshot: of the prompt (`lessons.prefill`). methods: name -> method. tokens: in a block. repeats: blocks.
    """
    seconds, sizes = {name: [] for name in methods}, {}
    start = torch.ones(1, 1, dtype=torch.long, device=model.device)
    for _ in range(repeats):
        for name, method in methods.items():
            with method(model) as run:
                run.fork(snapshot)
                with run.capture(tokens + 4) as step:
                    for _ in range(4):  # graphs are captured
                        step(start)
                    begin = now()
                    for _ in range(tokens):
                        step(start)
                    seconds[name].append((now() - begin) / tokens)
                sizes[name] = [run.read_bytes(), run.stored_bytes(), run.allocated_bytes()]
    rows = {name: [1e3 * median(x), 1e3 * min(x), 1e3 * max(x)] for name, x in seconds.items()}
    columns = ["ms", "least", "most", "read, MB", "stored, MB", "allocated, MB"]
    table = {name: [*row, *(size / 1e6 for size in sizes[name])] for name, row in rows.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=columns)
