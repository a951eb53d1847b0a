"""Tiny random models, batches with left padding, and runs recorded step by step.

Everything is float64 unless a test says otherwise: there, two ways to compute the same scores differ by 1e-15, so that
near-ties do not decide which token is kept, and equality of tokens and of keep-sets can be demanded exactly.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import transformers
from packaging import version
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 64
# Before 5.21 transformers reads the whole conversation again if a later turn comes in chunks.
CHUNKS_CONTINUE = version.parse(transformers.__version__) >= version.parse("5.21")
ARCHITECTURES = {
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
}


@cache
def model(name: str = "llama-gqa", dtype: torch.dtype = torch.float64, **changes):
    """A random model with two layers that never stops generating. Shared: tests must leave it as they found it."""
    return build(name, dtype, **changes)


def build(name: str, dtype: torch.dtype = torch.float64, **changes):
    """A new model, random but always the same."""
    cls, config, particular = ARCHITECTURES[name]
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # at the default 0.02 attention would be uniform and every score a tie
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = cls(config(**{**arguments, **particular, **changes}))
        with torch.no_grad():
            for parameter, weights in built.named_parameters():
                if parameter.endswith("bias"):
                    weights.normal_()
                if "q_norm" in parameter or "k_norm" in parameter:  # at 1 all keys would have the same norm
                    weights.uniform_(0.5, 3)
    built.generation_config.pad_token_id = 0
    built.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        _exact(built)
    return built


def _exact(built) -> None:
    """Norms and rotary angles in float64; transformers rounds both to float32 whatever the weights are.

    Rotation keeps norms, so that in the first layer a token's key would have the same norm wherever it stands, and
    rounding would decide which of its repetitions has the lowest. Keys grow a little with the position instead.
    """
    rotary = built.model.rotary_emb

    def angles(x, position_ids):
        angle = (position_ids[..., None] * rotary.inv_freq).repeat(1, 1, 2)
        growth = 1 + position_ids[..., None] / 256
        return angle.cos() * growth, angle.sin() * growth

    rotary.forward = angles
    for norm in built.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = lambda x, norm=norm: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[torch.Tensor], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, padded on the left to the longest plus `extra`: ids and mask."""
    width = max(len(row) for row in rows) + extra
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) >= width - lengths[:, None]).long().to(ids.device)


def kept(run) -> list[list[list[list[int]]]]:
    """What is stored as nested lists `[row][layer][head] -> indices`."""
    layers = [run.kept(layer).tolist() for layer in range(len(run.cache.layers))]
    return [[[[i for i in head if i >= 0] for head in layer[row]] for layer in layers] for row in range(len(layers[0]))]


@dataclass
class Turn:
    """What `generate` left: new tokens `(batch, new)`, their logits, `kept(run)`, and all ids with their mask."""

    tokens: torch.Tensor
    logits: torch.Tensor
    kept: list
    ids: torch.Tensor
    mask: torch.Tensor


def generate(model, run, rows, new=4, extra=0, chunk=None, before: Turn | None = None, only_new=False) -> Turn:
    """Greedy generation inside an open block, as a first turn or as one that continues `before`.

    Args:
        run: the open run, None outside a block (stock).
        rows: the prompts, one tensor each. extra: columns of padding in every row.
        chunk: prefill so many columns at a time.
        only_new: pass only the new turn's ids with a mask over everything, instead of all ids.
    """
    ids, mask = pad(rows, extra)
    arguments = {}
    if before is not None:
        mask = torch.cat([before.mask, mask], dim=1)
        ids = torch.cat([before.ids, ids], dim=1)
        chunk = chunk if CHUNKS_CONTINUE else None
        arguments["past_key_values"] = run.cache if run is not None else before.kept
    given = ids[:, before.ids.shape[1] - 1 :] if only_new else ids  # the last sampled token is not in the cache yet
    out = model.generate(
        given,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        prefill_chunk_size=chunk,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    made = out.sequences[:, -new:]
    return Turn(
        made,
        torch.stack(out.logits, dim=1),
        kept(run) if run is not None else out.past_key_values,
        torch.cat([ids, made], dim=1),
        torch.cat([mask, torch.ones_like(made)], dim=1),
    )


def once(model, method, rows, **arguments) -> Turn:
    """`generate` in a block of its own."""
    with method(model) as run:
        return generate(model, run, rows, **arguments)


def decode(model, run, logits: torch.Tensor, new: int) -> tuple[torch.Tensor, list]:
    """Greedy decoding by hand from the logits after a prompt: new tokens and `kept(run)` after `new - 1` steps."""
    made = [logits.argmax(-1)]
    for _ in range(new - 1):
        made.append(model(made[-1][:, None], past_key_values=run.cache).logits[:, -1].argmax(-1))
    return torch.stack(made, dim=1), kept(run)


def remembered(layer, name: str) -> torch.Tensor:
    """`layer.tail.state[name]` as a rectangle in text order; empty slots hold anything."""
    layer.tail.restore_order()
    return layer.tail.rectangle(layer.tail.state[name])


def audit(cache) -> tuple[int, int]:
    """Bytes of the distinct storages behind keys and values, and behind every tensor reachable from a cache."""
    found: dict[str, dict[int, int]] = {"kv": {}, "all": {}}
    visited = set()

    def walk(thing, name=""):
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            for kind in ("all", "kv") if name == "fields" else ("all",):
                found[kind][storage.data_ptr()] = storage.nbytes()
        elif id(thing) not in visited:
            visited.add(id(thing))
            if isinstance(thing, dict):
                for value in thing.values():
                    walk(value, name)
            elif isinstance(thing, (list, tuple, set)):
                for value in thing:
                    walk(value)
            elif hasattr(thing, "__dict__"):
                for key, value in vars(thing).items():
                    walk(value, key)

    walk(cache)
    return sum(found["kv"].values()), sum(found["all"].values())
