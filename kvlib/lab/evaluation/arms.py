"""Models trained with anchors and others at as many bytes: what they are asked, and what that costs.

Every model reads the bytes that the base model's tokenizer has chosen: one that was trained with anchors
(`config.anchorcoder`) their lines with anchors planted, the others their tokens. What is stored is measured when all of
a prompt has been read, before an answer is.

Protocols:
    planted: for models trained with anchors, under the method "anchorcoder". Anchors are planted where they are due, in
        answers too, and nowhere else.
    bytes of per=4, bytes of per=6: for all other models. A method's budget is a share of the bytes that AnchorCoder
        with these full layers would store of the same prompt on the same model; "full" stores everything. A prompt but
        for its last token is compressed, then this token is fed, as under the protocol *asked* of `evaluate`; methods
        that evict no more when it comes get a token less.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch

from kvlib.core.support import attention_modules
from kvlib.lab import tasks
from kvlib.lab.evaluation.blockwise import check_protocol
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.equal_bytes import stored_entries, with_tokens
from kvlib.lab.evaluation.evaluate import CELL, MEASURED, check_window, prepare
from kvlib.lab.evaluation.prompts import Compressed, Prompts, device_name, padded, stored_per_row, window_of
from kvlib.lab.tasks import Prompt
from kvlib.methods.anchorcoder import SETTINGS
from kvlib.methods.anchors import anchored

PLANTED = "planted"
EQUAL = {f"bytes of per={per}": per for per in (4, 6)}
PROTOCOLS = (PLANTED, *EQUAL)


@dataclass(frozen=True)
class Asked:
    """A block of prompts for one model.

    prompts: what is read first; rest: ids and mask `(batch, tokens)` of what is fed behind it, None for nothing.
    tokens: of each prompt without anchors. settings: what the model says of anchors, None if it knows of none.
    """

    drawn: list[Prompt]
    prompts: Prompts
    rest: tuple[torch.Tensor, torch.Tensor] | None
    tokens: list[int]
    settings: dict | None

    @property
    def anchor(self) -> int | None:
        """Its id."""
        return None if self.settings is None else self.settings["anchor"]

    @property
    def counts(self) -> list[int]:
        """Tokens of each prompt as it is read."""
        behind = [0] * len(self.drawn) if self.rest is None else self.rest[1].sum(1).tolist()
        return [sum(pair) for pair in zip(self.prompts.counts, behind)]

    @property
    def room(self) -> list[float]:
        """Tokens left in the model's window behind each prompt."""
        window = window_of(self.prompts.model)
        return [math.inf if window is None else window - count for count in self.counts]

    def logits(self, read: Compressed) -> torch.Tensor:
        """`(batch, vocabulary)`, when all of the prompts has been read; inside the block of `read`, once."""
        return read.logits if self.rest is None else read.follow(*self.rest)

    def answers(self, tokenizer) -> list[list[int]]:
        """Ids of the right answers, with their anchors.

        Raises:
            ValueError: if the tokenizer joins the beginning of one with the end of its prompt.
        """
        if self.settings is None:
            return [prompt.answer_ids(tokenizer) for prompt in self.drawn]
        return [behind(prompt, tokenizer, self.settings) for prompt in self.drawn]


def behind(prompt: Prompt, tokenizer, settings: dict) -> list[int]:
    """Ids of the answer with its anchors. Raises ValueError if a token spans its beginning and the text's end."""
    text, whole = (anchored(each, tokenizer, settings) for each in (prompt.text, prompt.text + prompt.answer))
    if whole[: len(text)] != text:
        raise ValueError(f"{prompt.task}, seed {prompt.seed}: a token spans the text and the answer {prompt.answer!r}")
    return whole[len(text) :]


def settings_of(model) -> dict | None:
    """What a model trained with anchors says of them."""
    return getattr(model.config.get_text_config(), SETTINGS, None)


def asked_of(model, tokenizer, drawn: list[Prompt]) -> Asked:
    """The prompts of a block as the model reads them."""
    settings, tokens = settings_of(model), [sum(map(len, prompt.ids(tokenizer))) for prompt in drawn]
    if settings is None:
        return Asked(drawn, *prepare(model, tokenizer, drawn, "asked"), tokens, None)
    ids, mask = padded([anchored(prompt.text, tokenizer, settings) for prompt in drawn], model.device)
    return Asked(drawn, Prompts(model, ids, mask), None, tokens, settings)


def equalised(method, entries: list[float], asked: Asked):
    """The method with so many tokens per layer and KV head, times its budget, when all of a prompt has been read."""
    if method.name == "full":
        return method
    fed = [0] * len(entries) if method.evicts_in_decode else asked.rest[1].sum(1).tolist()
    return with_tokens(method, [int(method.budget * each) - n for each, n in zip(entries, fed)])


def costs(method, asked: Asked, read: Compressed) -> dict[str, list]:
    """Columns of `kvlib.lab.evaluation.evaluate` that say what a method costs, when all of a prompt has been read.

    full_bytes are those of the text without anchors. What a second layer reads is not counted, so that read_bytes are
    not known.
    """
    cache, none = read.run.cache, [math.nan] * len(asked.drawn)
    token_bytes = sum(layer.lengths.shape[1] * layer.token_bytes for layer in cache.layers)
    return {
        "stored_bytes": stored_per_row(cache),
        "read_bytes": none,
        "full_bytes": [tokens * token_bytes for tokens in asked.tokens],
        "prefill_flops": none if method.own_prefill else asked.prompts.flops,
        "clamped": read.run.clamped_rows.tolist(),
    }


def table(
    score: Callable,
    extra: Sequence[str],
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str,
    block: int,
    progress: Callable,
) -> pd.DataFrame:
    """One row per sample and configuration, with the columns of `kvlib.lab.evaluation.evaluate` and those of `extra`.

    Args:
        score: method, `Asked` and tokenizer -> the columns `MEASURED` and `extra`, one entry per prompt.
        The others as there.

    Raises:
        ValueError: as there; for a protocol and a model that do not fit each other, and for another method than
            "anchorcoder" under "planted".
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    if (protocol == PLANTED) != (settings_of(model) is not None):
        raise ValueError(f"{name}, protocol={protocol!r}: models trained with anchors have {PLANTED!r}, and only they")
    if protocol == PLANTED and {c.method for c in configurations} != {"anchorcoder"}:
        raise ValueError(f"protocol={protocol!r}: the method is anchorcoder")
    samples, rows, layers = list(samples), [], len(attention_modules(model))
    for numbers in progress([samples[i : i + block] for i in range(0, len(samples), block)]):
        drawn = [tasks.sample(task, length, number, tokenizer=tokenizer) for number in numbers]
        asked, per = asked_of(model, tokenizer, drawn), EQUAL.get(protocol)
        entries = per and [stored_entries(prompt.text, tokenizer, layers, per) / layers for prompt in drawn]
        for configuration in configurations:
            method = configuration.make()
            columns = score(equalised(method, entries, asked) if entries else method, asked, tokenizer)
            rows += [
                {**asdict(configuration), "sample": number, **dict(zip(columns, cells))}
                for number, *cells in zip(numbers, *columns.values())
            ]
    made = pd.DataFrame(rows).assign(
        model=name, task=task, length=length, protocol=protocol, torch=torch.__version__, device=device_name(model)
    )
    return made[[*CELL, "sample", *MEASURED, *extra, "torch", "device"]]
