"""Models with random weights; of `kvlib.lab.speed.decoding` prompts, methods, and the ratios hoped for."""

import platform
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import kvlib
from kvlib.core.method import budgeted
from kvlib.lab.speed.ragged import PerHead, Threshold

CAPTURED = ", captured"  # behind a method's name: its steps are replayed as a CUDA graph
RAGGED = {cls.name: cls for cls in (PerHead, Threshold)}  # heads of different lengths, beside the registered methods
ARGUMENTS = {  # of readers, and of two of SYSTEMS, by a name that begins with theirs; layers as found for SmolLM2
    "tidaldecode, query": {"selection_layers": (2, 14), "heads": "query"},
    "tidaldecode, group": {"selection_layers": (2, 14), "heads": "group"},
    "tidaldecode, all": {"selection_layers": (2, 14), "heads": "all"},
    "quest, page 16": {"page": 16},
    "loki, rank 0.25": {"rank": 0.25},
    "tokenselect, no vote stands": {"similarity": 1.0},  # votes take their time anyhow, but count if they do not stand
    "kivi, 4 bits": {"bits": 4},
    "combined, snapkv in 8 bits": {"evictor": "snapkv", "store": "int8"},
}
SYSTEMS = (  # of the comparison, whatever weights a model has
    "snapkv", "h2o", "adakv", "uncomp", "critical_kv", "defensive_kv", "kv_compress", "lagkv", "keydiff",
    "expected_attention", "keyformer", "kvzip", "int8", "kivi, 4 bits", "think", "minicache", "lorc", "cskv",
    "combined, snapkv in 8 bits",
)  # fmt: skip
ANCHOR, LINE = 1, 10  # id of what ends a line, and tokens in one
ANCHORED = {  # AnchorCoder, layers as of SmolLM2's arms; a model with random weights plants no anchors
    "anchorcoder, per 4": {"anchor": ANCHOR, "per": 4, "source": 8, "beyond": 22, "forced": False},
    "anchorcoder, per 6": {"anchor": ANCHOR, "per": 6, "source": 6, "beyond": 22, "forced": False},
}
STOCK, SAME, FULL = "stock", "stock at the same length", "full"  # the baselines
AT_THE_END, IN_DECODE = ("snapkv", "pyramidkv"), ("streaming_llm", "h2o", "tova", "vatp")  # when they evict
WANTED = {  # (method, budget, baseline) -> the largest ratio hoped for
    (FULL, 1.0, STOCK): 1.05,
    **{(name, 0.2, SAME): 1.1 for name in AT_THE_END},
    **{(name, 0.2, STOCK): 1.0 for name in AT_THE_END},
    **{(name, 0.2, STOCK): 1.3 for name in IN_DECODE},
    **{(name, 0.5, FULL): 1.0 for name in (*AT_THE_END, *IN_DECODE)},
}
FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SHAPES = {  # FIELDS; are embeddings tied; base of the rotary embedding
    "SmolLM2-135M": ((576, 1536, 30, 9, 3, 49_152), True, 1e5),
    "Llama-2-7B": ((4096, 11_008, 32, 32, 32, 32_000), False, 1e4),
    "Llama-3.1-8B": ((4096, 14_336, 32, 32, 8, 128_256), False, 5e5),
    "Llama-3.1-8B, 8 layers": ((4096, 14_336, 8, 32, 8, 128_256), False, 5e5),
    "tiny": ((32, 48, 2, 4, 2, 64), True, 1e4),
}
WINDOW = 2**18  # tokens, of all these models


@dataclass(frozen=True)
class Setting:
    """`batch` prompts of `prompt` tokens, of which methods keep the share `budget`.

    pairs: timed blocks of each contestant, of `tokens` tokens each. prefills: timed passes over the prompt.
    padded: rows are of different lengths, from half a prompt to a whole one, with padding on the left.
    together: so many methods take turns with each other, and their caches are in memory. threads: of the CPU.
    lined: does an anchor end every line of `LINE` tokens of the prompts?
    """

    model: str
    device: str
    dtype: str
    prompt: int
    budget: float
    batch: int = 1
    methods: tuple[str, ...] = (FULL, *IN_DECODE, *AT_THE_END)
    pairs: int = 15
    tokens: int = 32
    prefills: int = 3
    padded: bool = False
    together: int = 9
    threads: int | None = None
    lined: bool = False

    def facts(self) -> dict:
        """Columns that all rows share: the setting, the machine as it is now, versions."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "prompt_tokens": self.prompt,
            "tokens_per_block": self.tokens,
        } | machine(self.device)


def build(shape: str, device: str, dtype: str):
    """A model of `SHAPES`, with random weights."""
    sizes, tied, base = SHAPES[shape]
    config = LlamaConfig(
        **dict(zip(FIELDS, sizes)),
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        max_position_embeddings=WINDOW,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def machine(device: str) -> dict:
    """Columns of the machine as it is now, and of versions. device: "cpu" or "cuda"."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def method(name: str, budget: float):
    """A registered method, to be captured or not, one of `ARGUMENTS`, `SYSTEMS` or `ANCHORED`, or one of `RAGGED`; full
    keeps everything, and AnchorCoder and what stores all tokens know no budget."""
    if name in RAGGED:
        return RAGGED[name](budget)
    if name in ANCHORED:
        return kvlib.method("anchorcoder", **ANCHORED[name])
    name = name.removesuffix(CAPTURED)
    registered, arguments = name.split(",")[0], ARGUMENTS.get(name, {})
    share = {"budget": 1.0 if name == FULL else budget} if registered in budgeted() else {}
    return kvlib.method(registered, **share, **arguments)


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


SMOL = Setting("SmolLM2-135M", "cpu", "float32", 1800, 0.5, pairs=12, tokens=8, prefills=2, threads=1)
READERS = replace(
    SMOL, budget=0.1, methods=(FULL, "snapkv", "h2o", *(name for name in ARGUMENTS if name not in SYSTEMS))
)
LLAMA = Setting("Llama-3.1-8B, 8 layers", "cuda", "bfloat16", 32_768, 0.2)
SETTINGS = {
    "smollm2-1.8k": SMOL,
    "smollm2-1.8k-bf16": replace(SMOL, dtype="bfloat16"),
    "smollm2-1.8k-readers": READERS,
    "smollm2-8k-readers": replace(READERS, prompt=8192, prefills=1),
    "smollm2-1.8k-systems": replace(SMOL, budget=0.2, methods=SYSTEMS, pairs=6, together=5),
    "smollm2-8k-anchored": replace(SMOL, prompt=8192, prefills=1, methods=tuple(ANCHORED), lined=True),
    "llama-32k": LLAMA,
    "llama-8k-x8": replace(LLAMA, prompt=8192, batch=8),
    "llama-8k-x8-captured": replace(
        LLAMA, prompt=8192, batch=8, methods=tuple(name + CAPTURED for name in (FULL, "snapkv", *IN_DECODE))
    ),
    "llama-8k-x8-ragged": replace(LLAMA, prompt=8192, batch=8, methods=(FULL, "snapkv", *RAGGED)),
    "llama-8k-x8-padded": replace(LLAMA, prompt=8192, batch=8, padded=True, methods=(FULL, "snapkv", "h2o")),
    "llama-2-8k-x4-anchored": replace(
        LLAMA, model="Llama-2-7B", prompt=8192, batch=4, methods=tuple(ANCHORED), together=1, lined=True
    ),
    "llama-128k": replace(LLAMA, prompt=131_072, methods=(FULL, "streaming_llm", "h2o", "snapkv"), together=1),
    "tiny": Setting("tiny", "cpu", "float32", 64, 0.5, pairs=3, tokens=2, prefills=1, threads=1),
}
# On a CPU float32, because bfloat16 took 1.5 times as long to decode where both were tried, with AVX-512 BF16 too.
DEFAULT = {
    "cpu": ["smollm2-1.8k", "smollm2-1.8k-readers", "smollm2-8k-readers", "smollm2-8k-anchored"],
    "cuda": [
        "llama-32k",
        "llama-8k-x8",
        "llama-128k",
        "llama-8k-x8-captured",
        "llama-8k-x8-ragged",
        "llama-8k-x8-padded",
        "llama-2-8k-x4-anchored",
    ],
}
