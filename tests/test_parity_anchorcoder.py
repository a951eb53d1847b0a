"""Masks, positions and logits are those of AnchorCoder's released trainer (`parity/anchorcoder`), and where not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.methods.anchors import lines, moves, offsets, visible

DATA = Path(__file__).parent / "parity" / "anchorcoder"
CASES = json.loads((DATA / "cases.json").read_text())
ARRAYS = np.load(DATA / "cases.npz")
LAYOUTS = [name.removeprefix("mask_in_") for name in ARRAYS.files if name.startswith("mask_in_")]
FORGETFUL = "taa_source_layer1_A"  # whose second layer forgets itself, and keeps everything there
LOGITS = [name.removeprefix("logits_") for name in ARRAYS.files if name.startswith("logits_")]


def layout(name):
    """Marks of a layout, positions, and where lines begin."""
    marked = torch.from_numpy(ARRAYS[f"mask_in_{name}"]).bool()
    positions = torch.arange(marked.shape[1]).expand(*marked.shape)
    return marked, positions, lines(marked, positions, torch.zeros(len(marked), dtype=torch.int64))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks(name):
    marked, positions, begins = layout(name)
    found = visible(positions, marked, positions, begins)
    theirs = np.unpackbits(ARRAYS[f"mask_out_{name}"], axis=2)[:, :, : marked.shape[1]].astype(bool)
    for row, (mine, released) in enumerate(zip(found.numpy(), theirs)):
        if name == "batch3_row1_without_anchor" and row == 1:  # a defect there: such a row sees nothing
            assert not released.any() and (mine == np.tri(len(mine), dtype=bool)).all()
        else:
            assert (mine == released).all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if f"mhpe_positions_{name}" in ARRAYS.files])
def test_where_heads_see_anchors(name):
    marked, positions, begins = layout(name)
    mine = positions[:, None] + moves(marked, positions, begins, 32)
    assert (mine[0].T[marked[0]].numpy() == ARRAYS[f"mhpe_positions_{name}"]).all()


def test_shares_of_heads():
    for tokens, expected in zip(ARRAYS["mhpe_line_lengths"].tolist(), ARRAYS["mhpe_offsets_32"]):
        assert (offsets(tokens, 32) == expected).all()
    for heads in (4, 8, 12, 16):
        for tokens, expected in enumerate(ARRAYS[f"mhpe_offsets_{heads}_m1_64"], start=1):
            assert (offsets(tokens, heads) == expected).all()


@pytest.fixture(scope="module")
def model():
    sizes = CASES["model"]
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        rms_norm_eps=sizes["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        tie_word_embeddings=False,
        bos_token_id=CASES["bos_id"],
        eos_token_id=None,
    )
    scales, packed = json.loads((DATA / "weight_scales.json").read_text()), np.load(DATA / "weights_int8.npz")
    weights = {name: torch.from_numpy(packed[name]).double() * scales[name] for name in packed.files}
    built = LlamaForCausalLM(config).double().eval()
    built.load_state_dict(weights)
    return built


def arguments(config: str) -> dict:
    theirs, layers = CASES["configs"][config], CASES["model"]["layers"]
    second = theirs["multilayer"] < layers
    return {
        "anchor": CASES["anchor_id"],
        "per": theirs["per"],
        "source": theirs["anchor_layer"] if second else None,
        "beyond": theirs["multilayer"] if second else None,
        "forced": False,
    }


@pytest.mark.parametrize("case", [case for case in LOGITS if case != FORGETFUL])
def test_logits(model, case):
    """The training mask's logits, where all that it hides has been freed: pieces of 31, 7 and of single tokens."""
    config, text = case.rsplit("_", 1)
    ids, expected = torch.from_numpy(ARRAYS[f"ids_{text}"]), torch.from_numpy(ARRAYS[f"logits_{case}"])
    with kvlib.method("anchorcoder", **arguments(config))(model) as run, torch.no_grad():
        logits, cache = [], None
        sizes = [31, *[7] * 4, *[1] * 4] if ids.shape[1] > 63 else [17, *[1] * 6]
        for piece in ids.split([*sizes, ids.shape[1] - sum(sizes)], dim=1):
            output = model(piece, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        assert run.stored_bytes() <= run.full_bytes()
    step = 1 if expected.shape[1] == ids.shape[1] else 4
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, ::step], expected.double(), rtol=0, atol=5e-5)


def test_departure_a_source_that_forgets_is_not_remembered_in_full_layers(model):
    """The first mark is at 0: up to the second one nothing is forgotten, and logits are the same."""
    ids, expected = torch.from_numpy(ARRAYS["ids_A"]), torch.from_numpy(ARRAYS[f"logits_{FORGETFUL}"]).double()
    with kvlib.method("anchorcoder", **arguments("taa_source_layer1"))(model), torch.no_grad():
        logits = model(ids).logits[:, ::4]
    second = int((ids[0] == CASES["anchor_id"]).nonzero()[0])
    same = torch.isclose(logits, expected, rtol=0, atol=5e-5).all(-1)[0]
    assert same[: second // 4 + 1].all() and not same[second // 4 + 1 :].all()
