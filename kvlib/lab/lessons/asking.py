"""Asking a model, from a prefill that was read once: what it answers with the cache that a method leaves."""

import pandas as pd
import torch

from kvlib.lab.lessons.prefills import prefill
from kvlib.lab.plotting import printed


def ask(model, tokenizer, snapshot, method, ids: list[int], tokens: int) -> tuple[str, int]:
    """Compress a prompt that was read, read on, and write.

    Args:
        snapshot: of what is read before anything is evicted.
        ids: tokens that are read afterwards, at least one: how the answer begins, or a question and that.
        tokens: how many are written, greedily.

    Returns:
        (the answer, bytes of keys and values that the method has left of the prompt)
    """
    inputs = torch.tensor([ids], device=model.device)
    with method(model) as run:
        run.document = run.fork(snapshot)
        stored = run.stored_bytes()
        out = run.ask(inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True), stored


def answers(model, tokenizer, prompt, methods: dict, *, later: bool = False) -> pd.DataFrame:
    """What the model answers under each method.

    Args:
        prompt: of `kvlib.lab.tasks.sample`.
        methods: name -> method.
        later: whether the question comes after the eviction; else before it.

    Returns:
        A row per method; columns "stored, MiB", answer, and found: whether it begins with the right answer.
    """
    context, question, lead = prompt.ids(tokenizer)
    before, after = (context, question + lead) if later else (context + question, lead)
    snapshot, rows = prefill(model, before), {}
    for name, method in methods.items():
        answer, stored = ask(model, tokenizer, snapshot, method, after, len(prompt.answer_ids(tokenizer)))
        found = answer.strip().startswith(prompt.answer.strip())
        rows[printed(name)] = {"stored, MiB": round(stored / 2**20, 2), "answer": answer, "found": found}
    return pd.DataFrame.from_dict(rows, orient="index")
