"""How far a method drifts from the full cache along a long text that it has to decode.

Keys and values of decoded tokens follow from hidden states that the method has changed, and are read by all later ones;
where that pollution matters it shows as a divergence that grows with the number of steps.

A prompt but for its last token is read and compressed; this token and then those of a text come one by one. The text is
what the full cache writes greedily, the same for all methods. It never ends: tokens that end a text are not chosen, so
tasks whose texts go on are meant (`kvlib.lab.tasks.LABEL_FREE`). Left alone, small models repeat themselves; a table
says in which rows (`repeats`).

Protocols: "steps 1-64" and so on name the steps that a row is a mean over. Step n foretells the n-th token of the text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

import kvlib
from kvlib.lab.evaluation.blockwise import check_protocol, costs, divided, table
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK, check_window
from kvlib.lab.evaluation.prompts import Prompts, compressed, window_of
from kvlib.lab.tasks import Prompt
from kvlib.verified import end_tokens

PROTOCOLS = {f"steps {first}-{last}": (first, last) for first, last in ((1, 64), (65, 128), (129, 256), (257, 512))}
LOOP = 64  # tokens


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = next(iter(PROTOCOLS)),
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    value: the share of the protocol's steps at which the method's first choice is that of the full cache.
    divergence: the mean over them of the Kullback-Leibler divergence in nats from the full cache's distribution.
    agreement: of the text and not of the method, the same for all configurations: 1 if the full cache's text repeats
        itself at the last of these steps, else 0. read_bytes: in the first decode step.

    Of the full cache a block holds the logits of these steps, up to 50 MB a prompt for a vocabulary of 49 152.

    Raises:
        ValueError: as there; if prompt and text exceed the model's window.
    """
    check_protocol(protocol, PROTOCOLS)
    first, last = PROTOCOLS[protocol]
    check_window(window_of(model), length + last)

    def begin(drawn: list[Prompt]) -> Callable:
        prompts, token = divided(model, tokenizer, drawn, 1)
        text = written(prompts, token, first, last)
        return lambda method: score(method, prompts, text)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What the full cache writes.

    ids: `(batch, 1 + steps)`, behind the last token of the prompt. logits: `(batch, vocabulary)` each, those of the
    last steps.
    """

    ids: torch.Tensor
    logits: list[torch.Tensor]


@torch.no_grad()
def written(prompts: Prompts, token: torch.Tensor, first: int, last: int) -> Text:
    """So many steps from the prompts' last tokens `(batch, 1)` on, with logits of the `first` to the `last`."""
    ends = torch.tensor(sorted(end_tokens(prompts.model)), dtype=torch.long, device=token.device)
    ids, logits = [token], []
    with compressed(prompts, kvlib.method("full")) as read:
        for step in range(1, last + 1):
            found = read.feed(ids[-1])[:, -1]
            if step >= first:
                logits.append(found)
            ids.append(found.index_fill(-1, ends, -torch.inf).argmax(-1, keepdim=True))
    return Text(torch.cat(ids, dim=1), logits)


@torch.no_grad()
def score(method, prompts: Prompts, text: Text) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    steps, same, divergence = text.ids.shape[1] - 1, [], []
    with compressed(prompts, method) as read:
        for step, tokens in enumerate(text.ids[:, :-1].split(1, dim=1)):
            logits = read.feed(tokens)[:, -1]
            if step == 0:
                found = costs(method, prompts, read)
            if step >= steps - len(text.logits):
                expected = text.logits[step - steps]
                same.append((logits.argmax(-1) == expected.argmax(-1)).double())
                divergence.append(kl(expected, logits))
    means = (torch.stack(each).mean(0).tolist() for each in (same, divergence))
    loops = [float(repeats(row)) for row in text.ids[:, 1:].tolist()]
    return {**dict(zip(("value", "divergence"), means)), "agreement": loops, **found}


def kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Nats `(batch,)` that the distribution of logits `(batch, vocabulary)` is from the expected one."""
    dtype = torch.promote_types(found.dtype, torch.float32)
    theirs, ours = (logits.to(dtype).log_softmax(-1) for logits in (expected, found))
    return (theirs.exp() * (theirs - ours)).sum(-1).double()


def repeats(ids: list[int]) -> bool:
    """Whether a text ends in a loop: two periods or more, of `LOOP` tokens or more together."""
    spans = ((period, max(2 * period, LOOP)) for period in range(1, len(ids) // 2 + 1))
    return any(ids[-span:-period] == ids[period - span :] for period, span in spans if span <= len(ids))
