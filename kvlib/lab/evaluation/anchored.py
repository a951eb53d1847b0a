"""How well models answer that were trained with anchors, and others at as many bytes (`kvlib.lab.evaluation.arms`).

The right answer is fed with its anchors; what is written gets them where they are due. They cost nothing, and elsewhere
cannot be chosen: their logit is left out. What they would cost a model that has to choose them is told beside that.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch

from kvlib.lab import tasks
from kvlib.lab.evaluation import arms
from kvlib.lab.evaluation.answers import NEW_TOKENS, filled, greedy
from kvlib.lab.evaluation.arms import PLANTED, Asked, costs
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.evaluation.metrics import is_decided
from kvlib.lab.evaluation.prompts import Compressed, compressed, nats, one_by_one, predictions
from kvlib.lab.tasks import Prompt
from kvlib.methods.anchorcoder import Forced
from kvlib.verified import end_tokens

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
    full_bytes: of the same text without anchors. read_bytes: NaN. And, of models trained with anchors, where the right
    answer is fed:

    anchor_nats: what the answer's anchors cost if they are not planted.
    free_bits: bits per character for the answer and its anchors if they are not; of tasks judged by "bits".
    missed: the share of the answer's anchors that are not the model's first choice; spurious: the share of its other
        tokens at whose places an anchor is.

    Raises:
        ValueError: as `kvlib.lab.evaluation.arms.table`, and for families that are not judged by "exact", "bits" or
            "similarity".
    """
    if (metric := tasks.find(task).metric) not in ("exact", "bits", "similarity"):
        raise ValueError(f"{task} is judged by {metric!r}, not by 'exact', 'bits' or 'similarity'")
    return arms.table(
        score, EXTRA, model, tokenizer, configurations, task, length, samples,
        name=name, protocol=protocol, block=block, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def score(method, asked: Asked, tokenizer) -> dict[str, list]:
    """Columns of `evaluate` with one entry per prompt, for one method."""
    drawn, none, metric = asked.drawn, [math.nan] * len(asked.drawn), tasks.find(asked.drawn[0].task).metric
    with compressed(asked.prompts, method) as read:
        logits = asked.logits(read)
        found = costs(method, asked, read)
        if metric == "similarity":
            texts = written(read, logits, asked, NEW_TOKENS, tokenizer, is_decided)
            judged = {"value": [tasks.score(*pair) for pair in zip(drawn, texts)], **dict.fromkeys(EXTRA, none)}
        else:
            judged = fed(method, read, logits, asked, tokenizer, metric == "bits")
    return {"divergence": none, "agreement": none, **judged, **found}


def fed(method, read: Compressed, logits: torch.Tensor, asked: Asked, tokenizer, bits: bool) -> dict[str, list]:
    """Value and `EXTRA` where the right answers are fed.

    Args:
        logits: `(batch, vocabulary)` before them. bits: is the value what they cost, or whether they are chosen?
    """
    anchor, answers = asked.anchor, asked.answers(tokenizer)
    targets = filled([[*answer, 0] for answer in answers], logits.device)  # what comes behind is asked for, too
    stepwise = anchor is None and one_by_one(method)  # with anchors one pass has the mask of many
    stepwise |= targets.shape[1] - 1 > min(asked.room)  # it would count what fills up shorter answers
    parts = []
    for found, ids in predictions(read.feed, logits, targets, stepwise):
        free, first = nats(found, ids), found.argmax(-1)
        if anchor is None:
            parts.append((free, first, free, first))
        else:
            due, found = ids == anchor, without(anchor, found)
            parts.append((free, first, nats(found, ids).where(~due, 0), found.argmax(-1).where(~due, anchor)))
    free, first, cost, chosen = (torch.cat(each, dim=1).tolist() for each in zip(*parts))
    if bits:
        values = [in_bits(*each) for each in zip(cost, asked.drawn, answers)]
    else:
        values = [judge(*each, tokenizer, anchor) for each in zip(asked.drawn, answers, chosen)]
    found = {"value": values, **dict.fromkeys(EXTRA, [math.nan] * len(values))}
    if anchor is None:
        return found
    if bits:
        found["free_bits"] = [in_bits(*each) for each in zip(free, asked.drawn, answers)]
    return found | emission(answers, free, first, anchor)


def emission(answers: list[list[int]], nats_of: list[list[float]], first: list[list[int]], anchor: int) -> dict:
    """The columns `anchor_nats`, `missed` and `spurious`, from what a model makes of its answers if nothing is planted.

    Args:
        nats_of, first: what every token of the answers costs, and the first choice at its place.
    """
    rows = []
    for answer, each, choices in zip(answers, nats_of, first):
        due = [cost for token, cost in zip(answer, each) if token == anchor]
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


def written(
    read: Compressed, logits: torch.Tensor, asked: Asked, most: int, tokenizer, decided: Callable[[str], bool]
) -> list[str]:
    """What greedy decoding writes of every row, with anchors where they are due; a text without them.

    Args:
        logits: `(batch, vocabulary)` before what is written. most: tokens of a row, anchors included.
        decided: whether more text than this would change nothing.
    """
    if asked.anchor is not None:
        read = Planted(read, asked.prompts.ids)
        logits = read.due(logits)

    def text(ids: list[int]) -> str:
        return text_of(ids, tokenizer, asked.anchor)

    limits = [min(most, room + 1) for room in asked.room]
    ends = end_tokens(asked.prompts.model)
    rows = greedy(read.feed, read.keep, logits, ends, limits, lambda ids: decided(text(ids)))
    return [text(ids) for ids in rows]


class Planted:
    """An open block in which anchors are chosen where they are due, and nowhere else.

    Args:
        ids: `(batch, tokens)`, what has been read.
    """

    def __init__(self, read: Compressed, ids: torch.Tensor):
        self.read, self.ids, self.forced = read, ids, Forced(read.run)

    def due(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` for what comes behind the ids."""
        return self.forced(self.ids, logits)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.due(self.read.feed(ids)[:, -1])[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.ids = self.ids[rows.to(self.ids.device)]
        self.read.keep(rows)
