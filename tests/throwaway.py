"""What the contract has to carry beside evictors: eleven kinds of method, each a throw-away class.

None of them is registered. They are simplified to the form that the contract has to bear; the real methods follow.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kvlib
from kvlib.core import attention
from kvlib.core.method import highest, strongest
from kvlib.core.part import Part
from kvlib.core.rotary import rotaries, rotate


def pick(x, at):
    """Of `(batch, heads, n, dim)` the channels `at` `(batch, heads, k)`."""
    return x.gather(-1, at[:, :, None].expand(*x.shape[:3], -1))


def first_of(x, order, width):
    """Of a rectangle the slots `order` `(batch, heads, slots)`, the first `width` of them."""
    index = order[..., :width].view(*order.shape[:2], width, *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(*index.shape[:3], *x.shape[3:]))


@dataclass(frozen=True)
class HalfChannels(kvlib.Method):
    """Of every key the half of the channels that the last queries use most, chosen at the end of the prompt (ThinK)."""

    window = 4

    def encode(self, run, layer, key, value, positions):
        at = layer.rows.get("channels")
        return {"key": key if at is None else pick(key, at), "value": value}

    def compress(self, view):
        if "channels" in view.layer.rows:
            return
        query, asked = view.recent_queries(self.window)
        used = (query * (asked >= 0)[:, None, :, None]).square().sum(2).unflatten(1, (-1, view.groups)).sum(2)
        size = used * (view.key * (view.positions >= 0)[..., None]).square().sum(2)
        at = view.layer.rows["channels"] = size.topk(size.shape[-1] // 2).indices.sort(-1).values
        view.layer.tail.put(view.layer.tail.fields, "key", pick(view.key, at))

    def attend(self, view):
        at = view.layer.rows.get("channels")
        if at is None:
            return attention.attend(view)
        return attention.attend(view.replaced(query=pick(view.query, at.repeat_interleave(view.groups, 1))))


@dataclass(frozen=True)
class Int8(kvlib.Method):
    """Keys and values in 8 bits with a scale per token, from the moment they arrive."""

    own_prefill = True

    def encode(self, run, layer, key, value, positions):
        scales = {name: x.abs().amax(-1, keepdim=True) / 127 for name, x in (("key", key), ("value", value))}
        codes = {"key": (key / scales["key"]).round(), "value": (value / scales["value"]).round()}
        return {n: x.to(torch.int8) for n, x in codes.items()} | {f"{n}_scale": x.float() for n, x in scales.items()}

    def decode(self, view, part):
        stored, dtype = view.fields(part), view.new_key.dtype
        return tuple(stored[name].to(dtype) * stored[f"{name}_scale"].to(dtype) for name in ("key", "value"))


@dataclass(frozen=True)
class LowRank(kvlib.Method):
    """Keys and values cut to `rank` directions of their projections; keys are stored as before rotation (LoRC)."""

    rank: int = 6
    own_prefill = True

    def prepare(self, model):
        weights = [(a.k_proj.weight, a.v_proj.weight) for a in (layer.self_attn for layer in model.model.layers)]
        heads = [[w.unflatten(0, (model.config.num_key_value_heads, -1)) for w in pair] for pair in weights]
        bases = [[torch.linalg.svd(w, full_matrices=False).U[..., : self.rank] for w in pair] for pair in heads]
        return list(zip(bases, rotaries(model)))

    def encode(self, run, layer, key, value, positions):
        (keys, values), rotary = run.prepared[layer.index]
        back = -positions[:, None].clamp(min=0).expand(key.shape[:3])
        straight = rotate(key, back, rotary)
        return {"key": straight @ keys, "value": value @ values}

    def decode(self, view, part):
        (keys, values), rotary = view.run.prepared[view.layer_idx]
        stored = view.fields(part)
        return rotate(stored["key"] @ keys.mT, view.positions, rotary), stored["value"] @ values.mT


@dataclass(frozen=True)
class Borrowed(kvlib.Method):
    """Layer 1 stores nothing and reads what layer 0 stores (KVSharer)."""

    own_prefill = True

    def encode(self, run, layer, key, value, positions):
        return {} if layer.index == 1 else super().encode(run, layer, key, value, positions)

    def decode(self, view, part):
        if view.layer_idx != 1:
            return super().decode(view, part)
        other = view.other(0)
        return other.key, other.value


@dataclass(frozen=True)
class Merging(kvlib.Evictor):
    """The value of a token that goes is averaged into the nearest key that stays (CaM, Elastic Cache)."""

    def score(self, view):
        return torch.linalg.vector_norm(view.key, dim=-1)

    def compress(self, view):
        stays, lengths = self.choose(view)
        real, tail = view.positions >= 0, view.layer.tail
        near = torch.cdist(view.key, view.key).masked_fill(~(stays & real)[:, :, None], torch.inf).argmin(-1)
        mass = torch.zeros_like(view.key[..., 0]).scatter_add_(-1, near, real.to(view.key.dtype))
        total = torch.zeros_like(view.value)
        total.scatter_add_(2, near[..., None].expand_as(total), view.value * real[..., None])
        tail.put(tail.fields, "value", total / mass.clamp(min=1)[..., None])
        view.layer.keep(stays, lengths)


@dataclass(frozen=True)
class TwoBits(kvlib.Method):
    """Keys in 2 bits, a scale per channel and group of tokens; what does not fill a group stays as it is (KIVI)."""

    group: int = 32
    evicts_in_decode = True

    def compress(self, view):
        layer, tail = view.layer, view.layer.tail
        full = tail.lengths // self.group
        if not (n := int(full.max())):
            return
        chunk = {name: x[:, :, : n * self.group].unflatten(2, (n, -1)) for name, x in view.fields(tail).items()}
        key, at = chunk["key"], tail.position_rectangle()
        low, step = key.amin(3, keepdim=True), (key.amax(3, keepdim=True) - key.amin(3, keepdim=True)) / 3
        code = ((key - low) / step).round().byte().unflatten(-1, (-1, 4)) * 4 ** torch.arange(4, device=key.device)
        layer.body = layer.body or Part(*tail.lengths.shape, key.device, self.group, layer.memo)
        encoded = {"key": code.sum(-1).to(torch.uint8), "low": low, "step": step, "value": chunk["value"]}
        places = at[:, :, : n * self.group].unflatten(2, (n, -1))
        layer.body.append(encoded, places, full, skip=torch.zeros_like(full))
        rest = torch.arange(at.shape[-1], device=at.device) >= full[..., None].to(at.device) * self.group
        layer.keep(rest & (at >= 0), tail.lengths - full * self.group)

    def decode(self, view, part):
        stored = view.fields(part)
        if part.size == 1:
            return stored["key"], stored["value"]
        code = stored["key"][..., None] // 4 ** torch.arange(4, device=view.device) % 4
        return (code.flatten(-2) * stored["step"] + stored["low"]).flatten(2, 3), stored["value"].flatten(2, 3)


@dataclass(frozen=True)
class SharedDirections(kvlib.Method):
    """Layers 0 and 1 store one direction for both, and their own norms; the tokens least alike are kept (MiniCache)."""

    retained: int = 5

    def finish(self, run):
        if not run.step.ends_prompt:
            return
        layers, at = run.cache.layers[:2], run.cache.layers[0].tail.position_rectangle()
        pair = [run.view(i).fields(layers[i].tail) for i in (0, 1)]
        alike = F.cosine_similarity(pair[0]["key"], pair[1]["key"], dim=-1)
        own = strongest(-alike, at, torch.full(at.shape[:2], self.retained)) & (at >= 0)
        counts, order = (~own & (at >= 0)).sum(-1), (own | (at < 0)).long().sort(dim=-1, stable=True).indices
        chunk = {"at": at}
        for name in ("key", "value"):
            norms = [torch.linalg.vector_norm(fields[name], dim=-1) for fields in pair]
            unit = F.normalize(pair[0][name], dim=-1) + F.normalize(pair[1][name], dim=-1)
            chunk |= {name: F.normalize(unit, dim=-1), f"{name}_norms": torch.stack(norms, dim=-1)}
        chunk = {name: first_of(x, order, int(counts.max())) for name, x in chunk.items()}
        body = layers[0].body or Part(*counts.shape, at.device, memo=run.cache.memo)
        body.append(chunk, chunk.pop("at"), counts, skip=torch.zeros_like(counts))
        for layer in layers:
            layer.body = body
            layer.keep(own, layer.tail.lengths - counts)

    def decode(self, view, part):
        stored = view.fields(part)
        norms = [stored.get(f"{name}_norms", torch.ones(1, 2))[..., view.layer_idx, None] for name in ("key", "value")]
        return stored["key"] * norms[0], stored["value"] * norms[1]


@dataclass(frozen=True)
class Repeated(kvlib.Evictor):
    """What the model looks at when it reads the prompt once more (KVzip)."""

    def on_token_ids(self, run, token_ids):
        read = run.cache.layers[0].rows
        new = token_ids.masked_fill(run.step.positions < 0, -1)
        read["ids"] = torch.cat([read["ids"], new], dim=1) if "ids" in read else new

    def observe(self, view):
        if view.step.probing:
            view.state["most"] = view.column_sums().amax(2)

    def score(self, view):
        return view.state["most"]

    def compress(self, view):
        """Not yet: `finish` does it."""

    def finish(self, run):
        if run.step.ends_prompt and self.evicts:
            run.probe(_left(run.cache.layers[0].rows["ids"]))
            for index in range(len(run.cache.layers)):
                super().compress(run.view(index))


def _left(ids):
    """Ids `(batch, columns)` with all -1 in front."""
    return ids.gather(1, (ids >= 0).long().sort(dim=1, stable=True).indices)


@dataclass(frozen=True)
class SharedSlots(kvlib.Reader):
    """Layer 0 reads everything and chooses for all later layers, in each query head for itself (TidalDecode)."""

    def select(self, view):
        shared = view.step.shared
        if view.layer_idx == 0:
            score = view.column_sums().flatten(1, 2)
            positions = view.positions.repeat_interleave(view.groups, 1)
            shared["chosen"] = view.lengths, highest(score, positions, self.tokens(view, self.budget))
            return None
        lengths, slots = shared["chosen"]
        assert torch.equal(lengths, view.lengths)  # slots of another layer mean the same tokens
        return slots


@dataclass(frozen=True)
class Pages(kvlib.Reader):
    """Pages of tokens by a bound on their logits, from the lowest and highest key entries of each page (Quest)."""

    page: int = 4

    def observe(self, view):
        rows, new = view.layer.rows, view.new_key
        pages = (int(view.tokens.max()) + self.page - 1) // self.page
        at = view.query_positions[:, None, :, None]
        index = (at.clamp(min=0) // self.page).expand_as(new)
        for name, reduce, empty in (("low", "amin", torch.inf), ("high", "amax", -torch.inf)):
            old = rows.get(name, new[:, :, :0])
            wider = F.pad(old, (0, 0, 0, pages - old.shape[2]), value=empty)
            rows[name] = wider.scatter_reduce(2, index, new.masked_fill(at < 0, empty), reduce)

    def select(self, view):
        low, high = view.layer.rows["low"], view.layer.rows["high"]
        query = view.query.unflatten(1, (-1, view.groups))  # (batch, kv_heads, group, 1, dim)
        bound = torch.maximum(query * low[:, :, None], query * high[:, :, None]).sum(-1).amax(2)
        page, last = torch.arange(bound.shape[-1]), (view.tokens[:, None, None] - 1) // self.page
        others = page.where(low[..., 0].isfinite() & (page != last), -1)
        best = highest(bound, others, self.tokens(view, self.budget) // self.page)
        best = torch.cat([best, last.expand(-1, best.shape[1], 1)], dim=-1)  # and the page of the newest token
        view.note_read(low.isfinite().sum((1, 2, 3)) * 2 * low.element_size())
        slots = (best[..., None] * self.page + torch.arange(self.page)).flatten(2)
        return slots.where((slots >= 0) & (slots < view.lengths[..., None]), -1)


@dataclass(frozen=True)
class BothLayers(kvlib.Method):
    """Layer 1 attends to its own keys and to those of layer 0 in one softmax (AnchorCoder's LAA)."""

    own_prefill = True

    def attend(self, view):
        if view.layer_idx == 0:
            return attention.attend(view)
        own, other = view, view.other(0)
        both = (torch.cat([getattr(own, x), getattr(other, x)], dim=2) for x in ("key", "value", "positions"))
        key, value, positions = both
        return attention.attend(own.replaced(key=key, value=value, positions=positions))


METHODS = [
    HalfChannels(),
    Int8(),
    LowRank(),
    Borrowed(),
    Merging(0.5),
    Merging(7),
    TwoBits(4),
    TwoBits(32),
    SharedDirections(),
    Repeated(0.5),
    Repeated(6),
    SharedSlots(0.4),
    SharedSlots(5),
    Pages(0.4),
    BothLayers(),
]
