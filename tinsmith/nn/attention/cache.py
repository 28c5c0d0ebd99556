"""The bricks that mixers' caches are made of: `Append` remembers every token, `Ring` the last
`window` of them.

Both hold any number of tensors per token (keys and values; a latent and its rotary key; ...) in
rows that may differ in length. The bookkeeping of rows is shared (`Rows`): where a row's next token
goes and where its current document began. A document is a run of one segment id; only the current
one can still be attended to, so two numbers per row are all that packed documents cost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.attention.span import INF, Span
from tinsmith.nn.contract import CacheFull, CannotTruncate


class SlotPositions(NamedTuple):
    """Where the tokens of one call stand in their rows."""

    cache_position_BT: Tensor
    start_BT: Tensor
    """Place of the first token of the same document."""
    valid_BT: Tensor | None
    """False for padding; None: every token is real."""


class RowState:
    """Lengths and documents of a batch of rows."""

    def __init__(self, batch_size: int, device: torch.device):
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.document_starts = torch.zeros_like(self.lengths)
        self.document_ids = torch.zeros_like(self.lengths)
        self.max_length = 0
        """The largest length, known without asking the device."""
        self.is_uniform = True
        """All rows have the same length and hold one document: no mask is needed beyond
        causality.
        """

    def append_positions(
        self, count: int, segments_BT: Tensor | None, capacity: int
    ) -> SlotPositions:
        """Take in `count` tokens a row; -1 in `segments_BT` is padding and takes no place.

        Raises CacheFull, and changes nothing, where a row would hold more than `capacity` tokens.
        """
        if segments_BT is None or not count:
            place = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
            self.advance(count, capacity)
            return SlotPositions(place, self.document_starts[:, None].expand_as(place), None)
        real = segments_BT >= 0
        added = real.sum(1)
        self._make_room(self.max_length + count, self.lengths + added, capacity)
        places = SlotPositions(
            self.lengths[:, None] + real.cumsum(1) - 1, self._starts(segments_BT, real), real
        )
        newest = last_valid_index(real)[:, -1:]
        some = newest[:, 0] >= 0
        self.document_ids = segments_BT.gather(1, newest.clamp(min=0))[:, 0].where(
            some, self.document_ids
        )
        self.document_starts = places.start_BT.gather(1, newest.clamp(min=0))[:, 0].where(
            some, self.document_starts
        )
        self.lengths = self.lengths + added
        self.refresh()
        return places

    def advance(self, count: int, capacity: int) -> None:
        """Every row goes on by `count` tokens of its document; CacheFull as in `place`."""
        lengths = self.lengths + count
        self._make_room(self.max_length + count, lengths, capacity)
        self.lengths, self.max_length = lengths, self.max_length + count

    def _make_room(self, bound: int, lengths: Tensor, capacity: int) -> None:
        if bound > capacity and len(lengths) and int(lengths.max()) > capacity:
            reported = f"a row of {int(lengths.max())} tokens, a cache with room for {capacity}"
            raise CacheFull(f"{reported}: make it larger, or the row shorter")

    def _starts(self, segments_BT: Tensor, real_BT: Tensor) -> Tensor:
        """(B, T): where the document of each token began; a document goes on from call to call."""
        before = torch.cat(
            (torch.full_like(segments_BT[:, :1], -1), last_valid_index(real_BT)[:, :-1]), 1
        )
        known = segments_BT.gather(1, before.clamp(min=0)).where(
            before >= 0, self.document_ids[:, None]
        )
        fresh = real_BT & ((segments_BT != known) | ((before < 0) & (self.lengths[:, None] == 0)))
        place = self.lengths[:, None] + real_BT.cumsum(1) - 1
        return place.where(fresh, self.document_starts[:, None]).cummax(1).values

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise where row b cannot keep just its first `lengths[b]` tokens, some of its current
        document among them.
        """
        if bool((lengths > self.lengths).any()) or bool((lengths < 0).any()):
            raise ValueError(
                f"cannot truncate rows of {self.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        lost = (
            (lengths <= self.document_starts)
            & (self.document_starts > 0)
            & (lengths < self.lengths)
        )
        if bool(lost.any()):
            raise CannotTruncate(
                "a row would lose its whole current document, and earlier ones are forgotten: "
                "take it in again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Row b keeps its first `lengths[b]` tokens."""
        self.lengths = lengths.clone()
        self.refresh()

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.lengths, self.document_starts, self.document_ids = (
            self.lengths[rows],
            self.document_starts[rows],
            self.document_ids[rows],
        )
        self.refresh()

    def join(self, other: "RowState") -> None:
        """Append the rows of `other`."""
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.document_starts = torch.cat((self.document_starts, other.document_starts))
        self.document_ids = torch.cat((self.document_ids, other.document_ids))
        self.refresh()

    def refresh(self) -> None:
        """Recompute what is known without asking the device."""
        lengths = self.lengths.tolist()
        self.max_length = max(lengths, default=0)
        self.is_uniform = len(set(lengths)) <= 1 and not bool(self.document_starts.any())


class StoredKeys:
    """Tensors of (rows, slots, *shape) with the bookkeeping of their rows; base of `Append` and
    `Ring`.
    """

    def __init__(
        self,
        batch_size: int,
        slots: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.slots = slots
        self.tensors = [
            torch.zeros(batch_size, slots, *shape, dtype=dtype, device=device) for shape in shapes
        ]
        self.row_state = RowState(batch_size, device)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens absorbed per row."""
        return self.row_state.lengths

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.tensors = [tensor[rows] for tensor in self.tensors]
        self.row_state.select(rows)

    def nbytes(self) -> int:
        """rows * slots * numbers per token * bytes per number."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def write(self, slot_BT: Tensor, mask_BT: Tensor | None, new: tuple[Tensor, ...]) -> None:
        """Store new (B, T, *shape) tensors at (row, slot) where `keep_BT` (None: everywhere)."""
        if mask_BT is None:
            row = torch.arange(len(slot_BT), device=slot_BT.device)[:, None]
            for tensor, fresh in zip(self.tensors, new, strict=True):
                tensor[row, slot_BT] = fresh.to(tensor.dtype)
            return
        row, column = mask_BT.nonzero(as_tuple=True)
        for tensor, fresh in zip(self.tensors, new, strict=True):
            tensor[row, slot_BT[row, column]] = fresh[row, column].to(tensor.dtype)

    def _write_even(self, begin: int, new: tuple[Tensor, ...]) -> int:
        end = begin + new[0].shape[1]
        for tensor, fresh in zip(self.tensors, new, strict=True):
            tensor[:, begin:end] = fresh
        return end


class KVCache(StoredKeys):
    """Remembers every token, up to `capacity` of them."""

    def append(self, segments_BT: Tensor | None, *new: Tensor) -> tuple[list[Tensor], Span]:
        """Take in (B, T, *shape) tensors; return all tokens held, (B, S, *shape) each, and what
        the new ones see.
        """
        before, count = self.row_state.max_length, new[0].shape[1]
        if segments_BT is None and self.row_state.is_uniform:
            self.row_state.advance(count, self.slots)
            end = self._write_even(before, new)
            return [tensor[:, :end] for tensor in self.tensors], Span()
        places = self.row_state.append_positions(count, segments_BT, self.slots)
        self.write(places.cache_position_BT, places.valid_BT, new)
        used = max(self.row_state.max_length, 1)
        return [tensor[:, :used] for tensor in self.tensors], span_from_positions(places, None)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise where `truncate` cannot do it; several caches that go together ask all of them
        first.
        """
        self.row_state.check_truncate(lengths.to(self.lengths.device, torch.long))

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens, or raise and change nothing."""
        self.check_truncate(lengths)
        self.row_state.truncate(lengths.to(self.lengths.device, torch.long))

    def join(self, other: "KVCache") -> None:
        """Append the rows of `other`; the larger capacity is kept."""
        slots = max(self.slots, other.slots)
        mine, theirs = (_widened(cache.tensors, slots) for cache in (self, other))
        self.tensors = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
        self.slots = slots
        self.row_state.join(other.row_state)


class RotatingKVCache(KVCache):
    """Remembers the last `window` tokens; the token at place p is in slot p mod window.

    With room for less than `window` tokens it never drops any. Until it does, it is an `Append`.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        window: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(batch_size, min(window, capacity), shapes, dtype, device)
        self.capacity = capacity

    def append(self, segments_BT: Tensor | None, *new: Tensor) -> tuple[list[Tensor], Span]:
        """Take in (B, T, *shape) tensors; return what they may see, (B, S, *shape) each, and how
        far. Several new tokens come after those held, all in order of places: what each sees is an
        interval, which costs its own length and no mask of (T, S).
        """
        count = new[0].shape[1]
        if self.row_state.max_length + count <= self.slots:
            return super().append(segments_BT, *new)
        shift = self.slots - self.row_state.lengths[:, None]
        held = self._in_order() if count != 1 else []
        places = self.row_state.append_positions(count, segments_BT, self.capacity)
        keep = places.cache_position_BT >= self.row_state.lengths[:, None] - self.slots
        if places.valid_BT is not None:
            keep = keep & places.valid_BT
        slot_BT = places.cache_position_BT % self.slots
        if count == 1:
            self.write(slot_BT, keep if places.valid_BT is not None else None, new)
            return self.tensors, span_from_positions(
                places, self.slots, self._places(self.row_state.lengths)
            )
        self.write(slot_BT, keep, new)
        tokens = new if places.valid_BT is None else _padding_last(places.valid_BT, new)
        seen = [
            torch.cat((old, fresh.to(old.dtype)), 1)
            for old, fresh in zip(held, tokens, strict=True)
        ]
        low, high = span_bounds(places, self.slots)
        return seen, Span(low + shift, high + shift)

    def _in_order(self) -> list[Tensor]:
        """(B, slots, *shape) each: what is held, the newest last; anything where a row holds
        less.
        """
        slot = torch.arange(self.slots, device=self.lengths.device)
        row = torch.arange(len(self.lengths), device=slot.device)[:, None]
        return [tensor[row, (self.lengths[:, None] + slot) % self.slots] for tensor in self.tensors]

    def _places(self, lengths: Tensor) -> Tensor:
        """(B, slots): the place of the token in each slot, below 0 where there is none."""
        slot = torch.arange(self.slots, device=lengths.device)
        newest = lengths[:, None] - 1
        place = newest - (newest - slot) % self.slots
        return place.where(place >= 0, -1)

    def check_truncate(self, lengths: Tensor) -> None:
        """It is possible while nothing older has been overwritten."""
        super().check_truncate(lengths)
        shorter = lengths.to(self.lengths.device) < self.lengths
        if bool((shorter & (self.lengths > self.slots)).any()):
            raise CannotTruncate(
                f"a window of {self.slots} tokens has already dropped what came before: "
                "take the row in again from its start"
            )

    def join(self, other: "RotatingKVCache") -> None:
        """Append the rows of `other`, which has the same window; the larger capacity is kept.

        Slots only differ where one has not room for a window: its tokens then stand in order, and
        still do in more slots.
        """
        super().join(other)
        self.capacity = max(self.capacity, other.capacity)


def _padding_last(real_BT: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The real tokens of every row from its first column on, in their order."""
    order_BT = (~real_BT).int().argsort(dim=1, stable=True)
    row = torch.arange(len(order_BT), device=order_BT.device)[:, None]
    return tuple(tensor[row, order_BT] for tensor in tensors)


def last_valid_index(valid_BT: Tensor) -> Tensor:
    """(B, T): index of the newest real token at or before t, -1 where there is none."""
    index = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    return index.where(valid_BT, -1).cummax(1).values


def span_from_positions(
    positions: SlotPositions, window: int | None, key_positions_BS: Tensor | None = None
) -> Span:
    """What each token sees, as `limits` says."""
    return Span(*span_bounds(positions, window), key_positions_BS)


def span_bounds(positions: SlotPositions, window: int | None) -> tuple[Tensor, Tensor]:
    """From the start of the document, or `window` tokens back, up to the token itself; padding
    sees anything.
    """
    low, high = positions.start_BT, positions.cache_position_BT
    if window is not None:
        low = torch.maximum(low, high - window + 1)
    if positions.valid_BT is not None:
        low, high = low.where(positions.valid_BT, -INF), high.where(positions.valid_BT, INF)
    return low, high


def _widened(tensors: list[Tensor], slots: int) -> list[Tensor]:
    widened = []
    for tensor in tensors:
        room = tensor.new_zeros(len(tensor), slots - tensor.shape[1], *tensor.shape[2:])
        widened.append(torch.cat((tensor, room), 1))
    return widened
