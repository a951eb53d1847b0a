"""A check of methods against the contract, and what it and the checks of exercises are made of."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib


@torch.no_grad()
def check_method(name: str) -> None:
    """A registered method keeps what its budget says, in every head, and padding or chunks make no difference to it."""
    expect(name in kvlib.METHODS, f'no method {name!r}: is the class decorated with @kvlib.register("{name}")?')
    model, ids = tiny_model(), torch.randint(5, 60, (1, 90), generator=torch.Generator().manual_seed(1))
    half, counts = kvlib.method(name, budget=0.5), {}
    with half(model) as run:
        model(ids)
    for layer in range(2):
        kept = run.kept(layer)
        counts |= {(layer, head): int((row >= 0).sum()) for head, row in enumerate(kept[0])}
    wrong = {place: count for place, count in counts.items() if count != 45}
    expect(not wrong, f"{name}: budget 0.5 of 90 tokens is 45, kept are {wrong} (layer, head): tokens")
    expect(
        run.stored_bytes() * 2 == run.full_bytes(), f"{name}: {run.stored_bytes()} of {run.full_bytes()} bytes stored"
    )

    with kvlib.method(name, budget=1.0)(model) as everything:
        whole = model(ids).logits
    expect(everything.stored_bytes() == everything.full_bytes(), f"{name}: budget 1.0 must keep everything")
    expect(torch.equal(whole, model(ids).logits), f"{name}: budget 1.0 must not change the logits")

    padded, mask = torch.cat([ids.new_zeros(1, 7), ids], 1), torch.arange(97)[None] >= 7
    with half(model) as other:
        model(padded, attention_mask=mask.long())
    same = all(torch.equal(run.kept(layer), other.kept(layer)) for layer in range(2))
    hint = "use view.positions and view.tokens, which leave padding out"
    expect(same, f"{name}: seven padding tokens in front change what is kept; {hint}")

    kept = []
    for chunk in (None, 13):
        with half(model) as other:
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk, pad_token_id=0)
        kept.append([other.kept(layer) for layer in range(2)])
    same = all(map(torch.equal, *kept))
    hint = "view.query holds this chunk only, view.column_sums(last=...) reaches back"
    expect(same, f"{name}: reading the prompt in chunks changes what is kept; {hint}")
    print(f"{name} keeps the contract: counts, bytes, budget 1.0, padding, chunks")


def expect(holds: bool, message: str) -> None:
    """Raise an AssertionError with `message` alone; `assert` would add the values that it has compared."""
    if not holds:
        raise AssertionError(message)


def number(value, what: str) -> float:
    """`value` as a float; a stub's None or ... is named as such."""
    expect(value is not None and value is not ..., f"{what} returned {value!r}: is there a `return`?")
    return float(value)


def tiny_model(layers: int = 2):
    """Grouped heads, random weights large enough that attention is not uniform, float64."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()
