"""What holds for every method: functions that the generic tests, the gate and the random cases share."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import tiny
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import kvlib
from kvlib.core.cache import KVCache
from kvlib.core.part import most_room
from kvlib.core.view import View


@dataclass(frozen=True)
class Conversation:
    """Two turns of a batch: tokens of each row's prompt and, for all rows, of the second turn.

    Attributes:
        extra: columns of padding before every row. chunk: columns read at a time. new: tokens generated in each turn.
        only_new: the second turn passes its own ids only.
    """

    first: tuple[int, ...]
    second: int
    extra: int = 0
    chunk: int | None = None
    new: int = 3
    only_new: bool = False
    seed: int = 0

    def rows(self, turn: int) -> list[torch.Tensor]:
        lengths = (self.first, [self.second] * len(self.first))[turn]
        return [tiny.tokens(length, seed=hash((self.seed, turn, i)) % 2**31) for i, length in enumerate(lengths)]


def same_alone_and_in_company(model, method, talk: Conversation) -> None:
    """A padded batch read in chunks gives every row the tokens and keep-sets that it gets alone, read at once."""
    with method(model) as run:
        first = tiny.generate(model, run, talk.rows(0), talk.new, talk.extra, talk.chunk)
        well_formed(run)
        second = tiny.generate(model, run, talk.rows(1), talk.new, 0, talk.chunk, first, talk.only_new)
        well_formed(run)
    for i, (row, next_row) in enumerate(zip(talk.rows(0), talk.rows(1), strict=True)):
        with method(model) as run:
            alone = tiny.generate(model, run, [row], talk.new)
            again = tiny.generate(model, run, [next_row], talk.new, before=alone)
        for together, single in ((first, alone), (second, again)):
            assert together.tokens[i].tolist() == single.tokens[0].tolist()
            assert together.kept[i] == single.kept[0]


def fork_continues_like_live(model, method, talk: Conversation) -> None:
    """A cache made from a snapshot goes on like the run that read the prompt itself."""
    ids, mask = tiny.pad(talk.rows(0), talk.extra)
    live = tiny.once(model, method, talk.rows(0), new=talk.new, extra=talk.extra, chunk=talk.chunk)
    snapshot = kvlib.snapshot(model, ids, mask)
    with method(model) as run:
        run.fork(snapshot)
        made, kept = tiny.decode(model, run, snapshot.logits, talk.new)
    assert made.tolist() == live.tokens.tolist()
    assert kept == live.kept


def leaves_nothing_to_the_collector(model, method, talk: Conversation) -> None:
    """Passes and whole runs free what they held when they end; in a cycle it would wait, on a GPU for very long."""
    gc.collect()
    gc.disable()
    try:
        with method(model) as run:
            tiny.generate(model, run, talk.rows(0), talk.new, talk.extra, talk.chunk)
            if not method.own_prefill:
                run.fork(kvlib.snapshot(model, *tiny.pad(talk.rows(0))))
            assert not any(type(thing) is View for thing in gc.get_objects(generation=0))
        cache = weakref.ref(run.cache)
        del run
        assert cache() is None
    finally:
        gc.enable()


def well_formed(run) -> None:
    """Keep-sets ascend, then -1, and name tokens seen; their bytes are stored, and nothing else is reachable."""
    layers = run.cache.layers
    for idx, layer in enumerate(layers):
        sets = run.kept(idx)
        assert sets.shape[:2] == layer.lengths.shape
        for row, heads in enumerate(sets.tolist()):
            for head, indices in enumerate(heads):
                real = [i for i in indices if i >= 0]
                assert indices == sorted(set(real)) + [-1] * (len(indices) - len(real))
                assert len(real) == layer.lengths[row, head]
                assert all(i < run.cache.tokens[row] for i in real)
    stored, most = 0, 0
    for part in run.cache.parts():
        entry = sum(x[:1].numel() * x.element_size() for x in part.fields.values() if len(x))
        stored += int(part.lengths.sum()) * entry
        most += part.lengths.numel() * most_room(int(part.lengths.max())) * entry
        flats = (*part.fields.values(), *part.state.values(), part.positions)
        assert all(len(flat) == part.capacity.sum() for flat in flats)
        assert (part.position_rectangle() >= 0).sum() == part.lengths.sum() * part.size  # nothing else is seen
    kv, everything = tiny.audit(run.cache)
    assert run.stored_bytes() == stored
    assert run.allocated_bytes() == kv <= stored + most
    assert run.state_bytes() == everything - kv


def without_room(run) -> None:
    """Right after a prompt was compressed nothing is allocated beyond what is stored."""
    assert run.allocated_bytes() == run.stored_bytes()


# Eviction as a mask: an attention function that stores nothing, hides tokens, and shares nothing with kvlib


def _turn(x, offset, inverse_frequencies):
    """Rotary vectors moved by `offset` positions, as complex numbers."""
    half = torch.complex(*x.to(inverse_frequencies.dtype).chunk(2, dim=-1))
    half = half * torch.exp(1j * offset[..., None] * inverse_frequencies)
    return torch.cat([half.real, half.imag], dim=-1).to(x.dtype)


def masked_attention(module, query, key, value, attention_mask, scaling=None, visible=None, frequencies=None, **kwargs):
    layer = visible[module.layer_idx]
    seen = layer.repeat_interleave(query.shape[1] // layer.shape[0], dim=0)  # (query heads, queries, keys)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if frequencies is None:
        logits = query @ key.transpose(-1, -2)
    else:  # every query sees its keys moved to their rank among the keys that it sees
        rank, column = seen.cumsum(-1) - 1, torch.arange(seen.shape[-1])
        keys = _turn(key[0, :, None].expand(*seen.shape, -1), rank - column, frequencies)
        moved = _turn(query[0], seen.sum(-1) - 1 - column, frequencies)
        logits = torch.einsum("hqd,hqkd->hqk", moved, keys)[None]
    weights = (logits * scaling).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


@contextmanager
def attending_with(model, function):
    """The model with another attention function."""
    AttentionInterface.register("by_hand", function)
    AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("by_hand")
    yield
    model.set_attn_implementation(before)


@contextmanager
def eager(model):
    """The model with transformers' eager attention, which returns its weights (its softmax is float32)."""
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation("sdpa")


def masked_logits(model, ids, visible, frequencies=None) -> torch.Tensor:
    """Logits of one uncached pass `(1, tokens)` in which query i of head h sees key j if `visible[layer][h, i, j]`."""
    with attending_with(model, masked_attention), torch.no_grad():
        return model(ids, use_cache=False, visible=visible, frequencies=frequencies).logits


@torch.no_grad()
def teacher_forced(model, method, passes: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of passes `(1, tokens)` over one cache, and who saw whom in each layer as `masked_logits` wants it."""
    total = sum(ids.shape[1] for ids in passes)
    heads = model.config.num_key_value_heads
    visible = [torch.zeros(heads, total, total, dtype=torch.bool) for _ in range(model.config.num_hidden_layers)]
    logits, start = [], 0
    with method(model) as run:
        for ids in passes:
            end = start + ids.shape[1]
            for idx, layer in enumerate(visible):
                if start:
                    for head, indices in enumerate(run.kept(idx)[0]):
                        layer[head, start:end, indices[indices >= 0]] = True
                layer[:, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            logits.append(model(ids, past_key_values=run.cache if start else None).logits)
            start = end
    return torch.cat(logits, dim=1), visible


def frequencies(model, method) -> torch.Tensor | None:
    """What `masked_logits` needs for a method that re-numbers the tokens it keeps."""
    return model.model.rotary_emb.inv_freq if getattr(method, "renumber", False) else None


def teacher_keys(model) -> torch.Tensor:
    """All keys of layer 0 after a random prompt."""
    with kvlib.method("full")(model) as run:
        model(tiny.tokens(1, 40))
    return run.cache.layers[0].tail.fields["key"]


def token_bytes(model) -> int:
    """Bytes of one token's keys and values in all layers and heads."""
    config = model.config
    weights = model.model.layers[0].self_attn.k_proj.weight
    return 2 * config.num_hidden_layers * weights.shape[0] * weights.element_size()


# Beams


@torch.no_grad()
def beams_have_their_own_history(model, method, rows: list[torch.Tensor], beams: int, new: int) -> None:
    """Every live row after a beam search stores what a run stores that reads this row's text and nothing else."""
    passes, text = [], []

    def read(model, args, arguments):
        if not (run._probing or run._rereading):
            passes.append(arguments["input_ids"])

    def reorder(cache, chosen):
        text.append(torch.cat([*text[-1:], passes[-1]], dim=1)[chosen])
        return reorder_cache(cache, chosen)

    ids, mask = tiny.pad(rows)
    reorder_cache = KVCache.reorder_cache
    hook = model.register_forward_pre_hook(read, with_kwargs=True)
    with patch.object(KVCache, "reorder_cache", reorder), method(model) as run:
        model.generate(ids, attention_mask=mask, num_beams=beams, max_new_tokens=new, do_sample=False)
        live, stored = tiny.kept(run), [_fields(layer) for layer in run.cache.layers]
    hook.remove()
    assert len(live) == len(rows) * beams
    assert text[-1].shape[1] == ids.shape[1] + new - 1
    for i, (row, sets) in enumerate(zip(text[-1], live, strict=True)):
        prompt = rows[i // beams]
        with method(model) as run:
            model(prompt[None])
            for token in row[ids.shape[1] :]:
                model(token[None, None], past_key_values=run.cache)
            assert sets == tiny.kept(run)[0]
            for layer, theirs in zip(run.cache.layers, stored) if not method.evicts else ():  # slots are in text order
                for name, mine in _fields(layer).items():
                    torch.testing.assert_close(theirs[name][i : i + 1, :, : mine.shape[2]], mine, rtol=1e-9, atol=1e-9)


def _fields(layer) -> dict[str, torch.Tensor]:
    """What a layer's tail stores: field -> rectangle, 0 in empty slots."""
    empty, found = layer.tail.position_rectangle() < 0, {}
    for name, flat in layer.tail.fields.items():
        x = layer.tail.rectangle(flat)
        found[name] = x.masked_fill(empty.view(*empty.shape, *[1] * (x.ndim - 3)), 0)
    return found
