"""SubGen's k-center against the greedy rule, written out token by token."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib

ROWS = [tiny.tokens(30), tiny.tokens(21, seed=1)]


def by_hand(keys: torch.Tensor, count: int) -> list[int]:
    """The first token, and then, again and again, the one farthest from all that were taken."""
    taken = [0][:count]
    while len(taken) < min(count, len(keys)):
        gaps = [min(float((key - keys[j]).norm()) for j in taken) for key in keys]
        left = [j for j in range(len(keys)) if j not in taken]
        taken.append(max(left, key=lambda j: (gaps[j], -j)))
    return taken


@settings(max_examples=12)
@given(st.integers(1, 25), st.integers(0, 9))
def test_the_newest_and_the_centres_stay(budget, recent):
    model = tiny.model("llama-gqa")
    ids, mask = tiny.pad(ROWS)
    with kvlib.method("subgen", budget=budget, recent=recent)(model) as run:
        model(ids, attention_mask=mask)
    recent = min(recent, budget // 2)
    for row, kept in zip(ROWS, tiny.kept(run)):
        size = len(row)
        for (_, key, _, _), heads in zip(kvlib.snapshot(model, row[None]).layers, kept):
            for head, stays in enumerate(heads):
                centres = by_hand(key[0, head, : size - recent], min(budget, size) - recent)
                assert stays == sorted([*centres, *range(size - recent, size)])


def test_rows_of_other_budgets_have_their_own_centres():
    model, sets = tiny.model("llama-gqa"), []
    for rows in (ROWS, ROWS[:1], ROWS[1:]):
        with kvlib.method("subgen", budget=0.5, recent=2)(model) as run:
            model(*tiny.pad(rows))
            sets.append(tiny.kept(run))
            assert run.stored_bytes() == sum(len(row) // 2 for row in rows) * 4 * 2 * 8 * 8
    assert sets[0] == [*sets[1], *sets[2]]


def test_equal_keys_are_taken_last_and_the_earlier_first():
    from kvlib.methods.systems.subgen import spread_out

    key = torch.tensor([1.0, 1.0, 5.0, 1.0, 9.0, torch.nan])[None, None, :, None]
    rank = spread_out(key, torch.tensor([[[True, True, True, True, True, False]]]), 9)
    assert rank[0, 0].tolist() == [0, 3, 2, 4, 1, 9]
    assert spread_out(key, torch.tensor([[[False, True, True, True, True, False]]]), 2)[0, 0].tolist() == [
        *(2, 0, 2, 2, 1, 2)
    ]


@pytest.mark.parametrize("recent", [-1, 2.0, True, None])
def test_settings_that_can_never_work(recent):
    with pytest.raises(ValueError, match="recent=.*: a number of tokens >= 0"):
        kvlib.method("subgen", budget=0.5, recent=recent)
