"""Where the embedded model comes from: corpus, tokenizer, training, evaluation, export.

`python -m kvlib.minilm` lists the steps and what each costs. Nothing here is needed to *use* the shipped model.
"""

from kvlib.paths import DATA, MODELS, ROOT

BUILD = ROOT / "build" / "minilm"  # everything that can be rebuilt and is not committed
HELDOUT = DATA / "heldout"
MODEL = MODELS / "minilm"
PILOTS = MODELS / "pilots"  # cards and statistics of the small runs, without their weights
