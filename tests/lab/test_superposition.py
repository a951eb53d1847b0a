"""What a linear probe reads from anchors' values, where that is known."""

import pytest
import tiny
import torch
from test_arms import ANCHOR, LAYERS, random_model
from transformers import AutoTokenizer

from kvlib.lab.evaluation import superposition as probe
from kvlib.methods.anchors import anchored
from kvlib.paths import MODELS

WORDS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "minilm", padding_side="left")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def words(rng, lines: int) -> torch.Tensor:
    """The first word is in half of the lines, later ones in fewer."""
    share = torch.linspace(0.5, 0.05, WORDS, dtype=torch.float64)
    return (torch.rand(lines, WORDS, generator=rng, dtype=torch.float64) < share).double()


def probed(made: torch.Tensor, bags: torch.Tensor) -> tuple[float, float]:
    """Recall and r2 on the last third."""
    cut = len(bags) * 2 // 3
    said, wanted = probe.ridge(made[:cut], bags[:cut], made[cut:]), bags[cut:]
    error = (wanted - said).square().sum() / (wanted - bags[:cut].mean(0)).square().sum()
    return probe.recall(said, wanted).nanmean().item(), 1 - error.item()


def test_words_that_are_linearly_there_are_found(rng):
    bags = words(rng, 1500)
    embedding = torch.randn(WORDS, 2 * WORDS, generator=rng, dtype=torch.float64)
    found, explained = probed(bags @ embedding * 7 + 3, bags)
    assert found == 1 and explained > 0.99


def test_fewer_directions_than_words_recover_less(rng):
    """In superposition: more than what is frequent, less than everything."""
    bags = words(rng, 3000)
    scores = []
    for size in (2, WORDS // 2, WORDS):
        embedding = torch.randn(WORDS, size, generator=rng, dtype=torch.float64)
        scores.append(probed(bags @ embedding, bags))
    (two, _), (half, part), (whole, everything) = scores
    assert two < half < whole and part == pytest.approx(0.5, abs=0.2) and everything > 0.9


def test_noise_recovers_what_is_frequent_and_no_more(rng):
    bags = words(rng, 3000)
    noise = torch.randn(3000, 16, generator=rng, dtype=torch.float64)
    found, explained = probed(noise, bags)
    prior = probe.recall(bags[:2000].mean(0).expand(1000, -1), bags[2000:]).nanmean().item()
    assert found == pytest.approx(prior, abs=0.03) and explained == pytest.approx(0, abs=0.03)


def test_recall_by_hand():
    said = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [1.0, 0.0, 0.0]])
    wanted = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert probe.recall(said, wanted).tolist() == pytest.approx([0.5, 1.0, float("nan")], nan_ok=True)


def test_ridge_is_that_of_the_normal_equations_with_the_penalty_in_rows(rng):
    """Least squares over standardised features and one more row for each, a whole other way to the same numbers."""
    x, y, asked = (torch.randn(n, m, generator=rng, dtype=torch.float64) for n, m in ((50, 4), (50, 3), (5, 4)))
    mean, spread = x.mean(0), x.std(0)
    rows = torch.cat([(x - mean) / spread, (50 * probe.PENALTY) ** 0.5 * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([y - y.mean(0), torch.zeros(4, 3, dtype=torch.float64)])
    weights = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(probe.ridge(x, y, asked), (asked - mean) / spread @ weights + y.mean(0))


TEXTS = [
    f"def f{n}(x):\n    return {name}\n\n{name} = x + {n}\n" for n, name in enumerate(["value", "other", "size"] * 3)
]


def test_values_are_those_of_the_projections(tokenizer):
    """Of the last token of every line, in layers that forget."""
    model, found = random_model(per=2), []
    projection = model.model.layers[1].self_attn.v_proj
    hook = projection.register_forward_hook(
        lambda module, given, out: found.extend(out if len(out) == 1 else [])
    )  # of texts
    lines = probe.read(model, tokenizer, TEXTS)
    hook.remove()
    assert list(lines.values) == [1] and LAYERS == 3 and len(found) == len(TEXTS)
    for number, (text, out) in enumerate(zip(TEXTS, found)):
        ids = tokenizer("").input_ids + anchored(text, tokenizer, model.config.anchorcoder)
        own = lines.text == number
        torch.testing.assert_close(lines.values[1][own], out[[token == ANCHOR for token in ids]])
        said = [tokenizer.decode(line) for line, mine in zip(lines.tokens, own) if mine]
        assert "".join(said) == f"<s>{text}" and len(said) == text.count("\n")


def test_tables_have_every_layer_that_forgets_and_every_test_file(tokenizer, monkeypatch):
    model = random_model(per=None, source=None, beyond=None)
    table = probe.superposition(model, tokenizer, TEXTS)
    assert table["layer"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and table["file"].tolist() == [2, 5, 8] * 3
    assert (table["lines"] == 3).all() and table[["recall", "shuffled"]].stack().between(0, 1).all()
    assert (table["words"] == 6).all()  # "size" is in no file for training
    assert table["recall"].mean() > table["shuffled"].mean()
    assert (table["r2"] <= 1).all() and table["r2"].max() > 0
    changed = probe.superposition(model, tokenizer, [*TEXTS[:8], TEXTS[8].replace("size", "value")])
    same = table["file"] != 8  # probes have not seen it
    assert changed[same].equals(table[same]) and not changed[~same].equals(table[~same])


def test_what_is_probed_stands_in_most_lines(monkeypatch):
    lines = [[5, 6, 6, 6, 6, 300], [5, 7, 300], [5, 300, 300], [202]]
    monkey = {5: "a", 6: "b", 7: "=", 300: "  "}

    class Letters:
        @staticmethod
        def decode(ids):
            return monkey.get(ids[0], "\n")

    assert probe.frequent(lines, Letters) == [5, 6]
    monkeypatch.setattr(probe, "FREQUENT", 1)
    assert probe.frequent(lines, Letters) == [5]
    assert probe.bags_of(lines, [5, 6]).tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]


def test_too_few_texts(tokenizer):
    with pytest.raises(ValueError, match="2 texts: at least 3"):
        probe.superposition(tiny.model(), tokenizer, TEXTS[:2])
