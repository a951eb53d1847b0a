"""AnchorCoder: what is freed is what the training mask hides."""

import pytest
import tiny
import torch
from anchored import Anchored, places
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.methods.anchors import lines, moves, offsets, plant, visible

ANCHOR, END = 7, 9
SETTINGS = {  # what is left out of the whole: a second layer, heads that see anchors elsewhere, full layers
    "TAA": {"per": 2, "spread": False},
    "TAA and MHPE": {"per": 2},
    "TAA and LAA": {"per": 2, "source": 0, "beyond": 1, "spread": False},
    "whole": {"per": 2, "source": 2, "beyond": 2},
    "a source that forgets": {"per": 2, "source": 1, "beyond": 1},
    "a quarter": {"per": 4, "source": 0, "beyond": 0},
    "dense": {"per": 1},
    "no full layer": {"per": None, "source": 1, "beyond": 2},
}


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids with lines of 0 to 9 tokens."""
    ids, generator = tiny.tokens(tokens, seed=seed), torch.Generator().manual_seed(seed)
    ids[ids == ANCHOR] = 1
    at = torch.randint(0, 10, (tokens,), generator=generator).cumsum(0)
    ids[at[at < tokens]] = ANCHOR
    return ids


def method(name="whole", **more):
    return kvlib.method("anchorcoder", **{"anchor": ANCHOR, "forced": False, **SETTINGS[name], **more})


@pytest.mark.parametrize("name", SETTINGS)
def test_freeing_is_hiding(name):
    """At once, in chunks and token by token the logits are those of the mask over everything."""
    model = tiny.build(["llama-gqa", "qwen3"][len(name) % 2], num_hidden_layers=5)
    ids = torch.stack([text(41), text(41, seed=1)])
    expected = Anchored(model, ids, ANCHOR, **SETTINGS[name]).logits
    for cut in (41, 6, 1):
        with method(name)(model) as run, torch.no_grad():
            logits, cache = [], None
            for piece in ids.split(cut, dim=1):
                output = model(piece, past_key_values=cache)
                cache = output.past_key_values
                logits.append(output.logits)
                check_entries(run, ids[:, : sum(x.shape[1] for x in logits)], SETTINGS[name]["per"])
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


def check_entries(run, ids, per: int | None) -> None:
    """Full layers have everything; the others the first token, all anchors, and what follows the last one."""
    for row, tokens in enumerate(ids.tolist()):
        marks = [i for i, token in enumerate(tokens) if token == ANCHOR]
        left = sorted({0, *marks, *range(max([-1, *marks]) + 1, len(tokens))})
        for layer, lengths in enumerate(x.lengths[row].tolist() for x in run.cache.layers):
            expected = [*range(len(tokens))] if per and layer % per == 0 else left
            assert lengths == [len(expected)] * len(lengths)
            kept = run.kept(layer)[row]
            assert all(head[: len(expected)].tolist() == expected for head in kept)
    heads = len(run.cache.layers[0].lengths[0])
    entries = sum(int(x.lengths.sum()) for x in run.cache.layers) // heads
    assert run.stored_bytes() == entries * heads * run.cache.layers[0].token_bytes


def test_without_anchors_and_with_full_layers_alone_it_is_the_stock_model():
    model = tiny.model("llama-gqa", torch.float32)
    rows = [tiny.tokens(21).masked_fill(tiny.tokens(21) == ANCHOR, 1)]
    stock = tiny.generate(model, None, rows)
    assert ANCHOR not in stock.ids
    with method("dense")(model) as run:
        assert torch.equal(tiny.generate(model, run, rows).logits, stock.logits)
        assert run.stored_bytes() == run.full_bytes()


def test_what_is_freed_is_read_by_nobody():
    """Other tokens in a line that has ended change nothing, if its anchor's entries stay what they were."""
    model, ids, rest = tiny.build("llama-gqa", num_hidden_layers=4), text(20, seed=1), tiny.tokens(6, seed=2)[None]
    marks = (ids == ANCHOR).nonzero().flatten().tolist()
    line = [i for i in range(marks[0] + 1, marks[-1]) if i not in marks]
    other, logits, entries = ids.clone(), {}, {}
    other[line] = ids[line] % 3 + 20
    for name in ("as it was", "other", "other, with the anchors of before"):
        with method("no full layer")(model) as run, torch.no_grad():
            model((ids if name == "as it was" else other)[None])
            for layer, tail in enumerate(x.tail for x in run.cache.layers):
                for field, stored in tail.fields.items():
                    if name == "as it was":
                        entries[layer, field] = stored.clone()
                    elif name != "other":
                        stored.copy_(entries[layer, field])
            logits[name] = model(rest, past_key_values=run.cache).logits
    assert torch.equal(logits["other, with the anchors of before"], logits["as it was"])
    assert not torch.allclose(logits["other"], logits["as it was"])


def test_rows_with_lines_of_their_own():
    rows = [text(33), text(20, seed=3), text(9, seed=4)]
    model = tiny.build("llama-gqa", num_hidden_layers=5)
    with method()(model) as run:
        together = tiny.generate(model, run, rows, new=6, extra=2)
    for i, row in enumerate(rows):
        alone = tiny.once(model, method(), [row], new=6)
        assert together.tokens[i].tolist() == alone.tokens[0].tolist()
        assert together.kept[i] == alone.kept[0]
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=0, atol=1e-10)


@given(st.lists(st.integers(0, 9), max_size=40), st.none() | st.integers(1, 6))
def test_planting(tokens, longest):
    ids = [token for token in tokens if token != ANCHOR]
    planted = plant(ids, ANCHOR, {END, 3}, longest)
    assert [token for token in planted if token != ANCHOR] == ids
    runs, line = [[]], []
    for token in planted:
        line = [] if token == ANCHOR else [*line, token]
        runs[-1].append(token)
        if token == ANCHOR:
            runs.append([])
    for run in runs[:-1]:
        assert run[-2] in {END, 3} or len(run) - 1 == longest
        assert not {END, 3} & {*run[:-2]} and (longest is None or len(run) - 1 <= longest)
    assert not runs[-1] or (runs[-1][-1] not in {END, 3} and (longest is None or len(runs[-1]) < longest))


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5), st.integers(1, 29))
def test_masks_equal_loops(marks, padding, cut):
    marked = torch.tensor([[False] * padding + marks])
    positions = torch.tensor([[-1] * padding + [*range(len(marks))]])
    begins, following = lines(marked[:, :cut], positions[:, :cut], torch.zeros(1, dtype=torch.int64))
    if marked.shape[1] > cut:
        more, following = lines(marked[:, cut:], positions[:, cut:], following)
        begins = torch.cat([begins, more], dim=1)
    seen = visible(positions, marked, positions, begins)[0, padding:, padding:]
    for i in range(len(marks)):
        before = [j for j in range(i) if marks[j]]
        for j in range(len(marks)):
            assert seen[i, j] == (j <= i and (marks[j] or j == 0 or j > max([-1, *before])))
    assert following == max([0, *(i + 1 for i in range(len(marks)) if marks[i])])
    assert not visible(positions, marked, positions, begins)[0, :, :padding].any()


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_heads_share_the_line(heads):
    for tokens in (1, 2, 3, 5, 12, 60, 300):
        found = offsets(tokens, heads).tolist()
        assert found == places(tokens, heads)
        assert len(found) == heads and found == sorted(found) and found[0] >= 0 and found[-1] < tokens
    assert offsets(5, 8).tolist() == [2, 3, 3, 4, 4, 4, 4, 4] and offsets(3, 32).tolist().count(2) == 24


def test_marks_alone_move():
    marked = torch.tensor([[False, False, True, True, False, True]])
    positions, begins = torch.arange(6)[None], torch.tensor([[0, 0, 0, 3, 4, 4]])
    assert moves(marked, positions, begins, 2)[0].T.tolist() == [[0, 0], [0, 0], [-1, -1], [0, 0], [0, 0], [-1, -1]]


@pytest.mark.parametrize("longest", [None, 3, 15])
def test_generation_plants_where_lines_end_and_nowhere_else(longest):
    model, arguments = tiny.model("llama-gqa"), {"ends": (END, 11, 30), "forced": True, "longest": longest}
    line = torch.tensor([token for token in range(5, 40) if token not in (ANCHOR, *arguments["ends"])])[:12]
    rows = [text(20), torch.cat([text(11, seed=2), torch.tensor([END])]), line]  # padding is no part of a line
    with method("a quarter", per=2, **arguments)(model) as run:
        made = tiny.generate(model, run, rows, new=40)
    assert {*arguments["ends"]} & {*made.tokens.flatten().tolist()}
    for row, new in zip(rows, made.tokens.tolist()):
        seen = [*row.tolist(), *new]
        for at in range(len(row), len(seen)):
            due = seen[at - 1] in arguments["ends"]
            due |= longest is not None and at >= longest and ANCHOR not in seen[at - longest : at]
            assert (seen[at] == ANCHOR) == due


def test_free_generation_is_the_model_s():
    model, rows = tiny.model("llama-gqa"), [text(20)]
    made = tiny.once(model, method("TAA", ends=(END,)), rows, new=30)
    assert (made.logits.argmax(-1) == made.tokens).all()


def test_settings_of_a_checkpoint():
    model, ids = tiny.build("llama-gqa", num_hidden_layers=5), text(30)[None]
    with pytest.raises(ValueError, match="anchor=None: LlamaForCausalLM was not trained for it: no anchorcoder"):
        kvlib.method("anchorcoder")(model).__enter__()
    model.config.anchorcoder = {"anchor": ANCHOR, "ends": [END], **SETTINGS["whole"], "spread": True, "longest": 9}
    with kvlib.method("anchorcoder")(model) as run, torch.no_grad():
        assert run.prepared.settings.longest == 9 and run.prepared.settings.forced
        logits = model(ids).logits
    torch.testing.assert_close(logits, Anchored(model, ids, ANCHOR, **SETTINGS["whole"]).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": 0}, "per=0: every which layer is full, a number >= 1, or None"),
        ({"source": 1}, "source=1: a layer, if and only if beyond=None is one"),
        ({"source": 2, "beyond": 1}, "beyond=1: a layer >= source=2"),
        ({"ends": (ANCHOR,)}, r"ends=\(7,\): an anchor does not end a line"),
        ({"longest": 0}, "longest=0: tokens >= 1, or None"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("anchorcoder", anchor=ANCHOR, **arguments)


def test_what_cannot_be_planted_or_read():
    with pytest.raises(ValueError, match="ids=7: already planted"):
        plant([1, ANCHOR], ANCHOR, {END})
    model = tiny.model("llama-gqa")
    with pytest.raises(ValueError, match="beyond=2: of 2 layers"):
        kvlib.method("anchorcoder", anchor=ANCHOR, source=0, beyond=2)(model).__enter__()
    with method("a quarter")(model), pytest.raises(ValueError, match="the model was given embeddings"):
        model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
