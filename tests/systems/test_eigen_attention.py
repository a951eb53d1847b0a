"""Eigen Attention against models whose weights are projected, and against bases found by SVD row by row."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import DynamicCache

import kvlib
from kvlib import calibration, checksums
from kvlib.calibration import eigen_directions, key_directions
from kvlib.core.rotary import rotaries
from kvlib.methods.systems.eigen_attention import FILE, directions
from kvlib.methods.systems.lowrank import turned
from kvlib.paths import DATA


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, **arguments):
        return type("Encoded", (), {"input_ids": torch.tensor([[1 + ord(letter) % 63 for letter in text]])})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(key_directions, "TOKENS", 60)


def svd(rows) -> np.ndarray:
    """Right singular vectors of a list of vectors, in columns."""
    return np.linalg.svd(np.stack([row.double().numpy() for row in rows]), full_matrices=False)[2].T


# Of the prompt itself


def test_bases_are_those_of_each_prompt():
    """Token by token, of a prompt, of what is decoded after it and of a second turn."""
    model, rank = tiny.build("llama-gqa", torch.float32), 3
    ids, mask = tiny.pad([tiny.tokens(12), tiny.tokens(9, seed=1)])
    later, seen = tiny.tokens(2, 1, seed=5), []

    class Watched(kvlib.METHODS["eigen_attention"]):
        def observe(self, view):
            fresh = view.new_key.clone(), view.new_value.clone()
            seen.append((fresh, view.positions.clone(), view.key.clone(), view.value.clone()))

    with Watched(rank=rank)(model) as run:
        exact = model(ids, attention_mask=mask).logits
        model(later, past_key_values=run.cache)
        rows = run.cache.layers[0].rows
        assert rows["key_basis"].shape == (2, 1, 8, rank) and rows["value_basis"].shape == (2, 2, 8, rank)
    with kvlib.method("full")(model):
        assert torch.equal(model(ids, attention_mask=mask).logits, exact)
    turn = rotaries(model)[0]
    (keys, values), *_ = seen[0]  # of layer 0, before the prompt's end
    (new_keys, new_values), at, read_keys, read_values = seen[2]
    for row, length in ((0, 12), (1, 9)):
        places = torch.arange(length)[None, None]
        straight = turned(keys[row : row + 1, :, -length:], -places, turn)[0]
        basis = svd([straight[head, i] for head in range(2) for i in range(length)])[:, :rank]
        basis = torch.from_numpy(basis).float()
        for head in range(2):
            own = torch.from_numpy(svd([*values[row, head, -length:]])[:, :rank]).float()
            for slot in range(length + 1):
                assert at[row, head, slot] == slot
                if slot < length:
                    key, value = straight[head, slot], values[row, head, slot - length]
                else:
                    key = turned(new_keys[row : row + 1, head : head + 1], -torch.tensor([[[slot]]]), turn)[0, 0, 0]
                    value = new_values[row, head, 0]
                kept = turned((basis @ (basis.T @ key))[None, None, None], torch.tensor([[[slot]]]), turn)
                torch.testing.assert_close(read_keys[row, head, slot], kept[0, 0, 0], rtol=1e-3, atol=1e-3)
                expected = own @ (own.T @ value)
                torch.testing.assert_close(read_values[row, head, slot], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rank", "directions"), [(None, 4), (3, 3), (0.7, 5), (0.01, 1)])
def test_bytes_are_counted_as_they_are_stored(rank, directions):
    model = tiny.model("llama-gqa", torch.bfloat16)
    with kvlib.method("eigen_attention", rank=rank)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        assert run.stored_bytes() == run.allocated_bytes() == 30 * 2 * 2 * 2 * directions * 2
        assert run.state_bytes() >= 2 * 2 * (1 + 2) * 8 * directions * 4  # bases of two rows in two layers
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == run.read_bytes() == 34 * 2 * 2 * 2 * directions * 2
        assert run.full_bytes() == 34 * 2 * 2 * 2 * 8 * 2
        run.read(input_ids=tiny.tokens(1, 12), prefill_chunk_size=5)
        assert run.stored_bytes() == 12 * 2 * 2 * 2 * directions * 2


def test_all_directions_change_nothing():
    model, ids = tiny.model("qwen3"), [tiny.tokens(60), tiny.tokens(50, seed=1)]  # enough for values of all directions
    exact = tiny.once(model, kvlib.method("full"), ids)
    found = tiny.once(model, kvlib.method("eigen_attention", rank=16), ids)
    torch.testing.assert_close(found.logits, exact.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_directions_in_which_there_is_nothing_are_zero(tokens, dtype):
    """Else rounding would choose for short prompts, and padding could change it."""
    x = torch.randn(2, tokens, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 1
    found, sizes = directions(x)
    some = min(tokens, 8)
    assert torch.equal(found[..., some:], torch.zeros(2, 8, 8 - some, dtype=dtype))
    for each, vectors, lengths in zip(x, found, sizes):
        wanted = np.linalg.svd(each.double().numpy(), full_matrices=False)
        np.testing.assert_allclose(lengths[:some], wanted[1], rtol=1e-4)
        aligned = np.abs((vectors[:, :some].numpy() * wanted[2].T).sum(0))
        np.testing.assert_allclose(aligned, 1, atol=1e-4)


# Of other texts


def projected(model, bases):
    """The model with its projections multiplied by the bases, as the authors' code does."""
    for layer, (keys, values) in zip(model.model.layers, bases):
        attention = layer.self_attn
        heads = attention.k_proj.weight.split(attention.head_dim)
        attention.k_proj.weight.copy_(torch.cat([keys @ keys.T @ head for head in heads]))
        heads = attention.v_proj.weight.split(attention.head_dim)
        attention.v_proj.weight.copy_(torch.cat([basis @ basis.T @ head for basis, head in zip(values, heads)]))
    return model


def calls(model, layer, windows):
    """What a layer is called with, and the keys and values of each token."""
    inputs, keys, values = [], [], []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, more: inputs.append((args[0], more)), with_kwargs=True),
        layer.self_attn.k_proj.register_forward_hook(lambda _, args, out: keys.extend(out[0])),
        layer.self_attn.v_proj.register_forward_hook(lambda _, args, out: values.extend(out[0])),
    ]
    for ids in windows:
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs, keys, values


def by_hand(model, windows, error):
    """Ranks of each layer: the authors' loop, on models with projected weights."""
    caught, ranks = [], []
    for i, layer in enumerate(model.model.layers):
        inputs, keys, values = calls(model, layer, windows)
        rows = [key for token in keys for key in token.split(8)]
        spectra = [np.linalg.svd(torch.stack(rows).double().numpy(), full_matrices=False)]
        for head in range(2):
            own = [token.split(8)[head] for token in values]
            spectra.append(np.linalg.svd(torch.stack(own).double().numpy(), full_matrices=False))
        vectors = [torch.from_numpy(spectrum[2].T).float() for spectrum in spectra]
        exact = torch.cat([layer(x, **more) for x, more in inputs])

        def at(threshold, spectra=spectra):
            counts = [int((np.cumsum(s[1] / s[1].sum()) < threshold - 1e-9).sum()) for s in spectra]
            return counts[0], max(counts[1:])

        threshold, missed, rank = 1.0, 0.0, (8, 8)
        while missed < error and min(rank) > 0.45 * 8:
            rank = at(threshold)
            bases = [None] * i + [(vectors[0][:, : rank[0]], [v[:, : rank[1]] for v in vectors[1:]])]
            other = tiny.build("llama-gqa", torch.float32)
            projected_layer = other.model.layers[i]
            other.model.layers = torch.nn.ModuleList([projected_layer])
            projected(other, bases[i:])
            missed = float(
                (torch.cat([projected_layer(x, **more) for x, more in inputs]) - exact).norm() / exact.norm()
            )
            threshold -= 0.02
        threshold += 0.04
        rank = at(threshold) if threshold <= 1 else (8, 8)
        ranks.append(rank)
        caught.append((vectors[0][:, : rank[0]], [v[:, : rank[1]] for v in vectors[1:]]))
    return ranks, caught


@pytest.mark.parametrize("error", [0.0, 0.1, 0.4, 0.9])
@torch.no_grad()
def test_ranks_are_those_of_the_authors_loop(short, error):
    model = tiny.build("llama-gqa", torch.float32)
    windows = key_directions.windows(Letters())[1:3]
    ranks, bases = by_hand(model, windows, error)
    found = eigen_directions.bases(model, windows, error)
    assert [(keys.shape[-1], values.shape[-1]) for keys, values in found] == ranks
    assert (ranks == [(8, 8)] * 2) == (error < 0.2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for (keys, values), (own, of_heads) in zip(found, bases):
        for basis, wanted in zip((keys, *values), (own, *of_heads)):
            torch.testing.assert_close(basis @ basis.T, wanted @ wanted.T, rtol=0, atol=1e-3)


def test_the_search_steps_back_from_the_first_that_does_not_fit():
    sizes, tried = torch.ones(10), []

    def fits(keys, values):
        tried.append((keys, values))
        return keys > 6

    assert eigen_directions.ranks(sizes, torch.stack([sizes, sizes]), fits) == (7, 7)
    assert tried == [(9, 9), (8, 8), (7, 7), (6, 6)]
    assert eigen_directions.ranks(sizes, sizes[None], lambda *ranks: False) == (10, 10)
    assert eigen_directions.ranks(sizes, sizes[None], lambda *ranks: True) == (5, 5)  # above 45 %
    # the head that needs most counts
    assert eigen_directions.ranks(sizes, torch.stack([sizes, 1 / 3 ** torch.arange(10)]), lambda *r: True) == (5, 5)
    uneven = torch.tensor([5, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert eigen_directions.ranks(uneven, sizes[None], lambda *ranks: True) == (5, 9)
    steep = torch.tensor([975, 5, 5, 5, 5, 5, 0, 0, 0, 0])  # the first step leaves out what is 0, the second too much
    assert eigen_directions.ranks(steep, sizes[None], lambda *ranks: True) == (5, 9)


def test_a_calibration_gives_the_answers_of_a_projected_model(short, tmp_path):
    model = tiny.build("llama-gqa", torch.float32)
    file = eigen_directions.write(tmp_path / "cal", model, "tiny", Letters(), 0.4)
    assert checksums.problems(file.parent) == []
    with safe_open(file, "pt") as stored:
        pairs = [tuple(stored.get_tensor(f"{x}.{i}").float() for x in ("keys", "values")) for i in range(2)]
        said = stored.metadata()
    assert (
        said["model"] == "tiny" and said["tokens"] == "240" and said["error"] == "0.4" and "60 tokens" in said["texts"]
    )
    orthonormal = [tuple(torch.linalg.qr(x).Q for x in pair) for pair in pairs]
    other, cache = projected(tiny.build("llama-gqa", torch.float32), orthonormal), DynamicCache()
    passes = [tiny.tokens(1, 20), tiny.tokens(1, 1, seed=1), tiny.tokens(1, 5, seed=2)]
    for rank in (None, 2):
        with kvlib.method("eigen_attention", calibration=file.parent, rank=rank)(model) as run:
            found = [model(ids, past_key_values=run.cache if i else None).logits for i, ids in enumerate(passes)]
            widths = [[layer.tail.fields[x].shape[-1] for x in ("key", "value")] for layer in run.cache.layers]
            assert "key_basis" not in run.cache.layers[0].rows
            with pytest.raises(ValueError, match="changes the prefill"):
                run.fork(kvlib.snapshot(model, passes[0]))
        assert widths == [[2, 2]] * 2 if rank else widths == [[x.shape[-1] for x in pair] for pair in pairs]
        if rank is None:
            for ids, logits in zip(passes, found):
                wanted = other(ids, past_key_values=cache).logits
                torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    with (
        pytest.raises(ValueError, match="rank=8: 8 directions, but there are [4-7]"),
        kvlib.method("eigen_attention", calibration=str(file.parent), rank=8)(model),
    ):
        pass
    trained = tiny.build("llama-gqa", torch.float32)
    trained.model.layers[1].self_attn.k_proj.weight.mul_(1.1)
    with (
        pytest.raises(ValueError, match="is the calibration of another model"),
        kvlib.method("eigen_attention", calibration=file.parent)(trained),
    ):
        pass


def test_a_calibration_of_normalised_keys(short, tmp_path):
    """Qwen3: keys are those after the norm; with all directions nothing is lost."""
    model = tiny.build("qwen3", torch.float32)
    file = eigen_directions.write(tmp_path, model, "tiny", Letters(), 0.0)
    ids = tiny.tokens(1, 12)
    with kvlib.method("eigen_attention", calibration=file.parent)(model) as run:
        found = model(ids).logits
        assert run.stored_bytes() == run.full_bytes()
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-3, atol=1e-3)
    caught = []
    norm = model.model.layers[0].self_attn.k_norm
    hook = norm.register_forward_hook(lambda module, args, out: caught.append(out[0].flatten(0, 1)))
    for window in key_directions.windows(Letters()):
        model(window)
    hook.remove()
    wanted = svd(torch.cat(caught))
    with safe_open(file, "pt") as stored:
        first = stored.get_tensor("keys.0")[:, 0].float().numpy()
    assert abs(first @ wanted[:, 0]) > 0.999


@pytest.mark.parametrize("where", ["nowhere", "smollm2"])
def test_a_calibration_that_is_not_there(where):
    message = rf"no {FILE} for '{where}': a folder that has it, or one of minilm"
    with pytest.raises(ValueError, match=message), kvlib.method("eigen_attention", calibration=where)(tiny.model()):
        pass


def test_the_shipped_calibration():
    model, tokenizer = kvlib.load("minilm")
    file = calibration.find("minilm", FILE)
    assert DATA in file.parents and file.stat().st_size < 280_000
    with safe_open(file, "pt") as stored:
        shapes = [[stored.get_tensor(f"{x}.{i}").shape for x in ("keys", "values")] for i in range(16)]
        assert json.loads(stored.metadata()["fingerprint"]) == calibration.fingerprint(model)
    assert all(keys == (32, keys[-1]) and values == (8, 32, values[-1]) for keys, values in shapes)
    assert all(min(keys[-1], values[-1]) > 0.45 * 32 for keys, values in shapes)
    numbers = sum(keys[-1] + values[-1] for keys, values in shapes)
    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
    with kvlib.method("eigen_attention", calibration="minilm")(model) as run:
        logits = model(ids).logits
        assert run.stored_bytes() == ids.shape[1] * 8 * numbers * 4 < run.full_bytes()
    exact = model(ids).logits
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank=0: a share of head_dim in \(0, 1\], directions >= 1, or None"),
        ({"rank": 1.5}, r"rank=1\.5: "),
        ({"rank": True}, "rank=True: "),
        ({"calibration": 3}, "calibration=3: the name of a model, a folder, or None"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("eigen_attention", **arguments)


def test_more_directions_than_channels():
    model = tiny.model("llama-gqa")
    with (
        pytest.raises(ValueError, match="rank=9: 9 directions, but there are 8"),
        kvlib.method("eigen_attention", rank=9)(model),
    ):
        model(tiny.tokens(1, 9))
