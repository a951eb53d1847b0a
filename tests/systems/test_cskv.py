"""CSKV against x A B of the hidden states themselves, its windows token by token, its fit against the best one."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

import kvlib
from kvlib import calibration, checksums
from kvlib.calibration import cskv_projections, key_directions
from kvlib.core.rotary import rotaries
from kvlib.methods.systems.cskv import CSKV, FILE
from kvlib.methods.systems.lowrank import turned
from kvlib.paths import DATA


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text, **arguments):
        return type("Encoded", (), {"input_ids": torch.tensor([[1 + ord(letter) % 63 for letter in text]])})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(key_directions, "TOKENS", 60)


def authors(weight, sizes, rank):
    """A and B as the authors begin with them: W scaled by activations, the root of singular values on both sides."""
    scale = np.sqrt(sizes + 1e-6)
    u, s, v = np.linalg.svd(np.diag(scale) @ weight.double().numpy().T, full_matrices=False)
    root = np.diag(np.sqrt(s[:rank]))
    return np.diag(1 / scale) @ u[:, :rank] @ root, root @ v[:rank]


def caught(model, passes, method, cls=CSKV):
    """Inputs of the projections of layer 0 `(batch, tokens, hidden)`, and what is read in it in each pass."""
    inputs, seen = [], []

    class Watched(cls):
        def observe(self, view):
            if view.layer_idx == 0:
                at = [part.position_rectangle().clone() for part in view.layer.parts]
                seen.append((at, view.key.clone(), view.value.clone(), view.new_key.clone(), view.new_value.clone()))

    hook = model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    settings = {x: getattr(method, x) for x in ("keys", "values", "recent", "calibration")}
    with Watched(**settings)(model) as run:
        inputs.clear()  # what the rotation was read from
        for i, (ids, mask) in enumerate(passes):
            more = {"past_key_values": run.cache} if i else {"attention_mask": mask}
            model(ids, **more)
        layer = run.cache.layers[0]
        parts = [layer.position_rectangle().tolist(), layer.body and layer.body.position_rectangle().tolist()]
    hook.remove()
    return torch.cat(inputs, dim=1), seen, parts


@pytest.mark.parametrize(("name", "scaled"), [("llama-gqa", False), ("llama-mha", True), ("qwen2", True)])
def test_old_tokens_are_read_as_x_a_b(name, scaled, tmp_path, short):
    """Row by row and token by token: a padded batch, after its prompt and one more token."""
    model = tiny.build(name, torch.float32)
    attention, heads = model.model.layers[0].self_attn, model.config.num_key_value_heads
    method = CSKV(keys=0.5, values=0.7, recent=4)
    if scaled:
        cskv_projections.write(tmp_path, model, "tiny", Letters(), method, 0)
        method = CSKV(keys=0.5, values=0.7, recent=4, calibration=tmp_path)
    ids, mask = tiny.pad([tiny.tokens(14), tiny.tokens(7, seed=1)])
    x, seen, _ = caught(model, [(ids, mask), (tiny.tokens(2, 1, seed=2), None)], method)
    sizes = np.ones(32)
    if scaled:
        windows, found = key_directions.windows(Letters()), []
        hook = attention.k_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        for window in windows:
            model(window)
        hook.remove()
        sizes = torch.cat(found).abs().mean(0).double().numpy()
    turn = rotaries(model)[0]
    (places, keys, values, *_), (*_, exact_keys, exact_values) = seen[1], seen[0]
    assert len(places) == 2
    for linear, share, read, exact in (
        (attention.k_proj, 0.5, keys, exact_keys),
        (attention.v_proj, 0.7, values, exact_values),
    ):
        down, up = authors(linear.weight, sizes, heads * int(share * 8))
        for row, length, whole in ((0, 14, 12), (1, 7, 4)):
            for slot in range(whole):
                hidden = x[row, 14 - length + slot].double().numpy()
                kept = torch.from_numpy(hidden @ down @ up).float().view(heads, 8)
                if linear.bias is not None:
                    kept = kept + linear.bias.view(heads, 8)
                for head in range(heads):
                    one = kept[head][None, None, None]
                    if linear is attention.k_proj:
                        one = turned(one, torch.tensor([[[slot]]]), turn)
                    assert places[0][row, head, slot] == slot
                    torch.testing.assert_close(read[row, head, slot], one[0, 0, 0], rtol=1e-3, atol=1e-3)
                    assert (read[row, head, slot] - exact[row, head, 14 - length + slot]).abs().max() > 1e-3
            for head in range(heads):
                newest = places[1][row, head].tolist()
                assert [at for at in newest if at >= 0] == list(range(whole, length + 1))
                for slot, at in enumerate(newest):
                    if 0 <= at < length:
                        found = read[row, head, places[0].shape[-1] + slot]
                        assert torch.equal(found, exact[row, head, 14 - length + at])


@pytest.mark.parametrize("recent", [1, 3, 5])
def test_windows_are_cut_from_the_start_of_the_text(recent):
    """After every pass: whole windows are in the body, in all rows, wherever turns and chunks end."""
    model, total = tiny.model("llama-gqa"), [0, 0]
    ids, mask = tiny.pad([tiny.tokens(11), tiny.tokens(8, seed=1)])
    with kvlib.method("cskv", recent=recent)(model) as run:
        for i, new in enumerate((11, 1, 1, 1, 1, 1, 7, 1, 1)):
            if i:
                model(tiny.tokens(2, new, seed=i), past_key_values=run.cache)
            else:
                model(ids, attention_mask=mask)
            total = [total[0] + new, total[1] + (new if i else 8)]
            for layer in run.cache.layers:
                for row, count in enumerate(total):
                    whole = count // recent * recent
                    for part, places in ((layer.body, range(whole)), (layer.tail, range(whole, count))):
                        found = part.position_rectangle()[row]
                        assert [[at for at in head if at >= 0] for head in found.tolist()] == [list(places)] * 2
        run.read(input_ids=tiny.tokens(1, 11), prefill_chunk_size=4)
        assert int(run.cache.layers[0].body.lengths[0, 0]) == 11 // recent * recent


def test_bytes_are_counted_as_they_are_stored():
    model = tiny.model("llama-gqa", torch.bfloat16)
    with kvlib.method("cskv", keys=0.25, values=0.7, recent=4)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(21), tiny.tokens(9, seed=1)])).logits[:, -1]
        coded, raw = 2 * 2 * (2 + 5) * 2, 2 * 2 * 2 * 8 * 2  # a token's bytes in all layers and heads
        assert run.stored_bytes() == run.allocated_bytes() == (20 + 8) * coded + (1 + 1) * raw
        tiny.decode(model, run, logits, new=3)
        assert run.stored_bytes() == run.read_bytes() == (20 + 8) * coded + (3 + 3) * raw
        tiny.decode(model, run, logits, new=2)
        assert run.stored_bytes() == (24 + 12) * coded
        assert run.full_bytes() == 36 * raw


def test_all_channels_change_nothing():
    model, ids = tiny.model("qwen2"), [tiny.tokens(20), tiny.tokens(9, seed=1)]
    exact = tiny.once(model, kvlib.method("full"), ids, new=6)
    found = tiny.once(model, kvlib.method("cskv", keys=1.0, values=1.0, recent=4), ids, new=6)
    torch.testing.assert_close(found.logits, exact.logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.logits[:, 0], exact.logits[:, 0])  # the prompt is read exactly


# Calibration


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "qwen3"])
def test_what_is_observed(name, short):
    model = tiny.build(name, torch.float32)
    windows, inputs = key_directions.windows(Letters())[1:3], []
    module = model.model.layers[1].self_attn
    hook = module.k_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for window in windows:
        model(window)
    hook.remove()
    x = torch.cat(inputs)
    sizes, squares = cskv_projections.observed(model, windows)
    torch.testing.assert_close(sizes[1], x.abs().mean(0), rtol=1e-4, atol=1e-5)
    keys = (x @ module.k_proj.weight.T).double()
    if name == "qwen3":
        keys = module.k_norm(keys.float().view(len(x), -1, 16)).flatten(1).double()
    values = (x @ module.v_proj.weight.T).double()
    for found, rows in ((squares["keys"][1], keys), (squares["values"][1], values)):
        torch.testing.assert_close(found, rows.T @ rows, rtol=1e-3, atol=1e-2)
        down = torch.randn(rows.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wanted = (rows - rows @ down @ down.T).square().sum() / rows.square().sum()
        assert float(cskv_projections.missed(found, down, down.T)) == pytest.approx(float(wanted), rel=1e-3)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())


def test_a_fit_comes_near_the_best_one():
    """That of the largest principal directions, which no map of this rank can beat."""
    random = torch.Generator().manual_seed(0)
    weight, sizes = torch.randn(16, 32, generator=random), torch.rand(32, generator=random)
    x = torch.randn(500, 32, generator=random) * torch.logspace(0, -2, 32)
    keys = (x @ weight.T).double()
    squares = keys.T @ keys
    first = kvlib.methods.systems.cskv.first_maps(weight, sizes, 6)
    last = cskv_projections.fitted(squares, *first, 1000)
    errors = [float(cskv_projections.missed(squares.float(), *maps)) for maps in (first, last)]
    best = 1 - float(np.sort(np.linalg.eigvalsh(squares))[-6:].sum() / squares.trace())
    assert best * 0.999 <= errors[1] <= best * 1.1 < errors[0]
    again = cskv_projections.fitted(squares, *first, 10)
    assert errors[1] < float(cskv_projections.missed(squares.float(), *again)) < errors[0]


def test_a_calibration_is_read_and_is_of_one_model(short, tmp_path):
    model = tiny.build("llama-gqa", torch.float32)
    method = CSKV(keys=0.5, values=0.25)
    fitted, plain = tmp_path / "fitted", tmp_path / "plain"
    for folder, steps in ((fitted, 20), (plain, 0)):
        file = cskv_projections.write(folder, model, "tiny", Letters(), method, steps)
        assert checksums.problems(folder) == []
    with safe_open(fitted / FILE, "pt") as stored:
        tensors, said = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    assert shapes == {"activations": (2, 32), "keys.down": (2, 16, 8), "keys.up": (2, 8, 16),
                      "values.down": (2, 16, 4), "values.up": (2, 4, 16)}  # fmt: skip
    _, squares = cskv_projections.observed(model, key_directions.windows(Letters()))
    told = iter(json.loads(said["missed"]))
    for i in range(2):
        for name in ("keys", "values"):
            first, last = next(told)
            maps = (tensors[f"{name}.{x}"][i].float() for x in ("down", "up"))
            assert float(cskv_projections.missed(squares[name][i].float(), *maps)) == pytest.approx(last, rel=0.02)
            assert last < 0.98 * first
    assert said["tokens"] == "240"
    assert [*safe_open(file, "pt").keys()] == ["activations"] and said["steps"] == "20"
    prepared = kvlib.method("cskv", keys=0.5, values=0.25, calibration=fitted).prepare(model)
    for i, (maps, _) in enumerate(prepared):
        for name, (down, up, _) in zip(("keys", "values"), maps):
            assert torch.equal(down, tensors[f"{name}.down"][i].float())
            assert torch.equal(up, tensors[f"{name}.up"][i].float())
    with pytest.raises(ValueError, match="values=0.5: the calibration is fitted to 0.25"):
        kvlib.method("cskv", values=0.5, calibration=str(fitted)).prepare(model)
    kvlib.method("cskv", values=0.5, calibration=plain).prepare(model)  # without a fit any share will do
    trained = tiny.build("llama-gqa", torch.float32)
    trained.model.layers[1].self_attn.k_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="is the calibration of another model"):
        kvlib.method("cskv", values=0.25, calibration=fitted).prepare(trained)


@pytest.mark.parametrize("where", ["nowhere", "minilm-T-4"])
def test_a_calibration_that_is_not_there(where):
    with pytest.raises(ValueError, match=rf"no {FILE} for '{where}': a folder that has it, or one of minilm"):
        kvlib.method("cskv", calibration=where).prepare(tiny.model())


def test_the_shipped_calibration():
    model, tokenizer = kvlib.load("minilm")
    file = calibration.find("minilm", FILE)
    assert DATA in file.parents and file.stat().st_size < 20_000
    with safe_open(file, "pt") as stored:
        assert stored.get_tensor("activations").shape == (16, 256) and stored.metadata()["steps"] == "0"
        assert json.loads(stored.metadata()["fingerprint"]) == calibration.fingerprint(model)
    ids = tokenizer("def add(a, b):\n    return a + b\n\ndef mul(a, b):\n    return", return_tensors="pt").input_ids
    with kvlib.method("cskv", recent=4, calibration="minilm")(model) as run:
        model(ids)
        logits = model(ids[:, -1:], past_key_values=run.cache).logits
        tokens = ids.shape[1] + 1
        entry = 16 * 8 * 32 * 4  # keys or values of a token in all layers and heads
        assert run.stored_bytes() == (tokens // 4 * 4) * entry + (tokens % 4) * 2 * entry
    with kvlib.method("full")(model) as run:
        model(ids)
        assert model(ids[:, -1:], past_key_values=run.cache).logits.argmax() == logits.argmax()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": 0.0}, r"keys=0\.0: a share of head_dim in \(0, 1\]"),
        ({"values": 1.5}, r"values=1\.5: "),
        ({"keys": True}, "keys=True: "),
        ({"recent": 0}, "recent=0: a number of tokens >= 1"),
        ({"recent": 2.0}, r"recent=2\.0: "),
        ({"calibration": 3}, "calibration=3: the name of a model, a folder, or None"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("cskv", **arguments)


def test_models_without_projections_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="GPT2Attention has no k_proj"), kvlib.method("cskv")(model):
        pass
