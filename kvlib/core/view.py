"""What a method sees of one layer in one forward pass."""

import copy
from functools import cached_property

import torch

from kvlib.core import attention, packed
from kvlib.core.layer import Layer
from kvlib.core.part import Part


class View:
    """One layer after the new tokens were stored and before anything is evicted.

    What it shows may lie in the cache itself, and is overwritten by later passes: copy what has to last longer.

    Attributes:
        query: `(batch, query_heads, new, head_dim)`, rotated; query_positions: `(batch, new)`, -1 = padding.
        key, value: rectangles `(batch, kv_heads, slots, head_dim)` of everything stored, decoded by the method when
            first looked at, keys rotated; the tokens of this pass stand at the end.
        positions: `(batch, kv_heads, slots)` index among the row's real tokens, -1 = empty slot. They say what comes
            first in the text: after evictions while decoding slots do not, until the next pass of several tokens.
        new_key, new_value: `(batch, kv_heads, new, head_dim)`, the tokens of this pass, padding included.
        lengths: `(batch, kv_heads)` on the CPU, stored tokens.
        tokens, prompt_tokens: `(batch,)` on the CPU, real tokens seen so far, and at the end of the latest prompt.
        state: name -> rectangle `(batch, kv_heads, slots of the tail, ...)`. Whatever a method puts here stays with its
            tokens: it is evicted with them and starts at 0 for new ones.
        layer, layer_idx: the layer that stores what is seen here.
        intact: nothing has been evicted since the latest tokens were added.
        whole, slots: of a gathered view the one it was made from, and the slots of that; else None.
        stored: keys, values and positions are not others than those of the layer, or of `whole`, where these lie.
        uniform: slots have no gaps and no padding, and the queries are those of the last slots.
        weighing: something was evicted, and scores of this decode step are made of attention weights, from which, or
            together with which, attention is computed then.
        summing: the method declares that it sums over queries, and this pass brings several.
        lse: log-sum-exp of each query's logits `(batch, query_heads, new)` over the keys as they are stored, if
            `packed.attend` has found it.
        groups (query heads per KV head), scaling, step, run, module (the attention module).
    """

    def __init__(self, run, layer: Layer, module, query, key, value, scaling, dropout):
        self.run, self.module, self.step = run, module, run.step.on(key.device)
        self.new_key, self.new_value = key, value
        self.query, self.scaling, self.dropout = query, scaling, dropout
        self.tokens, self.prompt_tokens = run.step.tokens, run.step.prompt_tokens
        self.groups = query.shape[1] // key.shape[1]
        self._asked, self._moved = query, False
        self.whole = self.slots = self.attended = None
        self._open(layer)
        self.summing = (run.method.weighs or run.method.window > 0) and query.shape[2] > 1
        self.weighing = run.method.weighs and run.step.decoding and self.incomplete

    def _open(self, layer: Layer) -> None:
        self.layer, self.layer_idx, self.stored = layer, layer.index, layer.tail.positions.device == self.device
        self.waiting, self.lse = layer.queries, None
        self.intact = layer.tail.intact  # False in `other` once that layer has evicted: the new tokens may be gone
        dense = layer.tail.dense and (layer.body is None or layer.body.dense)
        self.uniform = self.intact and self.step.complete and dense

    @property
    def incomplete(self) -> bool:
        """Does the tail hold less than all tokens of some row?"""
        return self.layer.tail.holds_less(self.tokens, self.step.longest)

    @property
    def device(self) -> torch.device:
        return self.new_key.device

    @cached_property
    def query_positions(self) -> torch.Tensor:
        return self.step.positions

    # What is stored

    @cached_property
    def lengths(self) -> torch.Tensor:
        return self.layer.lengths

    @cached_property
    def positions(self) -> torch.Tensor:
        if self.slots is not None:
            return self._listed(self.whole.positions).where(self.slots >= 0, -1)
        return self.layer.position_rectangle().to(self.device)

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        tail = self.layer.tail
        return {name: tail.rectangle(flat).to(self.device) for name, flat in tail.state.items()}

    def accumulate(self, name: str, values: torch.Tensor) -> None:
        """Add `values` `(batch, kv_heads, slots, ...)` to `state[name]`, which begins at 0."""
        if name in self.state:
            self.state[name] += values
        else:
            self.state[name] = values

    def save_state(self) -> None:
        """Put what the method has left in `state` where it stays with its tokens."""
        for name, rectangle in self.__dict__.get("state", {}).items():
            self.layer.tail.put(self.layer.tail.state, name, rectangle)

    @cached_property
    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.slots is not None:
            return self._listed(self.whole.key), self._listed(self.whole.value)
        if self.layer.body is None:
            pair = self.run.method.decode(self, self.layer.tail)
        else:
            pairs = [self.run.method.decode(self, part) for part in self.layer.parts]
            pair = tuple(torch.cat(x, dim=2) for x in zip(*pairs))
        return pair if pair[0].device == self.device else tuple(x.to(self.device) for x in pair)

    @cached_property
    def key(self) -> torch.Tensor:
        return self._decoded[0]

    @cached_property
    def value(self) -> torch.Tensor:
        return self._decoded[1]

    @cached_property
    def weights(self) -> torch.Tensor:
        """While decoding: softmax attention of the query, `(batch, kv_heads, group, slots)`, float32 or better."""
        if packed.serves(self):
            return packed.weights(self)
        return attention.weights(self.query, self.key, None if self.uniform else self.positions, self.scaling)

    @property
    def copied(self) -> bool:
        """Were keys or values looked at, and are they copies of what is stored?"""
        shown = self.slots is None and self.layer.tail.uniform and not self.run.method.hooks("decode")
        return "_decoded" in self.__dict__ and not shown

    def fields(self, part: Part) -> dict[str, torch.Tensor]:
        """What a part stores: field -> rectangle."""
        return {name: part.rectangle(flat) for name, flat in part.fields.items()}

    def remember(self, name: str, values: torch.Tensor) -> None:
        """Add `values` of this pass's tokens, `(batch, kv_heads, new, ...)` padding included, to `state[name]`."""
        if self.step.decoding and self.uniform and name in self.state:
            self.layer.tail.set_last(name, values)
            return
        new, more = values.shape[2], values.shape[3:]
        column = (self.positions - self.per_row(self.step.ends) + new).clamp(0, new - 1)  # padding comes first
        fresh, column = (
            x.view(*x.shape, *[1] * len(more)).expand(*x.shape, *more) for x in (self.arrived, column.long())
        )
        self.state[name] = values.gather(2, column).where(fresh, self.state.get(name, 0.0))

    @cached_property
    def arrived(self) -> torch.Tensor:
        """Which slots hold tokens of this pass, `(batch, kv_heads, slots)`."""
        return self.positions >= self.per_row(self.step.ends - self.on_device(self.step.counts))

    # Other views

    def other(self, layer_idx: int) -> "View":
        """This view with what another layer stores, which has already run in this pass, maybe on another device."""
        view = self._anew("lengths", "key", "value", "positions", "state", "arrived", "weights", "_decoded")
        view.whole = view.slots = None
        view._open(self.run.cache.layers[layer_idx])
        return view

    def _anew(self, *names: str) -> "View":
        """A copy that has not looked at `names`."""
        view = copy.copy(self)
        view.attended = None
        for name in names:
            view.__dict__.pop(name, None)
        return view

    def replaced(self, query=None, key=None, value=None, positions=None) -> "View":
        """This view with other queries, keys, values or positions of them, to attend or to sum over queries.

        Keys, values and positions of several layers may stand behind each other.
        """
        view = self._anew("weights")
        view.stored = False
        view.query = self.query if query is None else query
        view.key, view.value = self.key if key is None else key, self.value if value is None else value
        if positions is not None:
            view.positions, view._moved, view.uniform, view.intact = positions, True, False, False
            view.__dict__.pop("arrived", None)
        view.groups = view.query.shape[1] // view.key.shape[1]
        return view

    def gathered(self, slots: torch.Tensor) -> "View":
        """This view with these slots only, `(batch, kv_heads or query_heads, k)`, -1 = none; what is read counts.

        Keys, values and positions are copied when they are looked at, and not before.
        """
        place = slots, self.layer.tail.entry_bytes
        if place not in self.step.listed:
            self.step.listed[place] = (slots >= 0).sum((1, 2)) * self.layer.tail.entry_bytes
        self.note_read(self.step.listed[place])
        view = self._anew("key", "value", "positions", "arrived", "weights", "_decoded")
        view.whole, view.slots = self, slots.to(self.device)  # layers that share a list may lie on several
        view.stored = self.stored and self.slots is None
        view.groups, view._moved, view.uniform, view.intact = self.query.shape[1] // slots.shape[1], True, False, False
        return view

    def _listed(self, rectangle: torch.Tensor) -> torch.Tensor:
        """The entries of `slots`, `(batch, kv_heads or query_heads, k, ...)`, from a rectangle of `whole`."""
        at = self.slots.where(self.slots >= 0, self.slots.amax(-1, keepdim=True))  # nothing else is touched
        heads = torch.arange(at.shape[1], device=at.device)[:, None] // (at.shape[1] // rectangle.shape[1])
        rows = torch.arange(len(at), device=at.device)[:, None, None]
        return rectangle[rows, heads, at]

    def note_read(self, count: torch.Tensor) -> None:
        """Add `(batch,)` bytes to what this layer has read in this pass. A layer that says nothing reads all it has."""
        self.layer.reads = count if self.layer.reads is None else self.layer.reads + count

    @property
    def as_stored(self) -> bool:
        """False once queries, keys, values or positions were replaced by others."""
        if self._moved or self.query is not self._asked:
            return False
        return self.key is self._decoded[0] and self.value is self._decoded[1]

    # Sums over queries

    def column_sums(self, last=None) -> torch.Tensor:
        """Attention received by every stored token, `(batch, kv_heads, group, slots)`, float32 or better.

        Args:
            last: None sums over the queries of this forward pass. A number, or `(batch,)` numbers, sums over so many of
                the prompt's last queries, wherever chunks were cut.

        Raises:
            ValueError: if `last` exceeds the `window` that the method declares; if the layer has already evicted.
        """
        if self.step.decoding and self.intact and (last is None or (isinstance(last, int) and last == 1)):
            found = self.weights
            self.__dict__.pop("weights")  # it is the caller's now
            return found
        return self.over_queries(attention.column_sums, last, norms=True)

    def eviction_errors(self, last=None) -> torch.Tensor:
        """How far a query's output moves if one stored token alone is evicted, summed as `column_sums` sums."""
        return self.over_queries(attention.eviction_errors, last, values=True)

    def importance(self, last=None) -> torch.Tensor:
        """What the run's method reads in place of attention (`Evictor.importance`); arguments of `column_sums`."""
        return self.run.method.importance(self, last)

    def over_queries(self, function, last=None, values: bool = False, norms: bool = False) -> torch.Tensor:
        """`function(query, key, query_positions, key_positions, scaling)` over the queries that `last` means.

        Both positions are None where nothing is padded or empty. With `values` they come behind the keys, with `norms`
        there is `lse`, too, None where it is not known.
        """
        if not (self.intact or self._moved):
            raise ValueError(f"layer {self.layer_idx} has already evicted; its column sums are known before that only")
        last = None if last is None else torch.as_tensor(last).expand(len(self.tokens))
        longest = 0 if last is None else int(last.max())
        if longest > self.run.method.window:
            raise ValueError(f"last={longest}: the method declares window={self.run.method.window} queries")
        # Sums over all queries of a prompt cost as much as its attention, and a snapshot serves many methods.
        kept = self.as_stored and not self.step.decoding and not self.run.encodes
        place = (function, self.module.layer_idx, self.layer_idx, None if last is None else tuple(last.tolist()))
        if kept and place in self.step.sums:
            return self.step.sums[place].clone()
        query, positions, uniform = self.query, self.query_positions, self.uniform
        if last is not None:
            query, positions = self.recent_queries(longest)
            if bool((last == longest).all()) and self.uniform:
                # what earlier chunks have left may be padding
                uniform = query.shape[2] <= self.query.shape[2]
            else:
                uniform = False
                start = (self.step.ends - self.on_device(last))[:, None]
                positions = positions.where(positions >= start, -1)
        where = (None, None) if uniform else (positions, self.positions)
        stored = (self.key, self.value) if values else (self.key,)
        known = self.lse is not None and self.as_stored and uniform
        more = {"lse": self.lse[:, :, -query.shape[2] :] if known else None} if norms else {}
        with torch.cuda.device_of(query):  # where Triton launches
            sums = function(query, *stored, *where, self.scaling, **more)
        if kept:
            self.step.sums[place] = sums.clone()
        return sums

    def recent_queries(self, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's last queries `(batch, query_heads, <= last, head_dim)` and their positions, across chunks."""
        query, positions = self.query, self.query_positions
        if self.waiting is not None:
            query = torch.cat([self.waiting[0], query], dim=2)
            positions = torch.cat([self.waiting[1], positions], dim=1)
        return query[:, :, -last:], positions[:, -last:]

    # Numbers per row

    def excess(self, budgets: torch.Tensor) -> int | None:
        """Tokens beyond `budgets` `(batch, kv_heads)`, which follow from the prompt; None if heads differ in it."""
        held, budget = self.layer.tail.each, self.per_prompt("budget", lambda view: common(budgets))
        if self.layer.body is None and held is not None and budget is not None:  # no tensor is looked at
            return max(0, held - budget)
        return common((self.lengths - budgets).clamp(min=0))

    def per_prompt(self, name: str, function):
        """`function(view)`, which follows from the prompt and the layer: worked out once, until the next prompt."""
        notes, place = self.run.cache.notes, (name, self.layer_idx)
        if place not in notes:
            notes[place] = function(self)
        return notes[place]

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        """A small CPU tensor that follows from the prompt, on the view's device: copied there once per prompt."""
        if x.device == self.device:
            return x
        place = (self.device, x.dtype, x.shape, x.numpy().tobytes())
        notes = self.run.cache.notes
        if place not in notes:
            notes[place] = x.to(self.device)
        return notes[place]

    def per_row(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `(batch,)` or `(batch, kv_heads)` of any device, to be compared with slots: `(batch, heads or 1, 1)`."""
        x = self.on_device(x) if x.device.type == "cpu" else x.to(self.device)
        return x[:, None, None] if x.ndim == 1 else x[:, :, None]

    def protect(self, score: torch.Tensor, first=0, last=0) -> torch.Tensor:
        """`score` with the first and the last real tokens of every row raised to infinity.

        Args:
            score: `(batch, kv_heads, slots)`.
            first, last: tokens, numbers or CPU tensors `(batch,)` or `(batch, kv_heads)`.
        """
        inside = None
        if torch.is_tensor(last) or last:
            inside = self.positions >= self._start(last)
        if torch.is_tensor(first) or first:
            start = self.positions < (self.per_row(first) if torch.is_tensor(first) else first)
            inside = start if inside is None else inside | start
        return score if inside is None else score.masked_fill(inside, torch.inf)

    def _start(self, last) -> torch.Tensor:
        """The position of the first of the `last` tokens, to be compared with slots; the same for many layers."""
        if torch.is_tensor(last):  # the same object at every step; in most layers the same number for all rows
            notes = self.run.cache.notes
            if last not in notes:
                one = common(last)
                notes[last] = last if one is None else one
            last = notes[last]
        place = (self.device, last)
        if place not in self.step.starts:
            ends = self.per_row(self.step.ends)
            self.step.starts[place] = ends - (self.per_row(last) if torch.is_tensor(last) else last)
        return self.step.starts[place]

    def clamp(self, name: str, value, low=None, high=None) -> torch.Tensor:
        """`value` brought into what this prompt allows; a change is noted in `run.clamped`.

        Numbers or CPU tensors `(batch,)` or `(batch, kv_heads)`, the result a tensor. Where the bounds contradict each
        other the lower one holds.
        """
        value, *bounds = (None if x is None else torch.as_tensor(x) for x in (value, low, high))
        per_head = any(x is not None and x.ndim == 2 for x in (value, *bounds))
        value, low, high = (x[:, None] if x is not None and per_head and x.ndim == 1 else x for x in (value, *bounds))
        inside = value if high is None else torch.minimum(value, high)
        inside = inside if low is None else torch.maximum(inside, low)
        inside = inside if inside.ndim else inside.expand(len(self.tokens))
        changed = inside != value
        if bool(changed.any()):
            per_row = inside if inside.ndim == 1 else inside.amin(1)
            self.run.clamped[name] = per_row
            rows, before = changed if changed.ndim == 1 else changed.any(1), self.run.clamped_rows
            self.run.clamped_rows = rows | before if len(before) in (1, len(rows)) else rows  # beams may be more rows
        return inside


def common(x: torch.Tensor) -> int | None:
    """The value that all elements of a CPU tensor have, or None."""
    first = int(x.flatten()[0])
    return first if bool((x == first).all()) else None
