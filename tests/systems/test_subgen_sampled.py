"""SubGen's estimator against its rules, one token and one slot at a time, and right on average."""

from unittest.mock import patch

import properties
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.methods.systems.subgen_sampled import SubGenSampled, chance

ROWS = [tiny.tokens(18), tiny.tokens(11, seed=1)]
WORD = 2**64 - 1


def mixed(x: int) -> int:
    """splitmix64's finaliser."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


class Hand:
    """One head of one row: all keys and values, and which tokens stand in which slots."""

    def __init__(self, method, layer, head):
        self.method, self.place = method, (head << 24) + (layer << 34) + (method.seed << 44)
        self.keys, self.values, self.folded, self.mass, self.unit = [], [], 0, 0.0, None
        self.slots, self.clusters = [None] * method.samples, []

    def drawn(self, position: int, slot: int) -> float:
        x = mixed(position + self.place & WORD)
        return ((mixed(x + slot + 1 & WORD) >> 12) + 0.5) / 2**52

    def fold(self):
        """Sample what has come."""
        method = self.method
        if self.unit is None:
            self.unit = sum(float(key.norm()) for key in self.keys) / len(self.keys)
        for at in range(self.folded, len(self.keys)):
            weight = float(self.values[at] @ self.values[at])
            self.mass += weight
            for slot in range(method.samples):
                if self.drawn(at, slot) < weight / self.mass:
                    self.slots[slot] = at
            gaps = [torch.dist(self.keys[at], self.keys[c["first"]]).item() for c in self.clusters]
            if not gaps or min(gaps) > method.radius * self.unit:
                self.clusters.append({"first": at, "n": 0, "slots": [None] * method.per})
                gaps.append(0.0)
            cluster = self.clusters[gaps.index(min(gaps))]
            cluster["n"] += 1
            for slot in range(method.per):
                if self.drawn(at, method.samples + slot) < 1 / cluster["n"]:
                    cluster["slots"][slot] = at
        self.folded = len(self.keys)

    def stored(self) -> list[int]:
        members = {at for c in self.clusters for at in (c["first"], *c["slots"])}
        return sorted(members | {*self.slots} | {*range(self.folded, len(self.keys))})

    def attention(self, query, scaling, position):
        e = (torch.stack(self.keys) @ query * scaling).exp().tolist()
        new = range(self.folded, position + 1)
        above = sum((e[at] * self.values[at] for at in new), torch.zeros_like(self.values[0]))
        below = sum(e[at] for at in new)
        if self.folded:
            for at in self.slots:
                value = self.values[at]
                above = above + self.mass / self.method.samples * e[at] * value / float(value @ value)
            for c in self.clusters:
                below += c["n"] / self.method.per * sum(e[at] for at in c["slots"])
        return above / below


@settings(max_examples=5)
@given(
    st.integers(1, 9),
    st.sampled_from([0, 0.6, 0.9, 1.2]),
    st.integers(1, 3),
    st.integers(0, 2**19 - 1),
)
def test_samples_and_outputs_are_those_of_the_rules(samples, radius, per, seed):
    model, attend, passes = tiny.model("llama-gqa"), SubGenSampled.attend, []
    method = kvlib.method("subgen_sampled", samples=samples, radius=radius, per=per, seed=seed)

    def spy(self, view):
        output = attend(self, view)
        asked = view.query.unflatten(1, (-1, view.groups))
        passes.append((view.layer_idx, view.query_positions.clone(), asked, view.new_key, view.new_value, output))
        return output

    hands = {(row, i, head): Hand(method, i, head) for row in range(2) for i in range(2) for head in range(2)}
    with patch.object(SubGenSampled, "attend", spy), method(model) as run:
        turn = tiny.generate(model, run, ROWS, new=4)
        kept = [turn.kept]
        turn = tiny.generate(model, run, [tiny.tokens(5, seed=2)] * 2, new=3, before=turn)
        kept.append(turn.kept)
        scaling = run.modules[0].scaling
        properties.well_formed(run)
        sizes = [layer.lengths for layer in run.cache.layers]
    assert len(passes) == 2 * (4 + 3)
    for index, positions, asked, keys, values, output in passes:
        output = output.transpose(1, 2).unflatten(1, (2, -1))
        for (row, layer, head), hand in hands.items():
            if layer != index:
                continue
            real = positions[row] >= 0
            hand.keys += [*keys[row, head, real]]
            hand.values += [*values[row, head, real]]
            for column, at in enumerate(positions[row].tolist()):
                for of in range(2):
                    if at >= 0:
                        exact = hand.attention(asked[row, head, of, column], scaling, at)
                        torch.testing.assert_close(output[row, head, of, column], exact, rtol=1e-9, atol=1e-9)
            hand.fold()
            if len(hand.keys) == len(ROWS[row]) + 3:
                assert kept[0][row][layer][head] == hand.stored()
    for (row, layer, head), hand in hands.items():
        assert kept[1][row][layer][head] == hand.stored()
        assert sizes[layer][row, head] == len(hand.stored())
    assert run.stored_bytes() == run.allocated_bytes() == sum(len(h.stored()) for h in hands.values()) * 2 * 8 * 8


def weights(model, snapshot, **arguments):
    """Of every token of a prompt, its weight in the numerator and in the denominator, `(layers, heads, tokens)`."""
    found = torch.zeros(2, 2, 2, len(snapshot.ids[0]), dtype=torch.float64)
    with kvlib.method("subgen_sampled", **arguments)(model) as run:
        run.fork(snapshot)
        for index, layer in enumerate(run.cache.layers):
            at = layer.position_rectangle()[0].long()
            for i, name in enumerate(("above", "below")):
                x = layer.tail.rectangle(layer.tail.state[name])[0].masked_fill(at < 0, 0)
                found[i, index].scatter_add_(-1, at.clamp(min=0), x)
    return found


def test_both_estimates_are_right_on_average():
    # A token's weight is 1 on average: of its own slots in the numerator, of its cluster's in the denominator.
    model, count, samples, per = tiny.model("llama-gqa"), 150, 3, 2
    snapshot = kvlib.snapshot(model, tiny.tokens(1, 12, seed=3))
    made = [weights(model, snapshot, samples=samples, radius=0.9, per=per, seed=i) for i in range(count)]
    above, below = torch.stack(made).mean(0)
    size = torch.stack([value[0].square().sum(-1) for _, _, value, _ in snapshot.layers])
    share = size / size.sum(-1, keepdim=True)
    error = ((1 - share) / (samples * share) / count).sqrt()  # of a binomial number of slots
    assert ((above - 1).abs() < 4.5 * error).all()
    assert ((above - 1).abs() > 0.3 * error).any()
    members = torch.zeros_like(below)
    hand = kvlib.method("subgen_sampled", samples=1, radius=0.9, per=1)
    for layer in range(2):
        for head in range(2):
            of = Hand(hand, layer, head)
            of.keys, of.values = (list(x[0, head]) for x in snapshot.layers[layer][1:3])
            of.fold()
            for cluster in of.clusters:
                gaps = [float((key - of.keys[cluster["first"]]).norm()) for key in of.keys]
                others = [[float((key - of.keys[c["first"]]).norm()) for key in of.keys] for c in of.clusters]
                for at, gap in enumerate(gaps):
                    known = [o[at] for o, c in zip(others, of.clusters) if c["first"] <= at]
                    if cluster["first"] <= at and gap == min(known):
                        members[layer, head, at] = cluster["n"]
    assert members.amax() > 3
    error = ((members - 1) / per / count).sqrt()
    assert ((below - 1).abs() <= 4.5 * error + 1e-12).all()
    totals = torch.stack([x[1].sum(-1) for x in made])
    torch.testing.assert_close(totals, torch.full_like(totals, 12.0))  # every cluster counts as many as it has


def test_the_denominator_is_exact_where_every_key_is_a_cluster():
    model, snapshot = tiny.model("llama-gqa"), kvlib.snapshot(tiny.model("llama-gqa"), tiny.tokens(1, 15))
    for per in (1, 3):
        below = weights(model, snapshot, samples=2, radius=0, per=per)[1]
        torch.testing.assert_close(below, torch.ones_like(below), rtol=1e-12, atol=0)


def test_the_output_is_exact_with_one_token_and_comes_near_with_many_slots():
    model = tiny.model("llama-gqa")
    for length, samples, most in ((1, 1, 1e-12), (15, 50, 3.0), (15, 20_000, 0.15)):
        ids = tiny.tokens(1, length)
        errors = []
        for name, arguments in (("full", {}), ("subgen_sampled", {"samples": samples, "radius": 0})):
            with kvlib.method(name, **arguments)(model) as run:
                model(ids)
                errors.append(model(tiny.tokens(1, 1, seed=9), past_key_values=run.cache).logits)
        assert (errors[0] - errors[1]).abs().max() <= most
        if samples == 50:
            assert (errors[0] - errors[1]).abs().max() > 0.15


def test_chance_is_a_hash_of_the_place_alone():
    at = torch.tensor([[[0, 5, 2**20]] * 3])
    found = chance(at, layer=7, seed=3, draws=4)
    for head in range(3):
        for i, position in enumerate(at[0, head].tolist()):
            x = mixed(position + (head << 24) + (7 << 34) + (3 << 44))
            assert found[0, head, i].tolist() == [
                ((mixed(x + draw & WORD) >> 12) + 0.5) / 2**52 for draw in range(1, 5)
            ]
    many = chance(torch.arange(5000)[None, None], 0, 0, 4).flatten()
    assert 0 <= many.min() < 0.001 < 0.999 < many.max() < 1 and abs(many.mean() - 0.5) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    model = tiny.build("llama-gqa", dtype)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 32  # estimates are far off
    with kvlib.method("subgen_sampled", samples=2, radius=3.0, per=1)(model) as run:
        logits = [model(*tiny.pad(ROWS)).logits]
        for i in range(12):
            logits.append(model(tiny.tokens(2, 1, seed=i), past_key_values=run.cache).logits)
    assert all(x[:, -1].isfinite().all() for x in logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"samples": 0}, r"samples=0: a number of slots >= 1"),
        ({"radius": -0.1}, r"radius=-0\.1: a number >= 0"),
        ({"radius": float("nan")}, r"radius=nan: a number >= 0"),
        ({"radius": True}, r"radius=True: a number >= 0"),
        ({"per": 0}, r"per=0: a number of slots >= 1"),
        ({"seed": 2**19}, r"seed=524288: a whole number in \[0, 2\*\*19\)"),
    ],
)
def test_settings_that_can_never_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvlib.method("subgen_sampled", **arguments)
