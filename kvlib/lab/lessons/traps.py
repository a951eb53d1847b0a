"""What the lesson on silent failures shares: eviction and decoding by hand, and answers counted in one way."""

import torch
from transformers import DynamicCache

import kvlib
from kvlib.lab.lessons.asking import ask


def evicted(model, ids: list[int], kept: list[int]) -> DynamicCache:
    """The stock cache of a prompt in which every layer and head keeps the tokens at the places `kept`."""
    cache = DynamicCache()
    model(torch.tensor([ids], device=model.device), past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    return cache


def write(model, tokenizer, cache, position: int, lead: list[int], tokens: int) -> str:
    """Read `lead`, of which the first token stands at `position`, and write `tokens` greedily."""
    coming, written = list(lead), []
    for place in range(position, position + len(lead) + tokens - 1):
        inputs, places = (torch.tensor([[x]], device=model.device) for x in (coming.pop(0), place))
        chosen = model(inputs, past_key_values=cache, position_ids=places).logits[0, -1].argmax().item()
        if not coming:
            coming.append(chosen)
            written.append(chosen)
    return tokenizer.decode(written, skip_special_tokens=True)


def size(tensors) -> int:
    """Bytes of the storages behind tensors: what they hold in memory, whatever part of it they show."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def found(model, tokenizer, prompts, method, *, later: bool = False) -> float:
    """Share of prompts answered right. The lead, at least one token, is read after the eviction; `later`: the question.

    So no token of the answer is chosen while the whole prompt is still there.
    """
    right = 0
    for prompt in prompts:
        context, question, lead = prompt.ids(tokenizer)
        before, after = (context, question + lead) if later else (context + question, lead)
        snapshot = kvlib.snapshot(model, torch.tensor([before], device=model.device))
        answer, _ = ask(model, tokenizer, snapshot, method, after, len(prompt.answer_ids(tokenizer)))
        right += answer.strip() == prompt.answer.strip()
    return right / len(prompts)


def overlap(first, second) -> float:
    """Share of the tokens of `second` that `first` holds too, mean over rows of kept places."""
    return sum(len({*one} & {*other}) / len({*other}) for one, other in zip(first, second)) / len(second)
