"""Where the embedded models come from: corpus, tokenizer, training, evaluation, export.

`python -m kvlib.minilm` lists the steps and what each costs. Nothing here is needed to *use* a shipped model.
"""

from kvlib.paths import DATA, MODELS, ROOT

BUILD = ROOT / "build" / "minilm"  # everything that can be rebuilt and is not committed
HELDOUT = DATA / "heldout"
MODEL = MODELS / "minilm"
SIBLING = MODELS / "minilm-gqa"
PILOTS = MODELS / "pilots"  # cards and statistics of the small runs, without their weights
