"""Entropies, layer groups and choices of tokens are those of UNComp's release (`parity/uncomp`), and where not."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kvlib
from kvlib.core.method import strongest
from kvlib.core.view import View
from kvlib.methods.entropy import entropy, spectrum
from kvlib.methods.head_groups import by_rank
from kvlib.methods.layer_groups import group_starts

DATA = Path(__file__).parent / "parity" / "uncomp"
ARRAYS = np.load(DATA / "entropy.npz")
RECORDED = json.loads((DATA / "entropy.json").read_text())
STAGES = json.loads((DATA / "stages.json").read_text())
RIDGE = 1e-10  # on every eigenvalue, in the release


def tokens(name, dtype=torch.float64):
    return torch.from_numpy(ARRAYS[name]).to(dtype)


def released(x, k=None):
    """The release's number: with its ridge, divided by ln d."""
    return entropy(spectrum(x) + RIDGE, k) / math.log(x.shape[-1])


@pytest.mark.parametrize("case", RECORDED["entropy"], ids=lambda case: f"{case['kind']}-{case['N']}x{case['d']}")
def test_entropies(case):
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        theirs, x = case[str(dtype).removeprefix("torch.")], tokens(case["id"], dtype)
        found = [float(released(x, k)) for k in case["k"]]
        assert found == pytest.approx(theirs["truncated_4d"], abs=within)
        assert float(released(x)) == pytest.approx(theirs["full_4d"], abs=within)
        for name in ("truncated_5d", "full_5d", "full_3d"):  # which have 1e-10 inside the logarithm as well
            mine = found if name == "truncated_5d" else float(released(x))
            assert mine == pytest.approx(theirs[name], abs=within + 5e-9)


def test_heads_in_one_call_and_their_upper_half():
    x = tokens("multihead_x")
    assert released(x, 8).tolist() == pytest.approx(ARRAYS["multihead_truncated_k8_float64"].tolist(), abs=1e-12)
    assert released(x).tolist() == pytest.approx(ARRAYS["multihead_full_float64"].tolist(), abs=1e-12)
    for k in (8, 32):
        upper = by_rank(released(x, k), 2) == 1
        assert upper.tolist() == ARRAYS[f"multihead_top4_label_k{k}"].tolist()
    assert by_rank(released(x, 8), 2).tolist() != by_rank(released(x, 32), 2).tolist()


def test_degenerate_heads():
    theirs = RECORDED["degenerate"]
    for k, name in ((8, "truncated_k8"), (None, "full")):
        mine = released(tokens("degenerate_rank_one_x"), k).tolist()
        assert mine == pytest.approx(theirs[f"head0_rank_one/{name}"], abs=1e-12)
        basis = torch.cat([torch.eye(32), -torch.eye(32)]).double().expand(2, -1, -1)
        assert released(basis, k).tolist() == pytest.approx(theirs[f"isotropic_pm_basis/{name}"], abs=1e-12)


def test_departure_a_degenerate_head_raises_nothing():
    """In the release one token at the mean of one head is an error for all heads."""
    for case, name in (("row_mean", "one_row_exactly_the_mean"), ("identical", "all_tokens_identical")):
        assert RECORDED["degenerate"][f"head0_{name}/full"].startswith("raises")
        x = tokens(f"degenerate_{case}_x")
        found = spectrum(x)
        torch.testing.assert_close(found[1], spectrum(x[1]), rtol=0, atol=1e-12)
        if case == "identical":
            assert entropy(found)[0] == 0
        else:
            at_mean = (x[0] - x[0].mean(0)).norm(dim=-1).argmin()
            others = torch.arange(len(x[0])) != at_mean
            torch.testing.assert_close(found[0], spectrum(x[0], others), rtol=0, atol=1e-12)
    assert entropy(spectrum(tokens("degenerate_identical_exact_x")))[0] == 0


@pytest.mark.parametrize("name", ["layers32", "layers40"])
def test_released_layer_groups(name):
    theirs = STAGES["released"][name]
    wanted = {"layers32": [0, 2, 15, 26, 31], "layers40": [0, 1, 3, 15, 23, 31, 35, 37]}[name]
    assert theirs["starts"]["-1"] == wanted
    for threshold, starts in theirs["starts"].items():
        assert group_starts(theirs["scores"], -float(threshold)) == starts


def test_other_layer_groups():
    assert any(len(case["starts"]) > 1 for case in STAGES["synthetic"])
    for case in STAGES["synthetic"]:
        assert group_starts(case["scores"], -case["threshold"]) == case["starts"]


CHOICES = json.loads((DATA / "tokens.json").read_text())
KEPT = np.load(DATA / "tokens.npz")


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case["name"])
def test_tokens_inside_heads(case):
    """Of every group the tokens that the release keeps, and of equal scores any."""
    method = chooser(case)
    attention = torch.from_numpy(KEPT[f"{case['name']}_attn"]).float()
    positions = torch.arange(case["n_tokens"]).expand(len(attention), -1)
    for g, group in enumerate(case["groups"]):
        view = seen(method, attention[group["heads"]], positions[group["heads"]], case["n_tokens"])
        require_choice(method.score(view), view.positions, group["budget"], f"{case['name']}_g{g}")


@pytest.mark.parametrize("case", [case for case in CHOICES if case["decodes"]], ids=lambda case: case["name"])
def test_tokens_after_the_first_decoded_one(case):
    method, tokens = chooser(case), case["n_tokens"] + 1
    attention = torch.from_numpy(KEPT[f"{case['name']}_attn"]).float()
    for g, group in enumerate(case["groups"]):
        name = f"{case['name']}_g{g}"
        kept = torch.from_numpy(KEPT[f"{name}_kept"]).long()
        new = torch.from_numpy(KEPT[f"{case['name']}_dec0_g{g}_row"])
        before = attention[group["heads"]].gather(2, kept[:, None].expand(-1, 8, -1))
        rows = torch.cat([torch.nn.functional.pad(before[:, 1:], (0, 1)), new[:, None]], dim=1)
        positions = torch.nn.functional.pad(kept, (0, 1), value=tokens - 1)
        view = seen(method, rows, positions, tokens)
        view.step.decoding, view.state = True, {"rows": rows.mT[None]}
        require_choice(method.score(view), view.positions, group["budget"], f"{case['name']}_dec0_g{g}")


def chooser(case):
    """The method with one group of heads; the test looks at each group by itself."""
    pooling = {"maxpool": "max", "avgpool": "avg"}[case["pooling"]]
    return kvlib.method("uncomp", budget=64, groups=1, kernel=case["kernel"], pooling=pooling)


def seen(method, rows: torch.Tensor, positions: torch.Tensor, tokens: int) -> View:
    """What a score looks at: attention `(heads, queries, slots)` of the last queries, and where slots stand."""
    view = View.__new__(View)
    view.new_key, view.layer_idx, view.prompt_tokens = torch.empty(0), 0, torch.tensor([tokens])
    view.tokens, view.positions, view.state = view.prompt_tokens, positions[None], {}
    view.step = SimpleNamespace(decoding=False, ends=view.tokens, starts={})
    view.run = SimpleNamespace(
        method=method, cache=SimpleNamespace(notes={}), clamped={}, clamped_rows=torch.tensor([False])
    )
    view.column_sums = lambda last: rows[:, len(rows[0]) - int(last) :].sum(1)[None, :, None]
    return view


def require_choice(score, positions, budget: int, name: str) -> None:
    heads, ends = len(positions[0]), int(positions.max()) + 1
    chosen = torch.zeros(heads, ends, dtype=torch.bool)
    keep = strongest(score, positions, torch.full((1, heads), budget))[0]
    assert (keep.sum(1) == budget).all()
    chosen.scatter_(1, positions[0], keep)
    certain, tied = (
        torch.from_numpy(np.unpackbits(KEPT[f"{name}_{kind}"], axis=1)[:, :ends].astype(bool))
        for kind in ("certain", "tied")
    )
    assert (chosen >= certain).all() and (chosen <= certain | tied).all()
