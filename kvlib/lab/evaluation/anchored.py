"""Models that were trained with anchors, and others with as many bytes: the same prompts, read to their end.

Every model reads the bytes that the base model's tokenizer has chosen: one that was trained with anchors
(`config.anchorcoder`) their lines with anchors planted, the others their tokens. What is stored is measured when all of
a prompt has been read, before an answer is.

Protocols:
    planted: for models trained with anchors, under the method "anchorcoder". The right answer is fed with its anchors;
        what is written gets them where they are due. They cost nothing, and elsewhere cannot be chosen: their
        logit is left out.
    bytes of per=4, bytes of per=6: for all other models. A method's budget is a share of the bytes that AnchorCoder
        with these full layers would store of the same prompt on the same model; "full" stores everything. A prompt but
        for its last token is compressed, then this token is fed, as under the protocol *asked* of `evaluate`; methods
        that evict no more when it comes get a token less.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from kvlib.core.support import attention_modules
from kvlib.lab import tasks
from kvlib.lab.evaluation.answers import NEW_TOKENS, filled, greedy
from kvlib.lab.evaluation.blockwise import check_protocol
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.equal_bytes import stored_entries, with_tokens
from kvlib.lab.evaluation.evaluate import BLOCK, check_window, prepare
from kvlib.lab.evaluation.extended import table
from kvlib.lab.evaluation.metrics import is_decided
from kvlib.lab.evaluation.prompts import (
    Compressed,
    Prompts,
    compressed,
    nats,
    one_by_one,
    padded,
    predictions,
    stored_per_row,
    window_of,
)
from kvlib.lab.tasks import Prompt
from kvlib.methods.anchorcoder import SETTINGS, Forced
from kvlib.methods.anchors import anchored
from kvlib.verified import end_tokens

PLANTED = "planted"
EQUAL = {f"bytes of per={per}": per for per in (4, 6)}
PROTOCOLS = (PLANTED, *EQUAL)
EXTRA = ("anchor_nats", "free_bits", "missed", "spurious")
LN_2 = math.log(2)


def evaluate(
    model,
    tokenizer,
    configurations: Sequence[Configuration],
    task: str,
    length: int,
    samples: Iterable[int],
    *,
    name: str,
    protocol: str = PLANTED,
    block: int = BLOCK,
    progress: Callable = iter,
) -> pd.DataFrame:
    """One row per sample and configuration. Arguments and columns are those of `kvlib.lab.evaluation.evaluate`.

    length: without anchors. value: as there, without divergence and agreement. stored_bytes: at the end of the prompt.
    full_bytes: of the same text without anchors. read_bytes: NaN, since what a second layer reads is not counted. And,
    of models trained with anchors, where the right answer is fed:

    anchor_nats: what the answer's anchors cost if they are not planted.
    free_bits: bits per character for the answer and its anchors if they are not; of tasks judged by "bits".
    missed: the share of the answer's anchors that are not the model's first choice; spurious: the share of its other
        tokens at whose places an anchor is.

    Raises:
        ValueError: as there; for a protocol and a model that do not fit each other, for another method than
            "anchorcoder" under "planted", and for families that are not judged by "exact", "bits" or "similarity".
    """
    check_protocol(protocol, PROTOCOLS)
    check_window(window_of(model), length)
    if (protocol == PLANTED) != (settings_of(model) is not None):
        raise ValueError(f"{name}, protocol={protocol!r}: models trained with anchors have {PLANTED!r}, and only they")
    if protocol == PLANTED and {c.method for c in configurations} != {"anchorcoder"}:
        raise ValueError(f"protocol={protocol!r}: the method is anchorcoder")
    if (metric := tasks.find(task).metric) not in ("exact", "bits", "similarity"):
        raise ValueError(f"{task} is judged by {metric!r}, not by 'exact', 'bits' or 'similarity'")

    def begin(drawn: list[Prompt]) -> Callable:
        asked = prompts_of(model, tokenizer, drawn)
        if protocol == PLANTED:
            return lambda method: score(method, asked, tokenizer)
        layers = len(attention_modules(model))
        entries = [stored_entries(prompt.text, tokenizer, layers, EQUAL[protocol]) / layers for prompt in drawn]
        return lambda method: score(equalised(method, entries, asked), asked, tokenizer)

    return table(
        begin, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress, extra=EXTRA,
    )  # fmt: skip


def settings_of(model) -> dict | None:
    """What a model trained with anchors says of them."""
    return getattr(model.config.get_text_config(), SETTINGS, None)


# Prompts


@dataclass(frozen=True)
class Asked:
    """A block of prompts for one model.

    prompts: what is read first; rest: ids and mask `(batch, tokens)` of what is fed behind it, None for nothing.
    answers: ids of the right ones, with their anchors; none where the model writes. tokens: of each prompt without
    anchors. anchor: its id, None for a model without.
    """

    drawn: list[Prompt]
    prompts: Prompts
    rest: tuple[torch.Tensor, torch.Tensor] | None
    answers: list[list[int]]
    tokens: list[int]
    anchor: int | None

    @property
    def counts(self) -> list[int]:
        """Tokens of each prompt as it is read."""
        behind = [0] * len(self.drawn) if self.rest is None else self.rest[1].sum(1).tolist()
        return [sum(pair) for pair in zip(self.prompts.counts, behind)]


def prompts_of(model, tokenizer, drawn: list[Prompt]) -> Asked:
    """The prompts of a block as the model reads them."""
    settings, written = settings_of(model), tasks.find(drawn[0].task).metric == "similarity"
    tokens = [sum(map(len, prompt.ids(tokenizer))) for prompt in drawn]
    if settings is None:
        prompts, rest = prepare(model, tokenizer, drawn, "asked")
        answers = [] if written else [prompt.answer_ids(tokenizer) for prompt in drawn]
        return Asked(drawn, prompts, rest, answers, tokens, None)
    texts = [anchored(prompt.text, tokenizer, settings) for prompt in drawn]
    answers = [] if written else [behind(*pair, tokenizer, settings) for pair in zip(drawn, texts)]
    return Asked(drawn, Prompts(model, *padded(texts, model.device)), None, answers, tokens, settings["anchor"])


def behind(prompt: Prompt, text: list[int], tokenizer, settings: dict) -> list[int]:
    """Ids of the answer with its anchors. Raises ValueError if a token spans its beginning and the text's end."""
    whole = anchored(prompt.text + prompt.answer, tokenizer, settings)
    if whole[: len(text)] != text:
        raise ValueError(f"{prompt.task}, seed {prompt.seed}: a token spans the text and the answer {prompt.answer!r}")
    return whole[len(text) :]


def equalised(method, entries: list[float], asked: Asked):
    """The method with so many tokens per layer and KV head, times its budget, when all of a prompt has been read."""
    if method.name == "full":
        return method
    fed = [0] * len(entries) if method.evicts_in_decode else asked.rest[1].sum(1).tolist()
    return with_tokens(method, [int(method.budget * each) - n for each, n in zip(entries, fed)])


# Answers


@torch.no_grad()
def score(method, asked: Asked, tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    drawn, none = asked.drawn, [math.nan] * len(asked.drawn)
    with compressed(asked.prompts, method) as read:
        logits = read.logits if asked.rest is None else read.follow(*asked.rest)
        cache = read.run.cache
        token_bytes = sum(layer.lengths.shape[1] * layer.token_bytes for layer in cache.layers)
        costs = {
            "stored_bytes": stored_per_row(cache),
            "read_bytes": none,
            "full_bytes": [tokens * token_bytes for tokens in asked.tokens],
            "prefill_flops": none if method.own_prefill else asked.prompts.flops,
            "clamped": read.run.clamped_rows.tolist(),
        }
        window = window_of(read.run.model)
        left = [math.inf if window is None else window - count for count in asked.counts]
        if asked.answers:
            judged = fed(method, read, logits, asked, min(left), tokenizer)
        else:
            texts = written(read, logits, asked, [min(NEW_TOKENS, room + 1) for room in left], tokenizer)
            judged = {"value": [tasks.score(*pair) for pair in zip(drawn, texts)], **dict.fromkeys(EXTRA, none)}
    return {"divergence": none, "agreement": none, **judged, **costs}


def fed(method, read: Compressed, logits: torch.Tensor, asked: Asked, room: float, tokenizer) -> dict[str, list]:
    """Value and `EXTRA` where the right answers are fed.

    Args:
        logits: `(batch, vocabulary)` before the answers.
        room: tokens left in the window behind the longest prompt. Shorter answers are filled up, which one pass would
            count.
    """
    anchor, bits = asked.anchor, tasks.find(asked.drawn[0].task).metric == "bits"
    targets = filled([[*answer, 0] for answer in asked.answers], logits.device)  # what comes behind is asked for, too
    alone = anchor is None and one_by_one(method)  # with anchors one pass has the mask of many
    parts = []
    for found, ids in predictions(read.feed, logits, targets, alone or targets.shape[1] - 1 > room):
        free, first = nats(found, ids), found.argmax(-1)
        if anchor is None:
            parts.append((free, first, free, first))
        else:
            due, found = ids == anchor, without(anchor, found)
            parts.append((free, first, nats(found, ids).where(~due, 0), found.argmax(-1).where(~due, anchor)))
    free, first, cost, chosen = (torch.cat(each, dim=1).tolist() for each in zip(*parts))
    if bits:
        values = [in_bits(*each) for each in zip(cost, asked.drawn, asked.answers)]
    else:
        values = [judge(*each, tokenizer, anchor) for each in zip(asked.drawn, asked.answers, chosen)]
    found = {"value": values, **dict.fromkeys(EXTRA, [math.nan] * len(values))}
    if anchor is None:
        return found
    if bits:
        found["free_bits"] = [in_bits(*each) for each in zip(free, asked.drawn, asked.answers)]
    return found | emission(asked.answers, free, first, anchor)


def emission(answers: list[list[int]], nats_of: list[list[float]], first: list[list[int]], anchor: int) -> dict:
    """The columns `anchor_nats`, `missed` and `spurious`, from what a model makes of its answers if nothing is planted.

    Args:
        nats_of, first: what every token of the answers costs, and the first choice at its place.
    """
    rows = []
    for answer, costs, choices in zip(answers, nats_of, first):
        due = [cost for token, cost in zip(answer, costs) if token == anchor]
        missed = [choice != anchor for token, choice in zip(answer, choices) if token == anchor]
        spurious = [choice == anchor for token, choice in zip(answer, choices) if token != anchor]
        rows.append((sum(due) if due else math.nan, mean(missed), mean(spurious)))
    return dict(zip(("anchor_nats", "missed", "spurious"), map(list, zip(*rows))))


def mean(values: list[bool]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def without(anchor: int, logits: torch.Tensor) -> torch.Tensor:
    """Logits `(..., vocabulary)` under which the anchor is never chosen."""
    return logits.index_fill(-1, torch.tensor(anchor, device=logits.device), -torch.inf)


def in_bits(nats_of: list[float], prompt: Prompt, answer: list[int]) -> float:
    """Bits per character of the answer, of what each of its tokens costs; what is behind them does not count."""
    return sum(nats_of[: len(answer)]) / LN_2 / len(prompt.answer)


def judge(prompt: Prompt, answer: list[int], chosen: list[int], tokenizer, anchor: int | None) -> float:
    """As `kvlib.lab.tasks.judge`, which knows of no anchors; `chosen` may go on behind the token after the answer."""
    right = next((i for i, pair in enumerate(zip(answer, chosen)) if pair[0] != pair[1]), len(answer))
    return tasks.score(prompt, text_of([*answer[:right], chosen[right]], tokenizer, anchor))


def text_of(ids: list[int], tokenizer, anchor: int | None) -> str:
    return tokenizer.decode([token for token in ids if token != anchor], skip_special_tokens=True)


def written(read: Compressed, logits: torch.Tensor, asked: Asked, most: list[int], tokenizer) -> list[str]:
    """The line of code that greedy decoding writes of every row, with anchors where they are due.

    Args:
        logits: `(batch, vocabulary)` before the answers. most: tokens of each row, anchors included.
    """
    anchor = asked.anchor
    planted = Planted(read, asked.prompts.ids) if anchor is not None else read

    def done(ids: list[int]) -> bool:
        return is_decided(text_of(ids, tokenizer, anchor))

    first = logits if anchor is None else planted.due(logits)
    rows = greedy(planted.feed, planted.keep, first, end_tokens(read.run.model), most, done)
    return [text_of(ids, tokenizer, anchor) for ids in rows]


class Planted:
    """An open block in which anchors are chosen where they are due, and nowhere else.

    Args:
        ids: `(batch, tokens)`, what has been read.
    """

    def __init__(self, read: Compressed, ids: torch.Tensor):
        self.read, self.ids, self.forced = read, ids, Forced(read.run.prepared.settings)

    def due(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` for what comes behind the ids."""
        return self.forced(self.ids, logits)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.due(self.read.feed(ids)[:, -1])[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.ids = self.ids[rows.to(self.ids.device)]
        self.read.keep(rows)
