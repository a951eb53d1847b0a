"""Recall and mass of what readers select, against the stock model's own attention weights, with loops."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import tiny
import torch
from test_tidaldecode import oracle_choice
from throwaway import Pages
from transformers import AttentionInterface, AutoTokenizer

import kvlib
from kvlib import paths
from kvlib.core.method import METHODS
from kvlib.lab import tasks
from kvlib.lab.evaluation import recall
from kvlib.lab.evaluation.blockwise import divided
from kvlib.lab.evaluation.configuration import Configuration

TASK, LENGTH, STEPS, LAYERS = "transform", 160, 4, 5
SETTINGS = [
    {"selection_layers": [1, 3]},
    {"selection_layers": [0], "heads": "group"},
    {"selection_layers": [2], "heads": "all", "sinks": 2, "recent": 0.25},
]


def random_model(architecture: str):
    return tiny.build(architecture, vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.MODELS / "minilm", padding_side="left")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.setitem(METHODS, "pages", Pages)
    return lambda budget, page: Configuration("pages", budget, json.dumps({"page": page}))


def attentions(architecture: str, ids: torch.Tensor) -> list[list]:
    """`[step][layer]`: weights `(query_heads, tokens)` of each of the last tokens, by the stock model in one pass."""
    found = []

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        """Eager attention, whose softmax is in float32 there, whatever the weights are."""
        logits = torch.einsum("hgqd,hkd->hgqk", query[0].unflatten(0, (key.shape[1], -1)), key[0]) * scaling
        weights = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        found.append(weights.flatten(0, 1)[None])
        return torch.einsum("hgqk,hkd->qhgd", weights, value[0]).flatten(1, 2)[None], None

    AttentionInterface.register("noting", attend)
    model = random_model(architecture)
    model.set_attn_implementation("noting")
    model(ids)
    places = range(ids.shape[1] - STEPS, ids.shape[1])
    return [[weights[0, :, place, : place + 1] for weights in found] for place in places]


def measured(weights: torch.Tensor, sets: list[set]) -> tuple[float, float]:
    """Mean recall and mass of one set for each query head."""
    recalls, masses = [], []
    for head, chosen in zip(weights.tolist(), sets, strict=True):
        best = sorted(range(len(head)), key=lambda j, head=head: -head[j])[: len(chosen)]
        recalls.append(len(chosen & {*best}) / len(chosen))
        masses.append(sum(head[j] for j in chosen))
    return sum(recalls) / len(recalls), sum(masses) / len(masses)


def prompt(number: int, tokenizer) -> torch.Tensor:
    """Ids `(1, tokens)`."""
    drawn = tasks.sample(TASK, LENGTH + 40 * number, number, tokenizer=tokenizer)
    return torch.tensor([[token for part in drawn.ids(tokenizer) for token in part]])


def by_layer(configuration: Configuration, architecture: str, tokenizer, numbers=range(3)):
    drawn = [tasks.sample(TASK, LENGTH + 40 * number, number, tokenizer=tokenizer) for number in numbers]
    return recall.by_layer(configuration.make(), *divided(random_model(architecture), tokenizer, drawn, STEPS))


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("k", [4, 20])
def test_layers_that_reuse_slots_by_hand(tokenizer, architecture, setting, k):
    """In company; of the oracle each prompt alone."""
    found = by_layer(Configuration("tidaldecode", k, json.dumps(setting)), architecture, tokenizer)
    arguments = (setting.get("heads", "query"), setting.get("sinks", 0), setting.get("recent", 0.0))
    for number in range(3):
        expected: dict[int, list] = {}
        for layers in attentions(architecture, prompt(number, tokenizer)):
            for layer, weights in enumerate(layers):
                if layer in setting["selection_layers"]:
                    grouped = weights.log().unflatten(0, (4 if architecture == "llama-mha" else 2, -1))
                    sets = oracle_choice(grouped, k, *arguments)
                elif layer > setting["selection_layers"][0]:
                    expected.setdefault(layer, []).append(measured(weights, sets))
        for layer in range(LAYERS):
            pair = found.recall[number, layer].item(), found.mass[number, layer].item()
            steps = expected.get(layer)
            means = [sum(x) / STEPS for x in zip(*steps)] if steps else [math.nan] * 2
            assert pair == pytest.approx(means, rel=1e-9, nan_ok=True)
    sparse = found.recall[~found.recall.isnan()]
    assert 0 < sparse.mean() < 1, "all or nothing compares nothing"


@pytest.mark.parametrize("k", [1, 10])
def test_pages_of_one_token_are_the_best_tokens(tokenizer, pages, k):
    """A bound of one key is its logit: with a head for each query what is read is the newest token and the best k."""
    found = by_layer(pages(k, 1), "llama-mha", tokenizer)
    for number in range(3):
        pairs = []
        for layers in attentions("llama-mha", prompt(number, tokenizer)):
            for weights in layers:
                newest = weights.shape[1] - 1
                best = weights[:, :-1].argsort(dim=1, descending=True)[:, :k].tolist()
                pairs.append(measured(weights, [{newest, *head} for head in best]))
        expected = [sum(x) / len(pairs) for x in zip(*pairs)]
        assert [found.recall[number].mean(), found.mass[number].mean()] == pytest.approx(expected, rel=1e-9)
    assert found.recall.mean() > 0.5 and (found.recall < 1).any()


def test_a_table_has_the_means_and_what_the_method_reads(tokenizer, pages):
    """Over layers that read sparsely; 1 if there are none; bytes of the first step, as when the method decodes."""
    model = random_model("llama-gqa")
    tidal = Configuration("tidaldecode", 0.2, json.dumps(SETTINGS[0]))
    configurations = [Configuration("full", 1.0), Configuration("tidaldecode", 1.0), tidal, pages(20, 4)]
    tables = [
        recall.evaluate(model, tokenizer, configurations, TASK, LENGTH, range(3), name="", block=block)
        for block in (1, 3)
    ]
    alone, table = (t.sort_values(["method", "budget", "sample"], ignore_index=True) for t in tables)
    pd.testing.assert_frame_equal(alone, table, rtol=1e-9, check_exact=False)
    everything = table[table["budget"] == 1.0]
    assert len(everything) == 6 and (everything[["value", "agreement"]] == 1).all(axis=None)
    assert table["divergence"].isna().all()
    drawn = [tasks.sample(TASK, LENGTH, number, tokenizer=tokenizer) for number in range(3)]
    assert len({sum(map(len, prompt.ids(tokenizer))) for prompt in drawn}) > 1, "padding"
    prompts, last = divided(model, tokenizer, drawn, STEPS)
    for configuration in configurations[2:]:
        rows = table[table["budget"].eq(configuration.budget) & table["method"].eq(configuration.method)]
        found = recall.by_layer(configuration.make(), prompts, last)
        for number in range(3):
            layers = [x for x in found.recall[number].tolist() if not math.isnan(x)]
            held = [x for x in found.mass[number].tolist() if not math.isnan(x)]
            assert rows["value"].iloc[number] == pytest.approx(sum(layers) / len(layers))
            assert rows["agreement"].iloc[number] == pytest.approx(sum(held) / len(held))
            assert len(layers) == (2 if configuration is tidal else LAYERS)
            ids = torch.tensor([[token for part in drawn[number].ids(tokenizer) for token in part]])
            with configuration.make()(model) as run, torch.no_grad():
                run.read(input_ids=ids[:, :-STEPS])
                model(ids[:, -STEPS, None], past_key_values=run.cache)
                assert rows["read_bytes"].iloc[number] == run.read_bytes() < run.full_bytes()


def test_a_slot_that_is_selected_twice_counts_once(tokenizer, monkeypatch):
    """And -1 is no slot, in some layers and steps only."""

    @dataclasses.dataclass(frozen=True)
    class Fixed(kvlib.Reader):
        def select(self, view):
            if view.layer_idx != 2 or view.step.index == 3:
                return None
            slots = torch.tensor([-1, 5, 5, 0, -1, 7, 5])
            return slots.expand(len(view.tokens), view.key.shape[1], -1)

    monkeypatch.setitem(METHODS, "fixed", Fixed)
    found = by_layer(Configuration("fixed", 3), "llama-gqa", tokenizer, [0])
    steps = attentions("llama-gqa", prompt(0, tokenizer))
    pairs = [measured(steps[step][2], [{0, 5, 7}] * 4) for step in (0, 1, 3)]
    assert found.recall[0, 2].item() == pytest.approx(sum(r for r, _ in pairs) / 3, rel=1e-9)
    assert found.mass[0, 2].item() == pytest.approx(sum(m for _, m in pairs) / 3, rel=1e-9)
    assert found.recall.isnan().sum() == LAYERS - 1


def test_what_cannot_be_asked(tokenizer):
    model = random_model("llama-gqa")
    for method, protocol, length, said in (
        ("full", "asked", LENGTH, "protocol='asked': dense steps"),
        ("full", "dense steps", 1025, "window is 1024"),
        ("h2o", "dense steps", LENGTH, "h2o: recall is of methods that select what they read"),
    ):
        asked = [Configuration(method, 1.0)]
        with pytest.raises(ValueError, match=said):
            recall.evaluate(model, tokenizer, asked, TASK, length, [0], name="", protocol=protocol)
