"""One look for every figure: `use_style()` in a notebook, `series(method)` for a line, `save(figure, name)` at the end.

A method has the same colour, marker and dash everywhere; colour is never the only difference. Saved files are identical
from run to run on one type of machine.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import matplotlib
import seaborn
from matplotlib_inline.config import InlineBackend

from kvlib.paths import FIGURES, NOTEBOOKS

# From the colour-blind-safe palettes of seaborn and Paul Tol, none too faint for white; the papers get the strongest.
COLORS = {
    "full": "#000000",
    "random": "#949494",
    "streaming_llm": "#cc6677",
    "h2o": "#de8f05",
    "scissorhands": "#ca9161",
    "snapkv": "#56b4e9",
    "pyramidkv": "#5d3a9b",
    "tova": "#004d40",
    "knorm": "#999933",
    "quest": "#882255",
    "loki": "#44aa99",
    "tokenselect": "#7a4a1d",
    "forced_sinks": "#661100",
    "exact_error": "#332288",
    "output_norm": "#117733",
    "vatp": "#d55e00",
    "uncomp": "#0173b2",
    "anchorcoder": "#029e73",
    "tidaldecode": "#cc78bc",
    "adakv": "#a6761d",
    "kvzip": "#ee3377",
    "defensive_kv": "#7570b3",
    "critical_kv": "#225555",
    "int8": "#228833",
    "kivi": "#6a8a00",
    "think": "#b8860b",
}
NAMES = {  # as in print
    "full": "full cache",
    "random": "random",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
    "scissorhands": "Scissorhands",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "tova": "TOVA",
    "knorm": "key norm",
    "quest": "Quest",
    "loki": "Loki",
    "tokenselect": "TokenSelect",
    "forced_sinks": "forced sinks",
    "exact_error": "exact error",
    "output_norm": "output norm",
    "vatp": "VATP",
    "uncomp": "UNComp",
    "anchorcoder": "AnchorCoder",
    "tidaldecode": "TidalDecode",
    "adakv": "Ada-KV",
    "int8": "8 bits",
    "kivi": "KIVI",
    "think": "ThinK",
    "minicache": "MiniCache",
    "kvsharer": "KVSharer",
    "lorc": "LoRC",
    "eigen_attention": "Eigen Attention",
    "cskv": "CSKV",
    "keydiff": "KeyDiff",
    "lagkv": "LagKV",
    "corm": "CORM",
    "keyformer": "Keyformer",
    "zipvl": "ZipVL's rule",
    "expected_attention": "Expected Attention",
    "critical_kv": "CriticalKV",
    "defensive_kv": "DefensiveKV",
    "kvzip": "KVzip",
    "kv_compress": "KV-Compress",
    "elastic_cache": "Elastic Cache",
    "subgen": "SubGen",
    "subgen_sampled": "SubGen, sampled",
    "adaptive": "budgets of heads",
    "combined": "combined",
}
MARKERS = dict(
    zip(COLORS, [*".x<s^Dvp*>12+8HoPXdh", (4, 1, 0), (6, 1, 0), (3, 1, 0), "$8$", "$4$", "$T$"], strict=True)
)
DASHES = dict.fromkeys(COLORS, "--") | dict.fromkeys(("full", "random"), ":")
DASHES |= dict.fromkeys(("vatp", "uncomp", "anchorcoder", "tidaldecode"), "-")

STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(
        color=[COLORS[m] for m in ("uncomp", "h2o", "anchorcoder", "vatp", "tidaldecode")]
    ),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.figsize": (6.4, 4.0),
    "font.size": 10,
    "grid.color": "#e5e5e5",
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def use_style() -> None:
    """Plot with seaborn's white grid and STYLE and nothing else: a personal matplotlibrc would change the figures."""
    matplotlib.rcdefaults()
    seaborn.set_theme(context="paper", style="whitegrid", font_scale=1.05, rc=STYLE)
    InlineBackend.instance().print_figure_kwargs = {"bbox_inches": None}  # pages show the saved frame, drawn once


def printed(configuration: str) -> str:
    """A method's name as in print, with the arguments that stand behind it."""
    method, space, arguments = configuration.partition(" ")
    return NAMES.get(method, method) + space + arguments


def series(configuration: str) -> dict:
    """Keyword arguments of `axes.plot` for the line of one method; methods of your own are dark grey.

    A method with other arguments than its own, "snapkv (kernel=15)", has a solid line and open markers.
    """
    method, _, variant = configuration.partition(" ")
    return {
        "label": printed(configuration),
        "color": COLORS.get(method, "#555555"),
        "marker": MARKERS.get(method, "h"),
        "linestyle": "-" if variant else DASHES.get(method, "-."),
        "markerfacecolor": "white" if variant else COLORS.get(method, "#555555"),
    }


def save(figure, name: str, live: bool = False) -> Path:
    """Write figures/<name>.svg, `name` being <notebook>_<what>, and note it in figures/manifest.json.

    Args:
        live: the figure shows what the notebook has just computed, not a stored table. Floating point differs between
            types of machine, so only figures drawn from tables are compared with the committed ones.
    """
    notebooks = [path.stem for path in NOTEBOOKS.glob("*.ipynb") if name.startswith(f"{path.stem}_")]
    if not notebooks:
        raise ValueError(f"figure {name!r}: a name is that of its notebook, then what it shows, as in 00a_cache_bytes")
    folder = Path(os.environ.get("KVLIB_FIGURES", FIGURES))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.svg"
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for the file and for the page
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # stable ids, searchable text
        figure.savefig(file, metadata={"Date": None})
    entry = {
        "live": live,
        "notebook": max(notebooks, key=len),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    with (folder / "manifest.json").open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # notebooks that run at the same time share the manifest
        stream.seek(0)
        manifest = json.loads(stream.read() or "{}") | {file.name: entry}
        stream.truncate(0)
        stream.write(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return file
