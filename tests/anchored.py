"""AnchorCoder as masks, by loops: what a model computes that was trained with them, sharing nothing with kvlib."""

from contextlib import contextmanager
from fractions import Fraction

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def places(tokens: int, heads: int) -> list[int]:
    """In which place of a line each head sees its anchor."""
    cubes = [Fraction(i**3) for i in range(1, tokens + 1)]
    shares = [heads * cube / sum(cubes) for cube in cubes]
    count = [int(share) for share in shares]
    order = sorted(range(tokens), key=lambda i: (-(shares[i] - count[i]), i))
    for i in order[: heads - sum(count)]:
        count[i] += 1
    return [i for i in range(tokens) for _ in range(count[i])]


class Anchored:
    """Rows of token ids without padding, read at once by a model whose attention is `attend`."""

    def __init__(self, model, ids, anchor, per, source=None, beyond=None, spread=True):
        self.model, self.per, self.source, self.beyond, self.spread = model, per, source, beyond, spread
        marks = {anchor, model.config.bos_token_id} - {None}
        self.marked = [[token in marks for token in row] for row in ids.tolist()]
        self.begins = [[max([0, *(j + 1 for j in range(i) if row[j])]) for i in range(len(row))] for row in self.marked]
        self.stored, self.weights = {}, {}
        with attending(model, self.attend), torch.no_grad():
            self.logits = model(ids).logits

    def full(self, layer: int) -> bool:
        return self.per is not None and layer % self.per == 0

    def sees(self, row: int, i: int, j: int, full: bool) -> bool:
        return j <= i and (full or self.marked[row][j] or j == 0 or j >= self.begins[row][i])

    def turned(self, key):
        """Keys of anchors where the heads see them: rotated further, as complex numbers."""
        frequencies, key = self.model.model.rotary_emb.inv_freq.double(), key.clone()
        for row, marked in enumerate(self.marked):
            for e, begin in enumerate(self.begins[row]):
                if marked[e] and e > begin:
                    move = torch.tensor(places(e - begin, key.shape[1])) - (e - begin)
                    half = torch.complex(*key[row, :, e].double().chunk(2, dim=-1))
                    half = half * torch.exp(1j * move[:, None] * frequencies)
                    key[row, :, e] = torch.cat([half.real, half.imag], dim=-1).to(key.dtype)
        return key

    def attend(self, module, query, key, value, mask, scaling=None, **kwargs):
        layer, total = module.layer_idx, query.shape[2]
        full = self.full(layer)
        self.stored[layer] = key, value = self.turned(key) if self.spread else key, value
        reads = [(key, value, full)]
        if self.beyond is not None and layer > self.beyond:
            reads.append((*self.stored[self.source], full and self.full(self.source)))
        seen = torch.tensor([
            [[self.sees(row, i, j, all_of_it) for *_, all_of_it in reads for j in range(total)] for i in range(total)]
            for row in range(len(query))
        ])  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (torch.cat(x, dim=2).repeat_interleave(groups, dim=1) for x in list(zip(*reads))[:2])
        self.weights[layer] = weights = (scaling * query @ key.mT).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None


@contextmanager
def attending(model, function):
    """The model with another attention function, which sees no mask."""
    AttentionInterface.register("anchored", function)
    AttentionMaskInterface.register("anchored", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("anchored")
    yield
    model.set_attn_implementation(before)
