"""Greedy decoding by a reader whose tokens are checked: the text is that of full attention, for fewer bytes or not."""

from dataclasses import dataclass

import torch

from kvlib.core.method import Reader


@dataclass(frozen=True)
class Verified:
    """What `generate_verified` returns.

    Attributes:
        ids: `(batch, tokens)`, the prompt and what follows it, as `generate` returns them: a row that has ended is
            filled up with the padding token.
        new: `(batch,)` tokens that were generated. checks: `(batch,)` dense passes that the row took part in.
        drafted: `(batch,)` sparse steps of the row, each of which drafted a token.
        read_bytes: K and V read by all steps and checks. dense_bytes: by dense decoding of the same tokens.
    """

    ids: torch.Tensor
    new: torch.Tensor
    checks: torch.Tensor
    drafted: torch.Tensor
    read_bytes: int
    dense_bytes: int

    @property
    def tokens_per_check(self) -> torch.Tensor:
        """`(batch,)`: the first token needs none, it comes from the prompt."""
        return (self.new - 1) / self.checks.clamp(min=1)


@torch.no_grad()
def generate_verified(
    model,
    method: Reader,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    draft: int = 8,
) -> Verified:
    """Draft tokens sparsely, then read them again densely, which checks them and corrects their keys and values.

    The check keeps the drafted tokens up to the first that full attention would not have chosen, puts its own in that
    place, and what was drafted behind is forgotten. So everything stays that greedy decoding with full attention
    writes, up to rounding: one pass over several tokens adds in another order than several passes. The cache
    correction of TidalDecode (2410.05076), used as the check of self-speculative decoding; the paper does not revise
    what was sampled.

    Args:
        input_ids, attention_mask: `(batch, tokens)`, padded on the left.
        max_new_tokens: tokens of each row, fewer if it ends. draft: sparse steps between two checks.

    Raises:
        ValueError: for a method that is not a reader, and numbers < 1.
    """
    if not isinstance(method, Reader):
        raise ValueError(f"{method!r} is not a reader: what it evicts cannot be checked")
    for name, number in {"max_new_tokens": max_new_tokens, "draft": draft}.items():
        if number < 1:
            raise ValueError(f"{name}={number}: at least 1")
    batch, ends = len(input_ids), end_tokens(model)
    written: list[list[int]] = [[] for _ in range(batch)]
    checks, drafted = torch.zeros(2, batch, dtype=torch.int64)
    read = 0
    with method(model) as run:
        logits = model(input_ids, attention_mask=attention_mask, use_cache=True).logits[:, -1]
        cache, rows, prompts = run.cache, torch.arange(batch), run.cache.tokens
        token_bytes = run.full_bytes() // int(prompts.sum())
        sure = logits.argmax(-1, keepdim=True)  # `(rows, 1)`: what comes next, and is not in the cache yet
        found = sure.tolist()
        while True:
            for row, tokens in zip(rows.tolist(), found):
                written[row] += until(tokens, ends, max_new_tokens - len(written[row]))
            stay = [
                i for i, row in enumerate(rows) if len(written[row]) < max_new_tokens and written[row][-1] not in ends
            ]
            if not stay:
                break
            if len(stay) < len(rows):
                cache.batch_select_indices(torch.tensor(stay))
                rows, sure = rows[stay], sure[stay]
            steps = min(draft, max_new_tokens - min(len(written[row]) for row in rows))
            guesses, token = [], sure
            for _ in range(steps):
                token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                guesses.append(token)
                read += (latest := run.read_bytes())
            right = run.reread(steps).argmax(-1)
            read += run.read_bytes() - latest
            agree = (torch.cat(guesses, dim=1) == right).cumprod(1).sum(1).cpu()
            keep = (agree + 1).clamp(max=steps)  # the first that differs is replaced
            cache.forget(steps - keep)
            found = [tokens[:n] for tokens, n in zip(right.tolist(), keep.tolist())]
            sure = right.gather(1, keep.to(right.device)[:, None] - 1)
            checks[rows] += 1
            drafted[rows] += steps
    new = torch.tensor([len(tokens) for tokens in written])
    pad = model.generation_config.pad_token_id
    filler = min(ends, default=0) if pad is None else pad
    tail = torch.full((batch, int(new.max())), filler, device=input_ids.device)
    for row, tokens in enumerate(written):
        tail[row, : len(tokens)] = torch.tensor(tokens)
    decoded = (new - 1) * prompts + (new - 1) * new // 2  # tokens that dense decoding reads, the new one with them
    dense = int(decoded.sum()) * token_bytes
    return Verified(torch.cat([input_ids, tail], dim=1), new, checks, drafted, read, dense)


def end_tokens(model) -> set[int]:
    """Ids at which `generate` stops."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def until(tokens: list[int], ends: set[int], most: int) -> list[int]:
    """The first `most` tokens, up to one that ends the text."""
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: min(stop, most)]
