"""Packed storage: a run of tokens that are stored alike, in segments with room.

Every (row, KV head) pair owns one segment of each flat tensor. Segments follow each other row by row and head by head,
each with its own length, and with room for tokens to come. Tokens are appended in place; a method that evicts while
decoding has the next token written into the slot of the one that goes. Nothing else is copied, and where all segments
have one length nothing waits for a device.

Three shapes occur throughout:

- *flat* `(allocated, ...)`: all segments, room included;
- *rectangle* `(batch, kv_heads, slots, ...)`: for computing, `slots` = the longest segment without its room, shorter
  ones filled with arbitrary entries whose position is -1. With equal segments it is a view of the flat tensor;
- *chunk* `(batch, kv_heads, new, ...)`: entries on their way in.

Lengths live on the CPU. They follow from budgets and masks, so no step waits for a device to know them. Where kernels
read them, the device counts for itself (`ends`).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from kvlib import kernels
from kvlib.core.layout import places, segments, slots, sources, starts, take

ROOM = 64  # entries


def most_room(held: int) -> int:
    """Entries that a segment has memory for beyond those that it holds, once tokens come one at a time, at the most.

    A share of what is held, so that copying it takes the same time for each token that comes, however long the text.
    """
    return max(ROOM, held // 32)


class Memo(dict):
    """What was worked out in a pass; between passes nothing is kept, but for captured steps, which do not change."""

    open = lasting = False

    def close(self) -> None:
        self.open = False
        if not self.lasting:
            self.clear()


class Part:
    """Segments of entries, each one token, or `size` tokens that are encoded together.

    Attributes:
        fields: name -> flat, what stands for keys and values: counted as stored bytes.
        state: name -> flat, what a method remembers per entry: evicted with it, 0 for new ones.
        positions: flat int32 `(allocated,)`, for groups `(allocated, size)`: index among the row's real tokens, -1 in
            the hole and in room that is not yet used.
        lengths, capacity: `(batch, kv_heads)` int64 on the CPU, entries held and entries there is memory for.
        shape: (batch, kv_heads).
        uniform: all segments have the same length and capacity.
        hole: `(segments,)` where in the flat tensors the last entry was evicted from each segment. vacant: it is still
            empty, and the next entry will be written there.
        ordered: slots are in text order, without a hole.
        intact: nothing has been evicted since the latest entries were added.
        static: steps are captured (`kvlib.core.capture`): rectangles include all room, and shapes do not change.
        still: entries that have gone, one for each that came, since any of the memory was last allocated anew.
        recorded: what `kvlib.core.recorded` has recorded of work on this memory, or None.
        memo: what follows from lengths and capacities alone, shared by all parts of a cache.
    """

    def __init__(self, batch: int, kv_heads: int, device, size: int = 1, memo: "Memo | None" = None):
        self.size, self.shape, self.memo = size, (batch, kv_heads), Memo() if memo is None else memo
        self.fields: dict[str, torch.Tensor] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.positions = torch.empty((0, size) if size > 1 else 0, dtype=torch.int32, device=device)
        self.vacant, self.ordered, self.intact, self.static = False, True, True, False
        self._room = self._ahead = 0
        self._resize(torch.zeros(batch, kv_heads, dtype=torch.int64))

    def _resize(self, lengths: torch.Tensor, capacity: torch.Tensor | None = None) -> None:
        """Note new lengths and a new capacity, by default one without room."""
        self._moved()
        self._lengths, self.hole = lengths, None
        self.capacity = lengths if capacity is None else capacity
        self.shape = tuple(lengths.shape)
        self._starts, self._ends, self._last, self._ahead, self._coming = None, None, None, 0, []
        # as numbers, because looking into tensors takes longer than a small step allows
        pairs = list(zip(lengths.flatten().tolist(), self.capacity.flatten().tolist()))
        (self._held, self._size), self.uniform = pairs[0], len(set(pairs)) == 1

    def _moved(self) -> None:
        """Some of the memory was allocated anew."""
        self.still, self.recorded, self._laid = 0, None, []

    # Reading

    @property
    def lengths(self) -> torch.Tensor:
        if self._lengths is None:  # equal ones, counted as a number
            self._lengths = torch.full(self.shape, self._held)
        return self._lengths

    @property
    def tokens(self) -> torch.Tensor:
        """`(batch, kv_heads)` on the CPU, tokens held."""
        return self.lengths if self.size == 1 else self.lengths * self.size

    @property
    def dense(self) -> bool:
        """Are the slots of a rectangle all filled?"""
        return self.uniform and (not self.static or self._held == self._size)

    @property
    def extent(self) -> torch.Tensor:
        """`(batch, kv_heads)` on the CPU, slots that a rectangle shows: entries held, and a hole among them."""
        if self.static:
            return self.capacity
        return self.lengths + 1 if self.vacant else self.lengths

    @property
    def width(self) -> int:
        """Slots of a rectangle."""
        return self._used if self.uniform else int(self.extent.max())

    @property
    def starts(self) -> torch.Tensor:
        """Where in the flat tensors each segment begins, `(batch, kv_heads)` on the device."""
        if self._starts is None:
            if self.uniform:
                number = torch.arange(self.capacity.numel(), device=self.positions.device)
                self._starts = (number * self._size).view(self.shape)
            else:
                self._starts = starts(self.capacity).to(self.positions.device)
        return self._starts

    @property
    def ends(self) -> torch.Tensor:
        """Slots of each segment in use, a hole among them, `(batch, kv_heads)` on the device; counted there."""
        if self._ends is None:
            if self.uniform:
                self._ends = torch.full(self.shape, self._held + self.vacant, device=self.positions.device)
            else:
                self._ends = (self.lengths + self.vacant).to(self.positions.device)
        return self._ends

    def rectangle(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat tensor as a rectangle; no copy if segments are equal."""
        if self.uniform:
            return self._slots(flat, 0, self._used)
        index, _ = self._plan(slots, self.extent, self.capacity)
        return take(flat, index.flatten()).view(*index.shape, *flat.shape[1:])

    def _whole(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat tensor of equal segments as `(batch, kv_heads, capacity, ...)`."""
        return flat.view(*self.shape, self._size, *flat.shape[1:])

    def _slots(self, flat: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """`count` slots of every segment of equal ones, `(batch, kv_heads, count, ...)`."""
        if flat.requires_grad:
            return self._whole(flat).narrow(2, first, count)
        (batch, heads), size, (unit, *rest) = self.shape, self._size, flat.stride()
        start = flat.storage_offset() + first * unit  # in one operation: two take longer than a small step allows
        return flat.as_strided(
            (batch, heads, count, *flat.shape[1:]), (heads * size * unit, size * unit, unit, *rest), start
        )

    @property
    def _used(self) -> int:
        """`extent` of equal segments."""
        return self._size if self.static else self._held + self.vacant

    def position_rectangle(self) -> torch.Tensor:
        """Positions `(batch, kv_heads, slots)` or, of groups, `(batch, kv_heads, slots, size)`; -1 in empty slots."""
        positions = self.rectangle(self.positions)
        if self.uniform:
            return positions
        filled = self._plan(slots, self.extent, self.capacity)[1]
        return positions.where(filled if self.size == 1 else filled[..., None], -1)

    @property
    def entry_bytes(self) -> int:
        """Keys and values of one entry."""
        return sum(x.element_size() * x.shape[1:].numel() for x in self.fields.values())

    def holds_less(self, tokens: torch.Tensor, most: int) -> bool:
        """Does a segment hold less than the `tokens` `(batch,)` of its row, `most` in the longest?"""
        return self._held * self.size < most if self.uniform else bool((self.tokens < tokens[:, None]).any())

    def row_bytes(self) -> torch.Tensor:
        """`(batch,)` on the CPU, keys and values of the entries held."""
        return self.lengths.sum(1) * self.entry_bytes

    def _plan(self, function: Callable, *arguments: torch.Tensor | int):
        """`function(*arguments, device)` for CPU tensors and numbers, worked out when first asked for in a pass."""
        device = self.positions.device  # of a large model's layers each may have another
        if not self.memo.open:
            return function(*arguments, device)
        key = (function, device, *((x.shape, x.numpy().tobytes()) if torch.is_tensor(x) else x for x in arguments))
        if key not in self.memo:
            self.memo[key] = function(*arguments, device)
        return self.memo[key]

    @property
    def outgrown(self) -> bool:
        """Is all room of equal segments used, and the next as much as is made for a long answer?"""
        return self._held == self._size and 4 * self._room >= ROOM

    @property
    def each(self) -> int | None:
        """Tokens that every segment holds, if it is the same number."""
        return self._held * self.size if self.uniform else None

    # Writing

    def append(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor, counts: torch.Tensor, skip=None) -> None:
        """Add entries at the end of every segment, or one in its hole.

        Args:
            chunk: field -> `(batch, kv_heads, new, ...)`.
            positions: `(batch, kv_heads or 1, new)`, of groups `(..., new, size)`; -1 for padding.
            counts: `(batch, kv_heads)` on the CPU, real entries of the chunk.
            skip: `(batch, kv_heads)` on the CPU, entries of the chunk before the first real one; by default padding
                comes first, `new - counts`.
        """
        if positions.shape[1:3] == (1, 1) and bool((counts == 1).all()):
            self._ahead = 0  # these need not be the next of the text
            self._add(chunk, positions[:, 0], follows=False)
        else:
            self._append(chunk, positions, counts, skip)

    def _append(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor, counts: torch.Tensor, skip=None) -> None:
        (batch, heads), new = self.shape, positions.shape[2]
        positions = positions.to(self.positions.device, torch.int32).expand(batch, heads, *positions.shape[2:])
        if not len(self.positions):
            self.fields = {name: x.new_empty(0, *x.shape[3:]) for name, x in chunk.items()}
        self.restore_order()
        self.intact = True
        merge = self._merge(new, counts, new - counts if skip is None else skip)
        self.fields = {name: merge(self.fields[name], x) for name, x in chunk.items()}
        for name, flat in self.state.items():
            self.state[name] = merge(flat, flat.new_zeros(batch, heads, new, *flat.shape[1:]))
        self.positions = merge(self.positions, positions)
        self._resize(self.lengths + counts)
        self._room = 0

    def append_one(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor) -> None:
        """`append` of the next token of every row, in place.

        Args:
            chunk: field -> `(batch, kv_heads, 1, ...)`.
            positions: `(batch, 1)`, the same in all heads. While tokens come one at a time each is one more than the
                last, so that they are written once for all the room there is.
        """
        if self._held >= self._ahead or (torch.is_grad_enabled() and any(x.requires_grad for x in chunk.values())):
            self._add(chunk, positions.to(self.positions.device), follows=True)
            return
        if self.fields:  # all in one call
            torch._foreach_copy_(self._coming[self._held - self._ahead], [chunk[name] for name in self.fields])
        self.intact = True
        self._advance()
        self.count(1)

    def with_one(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> tuple:
        """`append_one` of a key and a value, of which alone equal segments consist, and the rectangles of all."""
        coming = self._held - self._ahead
        if coming >= 0 or torch.is_grad_enabled():
            self.append_one({"key": key, "value": value}, positions)
            return self.rectangle(self.fields["key"]), self.rectangle(self.fields["value"])
        torch._foreach_copy_(self._coming[coming], (key, value))
        if self._ends is not None:
            self._ends.add_(1)
        self.intact, self._lengths, self._held = True, None, self._held + 1
        keys, values = self._laid
        return keys.narrow(2, 0, self._held), values.narrow(2, 0, self._held)

    def _add(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor, follows: bool) -> None:
        """One entry more for every segment, with `positions` `(batch, 1)` or, of groups, `(batch, 1, size)`."""
        if not len(self.positions) or any(x.requires_grad for x in chunk.values()):
            # there is no form yet, or writing in place would break the graph of a pass with gradients
            self._append(chunk, positions[:, None], torch.ones(self.shape, dtype=torch.int64))
            return
        self.intact = True
        if self.vacant or self.static or not self.uniform:
            self._last = self._write_next(chunk, positions)
        else:
            self._last = None
            grown = self._held == self._size
            if grown:
                self.grow()
            if follows and (grown or self._held == self._ahead):  # not where rows move with every token, as beams do
                self._lay_out(positions)
            for name, x in chunk.items():
                self._slots(self.fields[name], self._held, 1).copy_(x)
            for flat in self.state.values():
                self._slots(flat, self._held, 1).zero_()
            self._slots(self.positions, self._held, 1).copy_(positions[:, None])
            self._advance()
        self.vacant = False
        self.count(1)

    def _advance(self) -> None:
        """One slot more is in use; on the device it is counted if it was asked for."""
        if self._ends is not None:
            self._ends.add_(1)

    def grow(self) -> None:
        """Room for tokens that come one at a time: one entry, then four times as many, up to `most_room`."""
        self._room = min(most_room(self.width), 4 * self._room or 1)
        self.reserve(self._room)

    def _lay_out(self, positions: torch.Tensor) -> None:
        """Prepare room for tokens that follow each other: their positions, and where their fields go."""
        room = min(ROOM, self._size - self._held)
        coming = torch.arange(room, dtype=torch.int32, device=positions.device) + positions
        self._slots(self.positions, self._held, room).copy_(coming[:, None])
        slots = (self._slots(flat, self._held, room).split(1, dim=2) for flat in self.fields.values())
        self._coming = list(zip(*slots, strict=True))
        self._laid = list(map(self._whole, self.fields.values()))
        self._ahead = self._held + room

    def _write_next(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """Write an entry for each segment where its next one goes, and tell where that is in the flat tensors."""
        if self.vacant:
            self.ordered = False
        elif bool((self.lengths == self.capacity).any()):
            self.grow()
        index = self._written(chunk, positions)
        for flat in self.state.values():
            flat.index_fill_(0, index, 0)
        return index

    def _written(self, chunk: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        if kernels.decodes(self.positions.device):
            from kvlib.kernels import newest  # Triton is there with CUDA builds of torch only

            if newest.serves(self.fields, chunk, positions):
                hole = self.hole if self.vacant else None
                return newest.write(self.fields, self.positions, chunk, positions, self.starts, self.ends, hole)
        index = self.hole if self.vacant else self._flat(self.ends)
        for name, x in chunk.items():
            self.fields[name].index_copy_(0, index, x.flatten(0, 2))
        positions = positions.to(self.positions.device, torch.int32)[:, None]
        positions = positions.expand(*self.shape, *positions.shape[2:])
        self.positions.index_copy_(0, index, positions.flatten(0, 2))
        if not self.vacant:
            self._advance()
        return index

    def count(self, change: int) -> None:
        """Every segment holds so many entries more."""
        self._held += change
        self._lengths = None if self.uniform else self._lengths + change

    def _flat(self, place: torch.Tensor) -> torch.Tensor:
        """Where `place` `(batch, kv_heads)` of each segment is in the flat tensors, `(segments,)`."""
        return (self.starts + place).flatten()

    def _merge(self, new: int, counts: torch.Tensor, skip: torch.Tensor) -> Callable:
        """A function (flat, chunk) -> flat without room that puts each segment's new entries behind its old ones."""
        if self.uniform and bool((counts == new).all()):
            return lambda flat, chunk: torch.cat([self.rectangle(flat), chunk], dim=2).flatten(0, 2)
        source = self._plan(sources, self.lengths, self.capacity, counts, skip, new)
        return lambda flat, chunk: take(torch.cat([flat, chunk.flatten(0, 2)]), source)

    def reserve(self, room: int) -> None:
        """Make room for so many entries more in every segment, and no other, which copies those there are."""
        extent, capacity = self.extent, self.extent + room
        if self.vacant and bool((capacity == self.capacity).all()):
            return
        hole = self.hole.view(self.shape) - self.starts if self.vacant else None

        def empty(flat):  # a weight of 0 does not hide what is not a number
            return -1 if flat is self.positions else 0

        if self.uniform:

            def wider(flat):  # in one operation
                beyond = [0, 0] * (flat.ndim - 1) + [0, room]
                return F.pad(self.rectangle(flat), beyond, value=empty(flat)).flatten(0, 2)
        else:
            old, there = (self._plan(places, extent, size) for size in (self.capacity, capacity))
            total = int(capacity.sum())

            def wider(flat):
                target = flat.new_full((total, *flat.shape[1:]), empty(flat))
                return target.index_copy_(0, there, take(flat, old))

        self._change(wider)
        self._resize(self.lengths, capacity)
        if hole is not None:
            self.hole = self._flat(hole)

    def set_last(self, name: str, values: torch.Tensor) -> None:
        """Set `state[name]` of the entries appended last, `(batch, kv_heads, 1, ...)`, where segments are equal."""
        flat = self.state[name]
        if self._last is None:
            self._slots(flat, self._held - 1, 1).copy_(values)
        else:
            flat.index_copy_(0, self._last, values.flatten(0, 2))

    def put(self, flats: dict[str, torch.Tensor], name: str, rectangle: torch.Tensor) -> None:
        """Set `flats[name]`, of `fields` or `state`, from a rectangle: in place if its form is as before."""
        flat = flats.get(name)
        if flat is None or flat.shape[1:] != rectangle.shape[3:] or flat.dtype != rectangle.dtype:
            self._ahead = 0
            self._moved()
            flat = flats[name] = rectangle.new_zeros(int(self.capacity.sum()), *rectangle.shape[3:])
        if self.uniform:
            target = self.rectangle(flat)
            if target.data_ptr() != rectangle.data_ptr():
                target.copy_(rectangle)
        else:
            flat.index_copy_(0, self._plan(places, self.extent, self.capacity), self._in_use(rectangle))

    def _in_use(self, rectangle: torch.Tensor) -> torch.Tensor:
        """A rectangle's slots in use, in flat order."""
        flat = rectangle.flatten(0, 2)
        if self.uniform:
            return flat
        return take(flat, self._plan(places, self.extent, torch.full_like(self.capacity, rectangle.shape[2])))

    def _change(self, function: Callable) -> None:
        """Replace every flat tensor by `function` of it."""
        self.fields = {name: function(flat) for name, flat in self.fields.items()}
        self.state = {name: function(flat) for name, flat in self.state.items()}
        self.positions = function(self.positions)

    # Evicting

    def keep(self, mask: torch.Tensor, lengths: torch.Tensor) -> None:
        """Evict all but `mask` `(batch, kv_heads, slots)`, which holds `lengths` `(batch, kv_heads)` entries.

        Their memory is freed, and that of the room.
        """
        inside = mask.new_zeros(int(self.capacity.sum()))
        inside.index_copy_(0, self._plan(places, self.extent, self.capacity), self._in_use(mask))
        index = torch.nonzero_static(inside, size=int(lengths.sum())).squeeze(1)
        self._change(lambda flat: take(flat, index))
        self._resize(lengths)
        self.vacant, self.intact, self._room = False, False, 0

    def retire_weakest(self, score: torch.Tensor) -> None:
        """Evict the entry of the lowest score from every segment: the next one appended takes its place.

        Args:
            score: `(batch, kv_heads, slots)`; of equal ones the latest goes. Empty slots may hold anything.
        """
        if score.is_cuda and self.uniform and self.size == 1:
            from kvlib.kernels import weakest as kernel  # Triton is there with CUDA builds of torch only

            self._check_hole()
            self._leave(kernel.retire(score, self.positions, self._size, self.hole))
        else:
            positions = self.position_rectangle()
            if not self.dense:
                score = score.masked_fill(positions < 0, torch.inf)
            self.retire(weakest(score, positions))

    def retire(self, slot: torch.Tensor) -> None:
        """Evict the entry in `slot` `(batch, kv_heads)` of every segment: the next one appended takes its place."""
        self._check_hole()
        index = self._flat(slot)
        self.positions.index_fill_(0, index, -1)
        self._leave(index)

    def _check_hole(self) -> None:
        if self.vacant:
            raise RuntimeError("one entry at a time: nothing was appended since the last one was evicted")

    def _leave(self, index: torch.Tensor) -> None:
        """The entries at `index` `(segments,)` in the flat tensors have gone."""
        self.hole = index if self.hole is None else self.hole.copy_(index)  # for what is recorded it stays in place
        self.still += 1
        self.vacant, self.intact, self.ordered, self._ahead = True, False, False, 0
        self.count(-1)

    def truncate(self, lengths: torch.Tensor) -> None:
        """Forget the newest entries, down to `lengths` `(batch, kv_heads)`, and free them."""
        self.restore_order()
        index = self._plan(places, lengths, self.capacity)
        self._change(lambda flat: take(flat, index))
        self._resize(lengths)
        self._room = 0

    def restore_order(self) -> None:
        """Bring slots into text order, without a hole."""
        if self.ordered:
            return
        positions = self.position_rectangle()
        order = positions.masked_fill(positions < 0, torch.iinfo(torch.int32).max).argsort(dim=-1)

        def sort(flat):
            rest = flat.shape[1:]
            index = order.view(*order.shape, *[1] * len(rest)).expand(*order.shape, *rest)
            return self._in_use(self.rectangle(flat).gather(2, index))

        self._change(sort)
        extent = self.extent
        self.vacant, self.ordered, self._room = False, True, 0
        self._resize(self.lengths, extent)

    def select(self, rows: torch.Tensor) -> None:
        """Keep the batch rows `rows`, a CPU tensor, in that order, repeats allowed; each gets memory of its own."""
        segment, place = self._plan(segments, self.capacity[rows])
        index = starts(self.capacity)[rows].flatten().to(place.device)[segment] + place
        place = None
        if self.vacant:
            place = (self.hole.view(self.capacity.shape) - self.starts)[rows.to(self.hole.device)]
        self._change(lambda flat: take(flat, index))
        self._resize(self.lengths[rows], self.capacity[rows])
        self.hole = None if place is None else self._flat(place)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def weakest(score: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The slot of the lowest score in each segment, `(batch, heads)`; of equal ones that of the latest token.

    Slots may be in any order. Empty ones have to have a score of infinity.
    """
    lowest = score <= score.amin(-1, keepdim=True)
    return positions.where(lowest, -1).argmax(-1)
