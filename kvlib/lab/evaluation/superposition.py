"""How much of a line's words can be read from the value of its anchor: a linear probe.

    python -m kvlib.lab.evaluation.superposition    of held-out code, for arms with and without a second layer

Where lines are forgotten the anchor's value has to say what was in them, in one vector per KV head. A probe that is
trained on some files tells from such a vector, of one layer, which of the most frequent words stand in the line; on
other files it is scored. What it recovers is linearly there. A model that has another way to a line's words
(AnchorCoder's second layer) needs less of them in its anchors.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch

import kvlib
from kvlib import checksums, paths
from kvlib.lab.evaluation.prompts import device_name, window_of
from kvlib.lab.tasks.code import heldout_files
from kvlib.methods.anchors import anchored

ARMS = ("minilm-T-4", "minilm-TL-4", "minilm-TM-4", "minilm-TML-4")
FREQUENT = 256  # tokens
PENALTY = 1e-2  # of ridge regression, in units of a standardised feature's variance
TESTED = 3  # every third file


@dataclass(frozen=True)
class Lines:
    """The lines of texts that end in an anchor.

    tokens: of each line. text: the number of its text, `(lines,)`. values: layer -> `(lines, kv_heads x head_dim)`, the
    anchors' values, heads in a row, of every layer that forgets.
    """

    tokens: list[list[int]]
    text: torch.Tensor
    values: dict[int, torch.Tensor]


def superposition(model, tokenizer, texts: Sequence[str]) -> pd.DataFrame:
    """What probes recover on the texts that they were not trained on.

    Words are tokens with a letter in them, the `FREQUENT` ones of the training lines.

    Args:
        model: trained with anchors (`config.anchorcoder`). texts: files, of which every third is for testing; what
            exceeds the model's window is left out.

    Returns:
        one row per layer and test file with such words: layer, file (its number), lines, words (in all of them),
        recall: of the words of a line, the share that is among as many words as the probe ranks highest; the mean over
            the lines that have any.
        shuffled: the same of a probe whose training lines had each other's words, which knows what is frequent.
        r2: 1 - squared error of the probe / that of the training lines' mean, over all words.

    Raises:
        ValueError: for fewer than three texts, and as the method "anchorcoder".
    """
    if len(texts) < TESTED:
        raise ValueError(f"{len(texts)} texts: at least {TESTED}, of which one is for testing")
    lines = read(model, tokenizer, texts)
    tested = lines.text % TESTED == TESTED - 1
    bags = bags_of(lines.tokens, frequent([line for line, test in zip(lines.tokens, tested) if not test], tokenizer))
    rows = []
    for layer, values in lines.values.items():
        train, test = (values[chosen].double() for chosen in (~tested, tested))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        said, wanted, middle = ridge(train, bags[~tested], test), bags[tested], bags[~tested].mean(0)
        scores = recall(said, wanted), recall(ridge(train, bags[~tested][order], test), wanted)
        errors = ((wanted - said) ** 2).sum(1), ((wanted - middle) ** 2).sum(1)
        for file in lines.text[tested].unique().tolist():
            own = (lines.text[tested] == file) & (wanted.sum(1) > 0)
            if own.any():
                found, shuffled = (score[own].mean().item() for score in scores)
                left, all_of_it = (error[own].sum().item() for error in errors)
                rows.append(
                    (layer, file, int(own.sum()), int(wanted[own].sum()), found, shuffled, 1 - left / all_of_it)
                )
    return pd.DataFrame(rows, columns=["layer", "file", "lines", "words", "recall", "shuffled", "r2"])


@torch.no_grad()
def read(model, tokenizer, texts: Sequence[str]) -> Lines:
    """The lines of texts, with their anchors' values as the model stores them."""
    settings, window = model.config.get_text_config().anchorcoder, window_of(model)
    method, tokens, numbers, values = kvlib.method("anchorcoder"), [], [], {}
    for number, text in enumerate(texts):
        ids = (tokenizer("").input_ids + anchored(text, tokenizer, settings))[:window]
        places = [place for place, token in enumerate(ids) if token == settings["anchor"]]
        tokens += [ids[begin + 1 : end] for begin, end in pairwise([-1, *places])]
        numbers += [number] * len(places)
        with method(model) as run:
            model(torch.tensor([ids], device=model.device), logits_to_keep=1)
            full = run.prepared.settings.full
            for layer in run.cache.layers:
                if not full(layer.index):
                    values.setdefault(layer.index, []).append(values_at(layer, places))
    return Lines(tokens, torch.tensor(numbers), {layer: torch.cat(parts) for layer, parts in values.items()})


def values_at(layer, places: list[int]) -> torch.Tensor:
    """`(places, kv_heads x head_dim)`: the values that a layer of one row stores of the tokens at these positions."""
    positions, value = layer.tail.position_rectangle()[0, 0], layer.tail.rectangle(layer.tail.fields["value"])[0]
    slots = torch.searchsorted(positions, torch.tensor(places, dtype=positions.dtype, device=positions.device))
    return value[:, slots].transpose(0, 1).flatten(1).cpu()


def frequent(lines: Sequence[list[int]], tokenizer) -> list[int]:
    """The tokens with a letter that stand in most lines."""
    counts = Counter(token for line in lines for token in set(line))
    words = [token for token, _ in counts.most_common() if any(map(str.isalpha, tokenizer.decode([token])))]
    return words[:FREQUENT]


def bags_of(lines: Sequence[list[int]], words: Sequence[int]) -> torch.Tensor:
    """Which words stand in each line, `(lines, words)` of 0 and 1 in float64."""
    return torch.tensor([[float(word in line) for word in words] for line in map(set, lines)], dtype=torch.float64)


def ridge(features: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """What ridge regression of targets `(lines, words)` on features `(lines, size)` says of other lines' features."""
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-12)
    x, middle = (features - mean) / spread, targets.mean(0)
    covariance = x.T @ x / len(x) + PENALTY * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(covariance, x.T @ (targets - middle) / len(x))
    return (asked - mean) / spread @ weights + middle


def recall(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The share of each line's words that are among as many words as are ranked highest, `(lines,)`; NaN of none."""
    counts = wanted.sum(1)
    rank = said.argsort(dim=1, descending=True).argsort(dim=1)
    return (wanted * (rank < counts[:, None])).sum(1) / counts


def main(argv: list[str] | None = None) -> None:
    """Write data/results/03_superposition.parquet: `ARMS` on the held-out code."""
    argparse.ArgumentParser("python -m kvlib.lab.evaluation.superposition", description=main.__doc__).parse_args(argv)
    texts, tables = [row["text"] for row in heldout_files()], []
    for name in ARMS:
        model, tokenizer = kvlib.load(name)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        table = superposition(model, tokenizer, texts)
        tables.append(table.assign(model=name, torch=torch.__version__, device=device_name(model)))
    file = paths.RESULTS / "03_superposition.parquet"
    pd.concat(tables).to_parquet(file, compression="zstd", index=False)
    checksums.record(file)


if __name__ == "__main__":
    main()
