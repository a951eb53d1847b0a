"""UNComp's groups of heads and layers, and the file that they are read from."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvlib
from kvlib import calibration, checksums, paths
from kvlib.calibration import head_groups as measuring
from kvlib.methods import head_groups, layer_groups
from kvlib.methods.entropy import entropy, spectrum
from kvlib.methods.head_groups import STATISTICS, by_rank, clean, group_sizes, per_kv_head, release
from kvlib.methods.layer_groups import absolute_lengths, check_lengths, group_of, group_starts, relative_lengths

SHIPPED = {"minilm": (16, 8, 8, 32), "smollm2": (30, 9, 3, 64)}  # layers, query heads, KV heads, head_dim


# Layers


def test_scores_of_layers():
    """Σ exp(H / ln d): e for each head that fills all directions, 1 for one on a line."""
    flat, line = spectrum(torch.cat([torch.eye(8), -torch.eye(8)])), spectrum(torch.arange(16.0)[:, None].expand(-1, 8))
    spectra = torch.stack(
        [torch.stack(heads) for heads in ((flat, flat, flat), (flat, line, line), (line, line, line))]
    )
    found = layer_groups.layer_scores(entropy(spectra), 8)
    assert found.tolist() == pytest.approx([3 * math.e, math.e + 2, 3])
    assert layer_groups.layer_scores(entropy(spectra)[None], 8).shape == (1, 3)


def test_the_threshold_follows_the_number_of_heads():
    assert [layer_groups.threshold(heads) for heads in (32, 8, 9)] == [1, 0.25, 0.28125]


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=12), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_group_starts_where_the_score_falls_by_more_than_the_threshold(scores, threshold):
    starts = group_starts(scores, threshold)
    groups = group_of(starts, len(scores))
    for layer in range(1, len(scores)):
        assert groups[layer] - groups[layer - 1] == (scores[layer - 1] - scores[layer] > threshold)
    assert groups[0] == 0 == starts[0] and [groups.index(group) for group in sorted(set(groups))] == starts


def test_lengths_of_the_release():
    assert absolute_lengths(5, 4096, 1536) == [4096, 3456, 2816, 2176, 1536]
    assert absolute_lengths(5, 8192, 1536) == [8192, 6528, 4864, 3200, 1536]
    assert absolute_lengths(8, 4096, 1536) == [4091, 3726, 3361, 2996, 2631, 2266, 1901, 1536]
    assert absolute_lengths(1, 4096, 1536) == [4096]


@given(groups=st.integers(1, 40), smallest=st.floats(1e-3, 1))
@settings(max_examples=40, deadline=None)
def test_shares_fall_linearly_from_everything_to_the_smallest(groups, smallest):
    shares = relative_lengths(groups, smallest)
    assert len(shares) == groups and shares[0] == 1 and shares[-1] == (smallest if groups > 1 else 1)
    steps = [earlier - later for earlier, later in pairwise(shares)]
    assert steps == pytest.approx([(1 - smallest) / max(1, groups - 1)] * (groups - 1), abs=1e-9)
    check_lengths(shares, groups)


def test_bad_layer_groups():
    for lengths in ([4, 5], [0.5, 0.6], [3, 3, 4]):
        with pytest.raises(ValueError, match="no layer group can have more tokens than the one before it"):
            check_lengths(lengths, len(lengths))
    for lengths in ([4, 0], [-1], [0.5, 0.0], [1.5], [1.0, 5], ["4"], [True], [math.nan]):
        with pytest.raises(ValueError, match="numbers of tokens >= 1, or shares"):
            check_lengths(lengths, len(lengths))
    with pytest.raises(ValueError, match=r"lengths=\[4\]: one for each of 2 layer groups"):
        check_lengths([4], 2)
    check_lengths([4, 4, 1], 3)
    for call in (lambda: absolute_lengths(3, 5, 6), lambda: relative_lengths(3, 0.0), lambda: relative_lengths(3, 1.5),
                 lambda: absolute_lengths(3, 5, 0), lambda: absolute_lengths(0, 5, 4), lambda: relative_lengths(0, 0.5),
                 lambda: group_starts([], 1.0), lambda: group_starts([1.0], -1.0),
                 lambda: group_of([1, 2], 4), lambda: group_of([0, 4], 4), lambda: group_of([0, 2, 1], 4),
                 lambda: group_of([], 4)):  # fmt: skip
        with pytest.raises(ValueError):
            call()


# Heads


def test_sizes_of_groups_are_those_of_the_release():
    released = {1: [32], 2: [16, 16], 3: [11, 10, 11], 4: [8] * 4, 5: [7, 6, 6, 6, 7], 8: [4] * 8, 32: [1] * 32}
    assert {groups: group_sizes(32, groups) for groups in released} == released
    assert group_sizes(40, 8) == [5] * 8 and group_sizes(90, 4) == [23, 22, 22, 23]
    for groups in (0, 4, 2.0):
        with pytest.raises(ValueError, match=f"groups={groups}: a number of groups from 1 to 3 heads"):
            group_sizes(3, groups)


@given(heads=st.integers(1, 40), groups=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_sizes_differ_by_one_at_most(heads, groups):
    assume(groups <= heads)
    sizes = group_sizes(heads, groups)
    assert len(sizes) == groups and sum(sizes) == heads and max(sizes) - min(sizes) <= 1


def oracle_labels(scores, groups):
    """The group of each head of a list."""
    order = sorted(range(len(scores)), key=lambda head: scores[head])
    labels = [label for label, size in enumerate(group_sizes(len(scores), groups)) for _ in range(size)]
    return [labels[order.index(head)] for head in range(len(scores))]


def oracle_clean(windows, groups):
    """Mean rank over windows, by sums."""
    total = [0] * len(windows[0])
    for scores in windows:
        order = sorted(range(len(scores)), key=lambda head: scores[head])
        total = [value + order.index(head) for head, value in enumerate(total)]
    return oracle_labels(total, groups)


def oracle_release(windows, groups):
    """Greedily by counts of labels."""
    counts = [Counter(labels) for labels in zip(*(oracle_labels(scores, groups) for scores in windows))]
    found = {}
    for group, size in enumerate(group_sizes(len(counts), groups)):
        left = [head for head in range(len(counts)) if head not in found]
        found |= dict.fromkeys(sorted(left, key=lambda head: -counts[head][group])[:size], group)
    return [found[head] for head in range(len(counts))]


@given(windows=st.integers(1, 6), heads=st.integers(1, 12), groups=st.integers(1, 12), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_groups_of_heads(windows, heads, groups, seed):
    """Of integers, so that there are ties: of equal heads the first one counts as lower, and is taken first."""
    assume(groups <= heads)
    generator = torch.Generator().manual_seed(seed)
    entropies = torch.randint(0, 6, (windows, 2, heads), generator=generator).double()
    for rule, oracle in ((clean, oracle_clean), (release, oracle_release)):
        found = rule(entropies, groups)
        assert found.tolist() == [oracle(entropies[:, layer].tolist(), groups) for layer in range(2)]
        assert [Counter(layer)[group] for layer in found.tolist() for group in range(groups)] == group_sizes(
            heads, groups
        ) * 2
    assert by_rank(entropies[0], groups).tolist() == [oracle_labels(x, groups) for x in entropies[0].tolist()]
    assert torch.equal(clean(entropies[:1], groups), by_rank(entropies[0], groups))


def test_the_highest_entropy_is_in_the_last_group():
    assert by_rank(torch.tensor([0.1, 3.0, 2.0, 0.5]), 4).tolist() == [0, 3, 2, 1]


def test_the_rules_differ():
    """The release can leave a head to a group that no window has put it into: others were taken before it."""
    windows = torch.tensor([[0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0, 1], [1, 2, 0]]).double()
    assert clean(windows, 3).tolist() == [1, 0, 2]
    assert release(windows, 3).tolist() == [0, 1, 2]


def test_planted_heads_are_found_by_their_queries():
    """Heads of rank 2, 8, 1 and 4, in a padded batch: they are in the order of their ranks."""
    generator, width, lengths = torch.Generator().manual_seed(0), 80, (80, 50)
    query = torch.full((2, 4, width, 32), torch.nan, dtype=torch.float64)
    for row, length in enumerate(lengths):
        for head, rank in enumerate((2, 8, 1, 4)):
            factors = (torch.randn(*shape, generator=generator).double() for shape in ((length, rank), (rank, 32)))
            query[row, head, width - length :] = torch.matmul(*factors)
    real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    found = STATISTICS["truncated"](query, real[:, None])
    assert by_rank(found, 4).tolist() == [[1, 3, 0, 2]] * 2
    torch.testing.assert_close(STATISTICS["truncated"](query[:1], None), found[:1])
    by_hand = entropy(spectrum(query[1, :, 30:]), 8)
    torch.testing.assert_close(found[1], by_hand)  # k = 32 / 4


def test_kv_heads_have_the_mean_of_their_query_heads():
    entropies = torch.tensor([[1.0, 2.0, 6.0, 0.0, 1.0, 5.0]])
    assert per_kv_head(entropies, 2).tolist() == [[3, 2]]
    assert per_kv_head(entropies, 6).tolist() == entropies.tolist()


# The file


@pytest.fixture
def minilm():
    return kvlib.load("minilm")


def oracle_entropies(model, ids):
    """Truncated entropies and scores of layers, from queries that a hook sees and the model's own rotation."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    caught, hooks = {}, []
    for layer, block in enumerate(model.model.layers):
        keep = lambda module, given, out, layer=layer: caught.__setitem__(layer, out)  # noqa: E731
        hooks.append(block.self_attn.q_proj.register_forward_hook(keep))
    with torch.no_grad():
        model(ids)
        cos, sin = model.model.rotary_emb(ids.float(), torch.arange(ids.shape[1])[None])
    for hook in hooks:
        hook.remove()
    d = model.config.head_dim
    entropies, scores = [], []
    for _, query in sorted(caught.items()):
        query = query.unflatten(-1, (-1, d)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        centred = (query[0] - query[0].mean(1, keepdim=True)).double()
        values = torch.linalg.svdvals(centred / centred.norm(dim=-1, keepdim=True)) ** 2 / ids.shape[1]
        terms = -values * values.log()
        entropies.append(terms[:, : d // 4].sum(-1))
        scores.append(float((terms.sum(-1) / math.log(d)).exp().sum()))
    return entropies, scores


def test_from_the_command_line(minilm, tmp_path, capsys):
    model, tokenizer = minilm
    measuring.main(["minilm", "--folder", str(tmp_path / "new"), "--windows", "2", "--length", "96"])
    file = tmp_path / "new" / "uncomp.json"
    assert str(file) in capsys.readouterr().out
    assert checksums.problems(file.parent) == [] and checksums.unlisted(file.parent, "*.json") == []
    found = head_groups.load(file.parent, model)
    assert (found.kv_heads, found.head_dim, found.k) == (8, 32, 8) and [*found.entropy] == ["prose", "code"]
    for corpus, (_, text) in measuring.CORPORA.items():
        whole = "".join(text().pieces)
        for window, start in enumerate((0, len(whole) // 2)):
            ids = tokenizer(whole[start : start + 2000], return_tensors="pt").input_ids[:, :96]
            entropies, scores = oracle_entropies(model, ids)
            torch.testing.assert_close(found.entropy[corpus][window], torch.stack(entropies), rtol=0, atol=2e-4)
            assert found.layer_scores[corpus][window].tolist() == pytest.approx(scores, abs=1e-3)
    with pytest.raises(ValueError, match="the text is too short: window 0 has "):
        measuring.windows("few words", tokenizer, 2, 96)
    with pytest.raises(SystemExit):
        measuring.main(["somebody/model"])
    assert "--folder: where the calibration" in capsys.readouterr().err


def test_groups_from_a_file(minilm, tmp_path):
    """Query heads or KV heads, within layers or over all, windows of all texts or of one."""
    _, tokenizer = minilm
    model = tiny.build("llama-gqa", torch.float32, vocab_size=len(tokenizer))
    found = head_groups.read(measuring.store(tmp_path, "tiny", model, tokenizer, count=3, length=40, k=3))
    assert found.k == 3 and found.kv_heads == 2 and found.head_dim == 8
    prose, code = found.entropy.values()
    assert prose.shape == (3, 2, 4) and not torch.equal(prose, code)
    both = torch.cat([prose, code])
    assert torch.equal(found.groups(4, stored=False), clean(both, 4))
    assert torch.equal(found.groups(2, "release", corpus="code"), release(per_kv_head(code, 2), 2))
    over_layers = found.groups(4, over_layers=True)
    assert over_layers.shape == (2, 2) and sorted(over_layers.flatten().tolist()) == [0, 1, 2, 3]
    assert over_layers.flatten().tolist() == oracle_clean(per_kv_head(both, 2).flatten(1).tolist(), 4)
    assert found.groups(1).tolist() == [[0, 0]] * 2
    for arguments, message in (((3,), "groups=3: a number of groups from 1 to 2 heads"), ((2, "mean"), "'clean' or")):
        with pytest.raises(ValueError, match=message):
            found.groups(*arguments)
    with pytest.raises(ValueError, match="corpus='poems': 'prose' or 'code'"):
        found.groups(2, corpus="poems")


def test_a_file_of_another_model(minilm, tmp_path):
    _, tokenizer = minilm
    model = tiny.build("llama-gqa", torch.float32, vocab_size=len(tokenizer))
    file = measuring.store(tmp_path, "tiny", model, tokenizer, count=1, length=8)
    head_groups.load(tmp_path, tiny.build("llama-gqa", torch.bfloat16, vocab_size=len(tokenizer)))
    for other in (tiny.model("llama-mha"), tiny.model("qwen3")):
        with pytest.raises(ValueError, match=f"{file} is the calibration of another model"):
            head_groups.load(tmp_path, other)
        with pytest.raises(ValueError, match=f"{file} is the calibration of another model"):
            measuring.store(tmp_path, "other", other, tokenizer, count=1, length=8)
    with pytest.raises(ValueError, match=r"no uncomp.json for 'nobody': .*one of minilm, smollm2"):
        head_groups.load("nobody", model)


# What is committed


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_calibrations(name):
    layers, query_heads, kv_heads, head_dim = SHIPPED[name]
    file = calibration.find(name, "uncomp.json")
    assert file.stat().st_size < 100_000 and paths.DATA in file.parents
    recorded = json.loads(file.read_text())
    assert (recorded["model"], recorded["length"], recorded["queries"]) == (name, 2048, "after rotary embedding")
    found = head_groups.read(file)
    assert (found.kv_heads, found.head_dim, found.k) == (kv_heads, head_dim, head_dim // 4)
    for entropies, scores in zip(found.entropy.values(), found.layer_scores.values(), strict=True):
        assert entropies.shape == (16, layers, query_heads) and scores.shape == (16, layers)
        assert (entropies > 0).all() and (entropies < math.log(head_dim)).all()
        assert (scores > query_heads).all() and (scores < query_heads * math.e).all()
        same = (clean(entropies[:8], 2) == clean(entropies[8:], 2)).double().mean()
        assert same > 0.9  # halves of a text agree
    for over_layers, counts in ((False, (2, 4, 8) if name == "minilm" else (1, 3)), (True, range(2, 9))):
        for count in counts:
            for rule in head_groups.RULES:
                groups = found.groups(count, rule, over_layers=over_layers)
                per_layer = [groups.flatten().tolist()] if over_layers else groups.tolist()
                for heads in per_layer:
                    assert [heads.count(group) for group in range(count)] == group_sizes(len(heads), count)
