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

from tinsmith.nn.contract import CacheFull, CannotRewind
from tinsmith.nn.parts.attend import FAR, Reach


class Places(NamedTuple):
    """Where the tokens of one call stand in their rows."""

    place_BT: Tensor
    start_BT: Tensor
    """Place of the first token of the same document."""
    real_BT: Tensor | None
    """False for padding; None: every token is real."""


class Rows:
    """Lengths and documents of a batch of rows."""

    def __init__(self, rows: int, device: torch.device):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.starts = torch.zeros_like(self.lengths)
        self.documents = torch.zeros_like(self.lengths)
        self.longest = 0
        """The largest length, known without asking the device."""
        self.even = True
        """All rows have the same length and hold one document: no mask is needed beyond
        causality.
        """

    def place(self, count: int, segments_BT: Tensor | None, capacity: int) -> Places:
        """Take in `count` tokens a row; -1 in `segments_BT` is padding and takes no place.

        Raises CacheFull, and changes nothing, where a row would hold more than `capacity` tokens.
        """
        if segments_BT is None:
            place = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
            self.advance(count, capacity)
            return Places(place, self.starts[:, None].expand_as(place), None)
        real = segments_BT >= 0
        added = real.sum(1)
        self._make_room(self.longest + count, self.lengths + added, capacity)
        places = Places(
            self.lengths[:, None] + real.cumsum(1) - 1, self._starts(segments_BT, real), real
        )
        newest = latest(real)[:, -1:]
        some = newest[:, 0] >= 0
        self.documents = segments_BT.gather(1, newest.clamp(min=0))[:, 0].where(
            some, self.documents
        )
        self.starts = places.start_BT.gather(1, newest.clamp(min=0))[:, 0].where(some, self.starts)
        self.lengths = self.lengths + added
        self.refresh()
        return places

    def advance(self, count: int, capacity: int) -> None:
        """Every row goes on by `count` tokens of its document; CacheFull as in `place`."""
        lengths = self.lengths + count
        self._make_room(self.longest + count, lengths, capacity)
        self.lengths, self.longest = lengths, self.longest + count

    def _make_room(self, bound: int, lengths: Tensor, capacity: int) -> None:
        if bound > capacity and len(lengths) and int(lengths.max()) > capacity:
            told = f"a row of {int(lengths.max())} tokens, a cache with room for {capacity}"
            raise CacheFull(f"{told}: make it larger, or the row shorter")

    def _starts(self, segments_BT: Tensor, real_BT: Tensor) -> Tensor:
        """(B, T): where the document of each token began; a document goes on from call to call."""
        before = torch.cat((torch.full_like(segments_BT[:, :1], -1), latest(real_BT)[:, :-1]), 1)
        known = segments_BT.gather(1, before.clamp(min=0)).where(
            before >= 0, self.documents[:, None]
        )
        fresh = real_BT & ((segments_BT != known) | ((before < 0) & (self.lengths[:, None] == 0)))
        place = self.lengths[:, None] + real_BT.cumsum(1) - 1
        return place.where(fresh, self.starts[:, None]).cummax(1).values

    def check_rewind(self, lengths: Tensor) -> None:
        """Raise where row b cannot keep just its first `lengths[b]` tokens, some of its current
        document among them.
        """
        if bool((lengths > self.lengths).any()) or bool((lengths < 0).any()):
            raise ValueError(
                f"cannot truncate rows of {self.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        lost = (lengths <= self.starts) & (self.starts > 0) & (lengths < self.lengths)
        if bool(lost.any()):
            raise CannotRewind(
                "a row would lose its whole current document, and earlier ones are forgotten: "
                "take it in again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Row b keeps its first `lengths[b]` tokens."""
        self.lengths = lengths.clone()
        self.refresh()

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.lengths, self.starts, self.documents = (
            self.lengths[rows],
            self.starts[rows],
            self.documents[rows],
        )
        self.refresh()

    def join(self, other: "Rows") -> None:
        """Append the rows of `other`."""
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.starts = torch.cat((self.starts, other.starts))
        self.documents = torch.cat((self.documents, other.documents))
        self.refresh()

    def refresh(self) -> None:
        """Recompute what is known without asking the device."""
        lengths = self.lengths.tolist()
        self.longest = max(lengths, default=0)
        self.even = len(set(lengths)) <= 1 and not bool(self.starts.any())


class Stored:
    """Tensors of (rows, slots, *shape) with the bookkeeping of their rows; base of `Append` and
    `Ring`.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.slots = slots
        self.tensors = [
            torch.zeros(rows, slots, *shape, dtype=dtype, device=device) for shape in shapes
        ]
        self.rows = Rows(rows, device)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens absorbed per row."""
        return self.rows.lengths

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.tensors = [tensor[rows] for tensor in self.tensors]
        self.rows.select(rows)

    def nbytes(self) -> int:
        """rows * slots * numbers per token * bytes per number."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def write(self, slot_BT: Tensor, keep_BT: Tensor | None, new: tuple[Tensor, ...]) -> None:
        """Store new (B, T, *shape) tensors at (row, slot) where `keep_BT` (None: everywhere)."""
        if keep_BT is None:
            row = torch.arange(len(slot_BT), device=slot_BT.device)[:, None]
            for tensor, fresh in zip(self.tensors, new, strict=True):
                tensor[row, slot_BT] = fresh.to(tensor.dtype)
            return
        row, column = keep_BT.nonzero(as_tuple=True)
        for tensor, fresh in zip(self.tensors, new, strict=True):
            tensor[row, slot_BT[row, column]] = fresh[row, column].to(tensor.dtype)

    def _write_even(self, begin: int, new: tuple[Tensor, ...]) -> int:
        end = begin + new[0].shape[1]
        for tensor, fresh in zip(self.tensors, new, strict=True):
            tensor[:, begin:end] = fresh
        return end


class Append(Stored):
    """Remembers every token, up to `capacity` of them."""

    def append(self, segments_BT: Tensor | None, *new: Tensor) -> tuple[list[Tensor], Reach]:
        """Take in (B, T, *shape) tensors; return all tokens held, (B, S, *shape) each, and what
        the new ones see.
        """
        before, count = self.rows.longest, new[0].shape[1]
        if segments_BT is None and self.rows.even:
            self.rows.advance(count, self.slots)
            end = self._write_even(before, new)
            return [tensor[:, :end] for tensor in self.tensors], Reach()
        places = self.rows.place(count, segments_BT, self.slots)
        self.write(places.place_BT, places.real_BT, new)
        used = max(self.rows.longest, 1)
        return [tensor[:, :used] for tensor in self.tensors], interval(places, None)

    def check_rewind(self, lengths: Tensor) -> None:
        """Raise where `truncate` cannot do it; several caches that go together ask all of them
        first.
        """
        self.rows.check_rewind(lengths.to(self.lengths.device, torch.long))

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens, or raise and change nothing."""
        self.check_rewind(lengths)
        self.rows.truncate(lengths.to(self.lengths.device, torch.long))

    def join(self, other: "Append") -> None:
        """Append the rows of `other`; the larger capacity is kept."""
        slots = max(self.slots, other.slots)
        mine, theirs = (_widened(cache.tensors, slots) for cache in (self, other))
        self.tensors = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
        self.slots = slots
        self.rows.join(other.rows)


class Ring(Append):
    """Remembers the last `window` tokens; the token at place p is in slot p mod window.

    With room for less than `window` tokens it never drops any. Until it does, it is an `Append`.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        window: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(rows, min(window, capacity), shapes, dtype, device)
        self.capacity = capacity

    def append(self, segments_BT: Tensor | None, *new: Tensor) -> tuple[list[Tensor], Reach]:
        """Take in (B, T, *shape) tensors; return what they may see, (B, S, *shape) each, and how
        far. Several new tokens come after those held, all in order of places: what each sees is an
        interval, which costs its own length and no mask of (T, S).
        """
        count = new[0].shape[1]
        if self.rows.longest + count <= self.slots:
            return super().append(segments_BT, *new)
        shift = self.slots - self.rows.lengths[:, None]
        held = self._in_order() if count != 1 else []
        places = self.rows.place(count, segments_BT, self.capacity)
        keep = places.place_BT >= self.rows.lengths[:, None] - self.slots
        if places.real_BT is not None:
            keep = keep & places.real_BT
        slot_BT = places.place_BT % self.slots
        if count == 1:
            self.write(slot_BT, keep if places.real_BT is not None else None, new)
            return self.tensors, interval(places, self.slots, self._places(self.rows.lengths))
        self.write(slot_BT, keep, new)
        tokens = new if places.real_BT is None else _padding_last(places.real_BT, new)
        seen = [
            torch.cat((old, fresh.to(old.dtype)), 1)
            for old, fresh in zip(held, tokens, strict=True)
        ]
        low, high = limits(places, self.slots)
        return seen, Reach(low + shift, high + shift)

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

    def check_rewind(self, lengths: Tensor) -> None:
        """It is possible while nothing older has been overwritten."""
        super().check_rewind(lengths)
        shorter = lengths.to(self.lengths.device) < self.lengths
        if bool((shorter & (self.lengths > self.slots)).any()):
            raise CannotRewind(
                f"a window of {self.slots} tokens has already dropped what came before: "
                "take the row in again from its start"
            )

    def join(self, other: "Ring") -> None:
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


def latest(real_BT: Tensor) -> Tensor:
    """(B, T): index of the newest real token at or before t, -1 where there is none."""
    index = torch.arange(real_BT.shape[1], device=real_BT.device)
    return index.where(real_BT, -1).cummax(1).values


def interval(places: Places, window: int | None, key_places_BS: Tensor | None = None) -> Reach:
    """What each token sees, as `limits` says."""
    return Reach(*limits(places, window), key_places_BS)


def limits(places: Places, window: int | None) -> tuple[Tensor, Tensor]:
    """From the start of the document, or `window` tokens back, up to the token itself; padding
    sees anything.
    """
    low, high = places.start_BT, places.place_BT
    if window is not None:
        low = torch.maximum(low, high - window + 1)
    if places.real_BT is not None:
        low, high = low.where(places.real_BT, -FAR), high.where(places.real_BT, FAR)
    return low, high


def _widened(tensors: list[Tensor], slots: int) -> list[Tensor]:
    widened = []
    for tensor in tensors:
        room = tensor.new_zeros(len(tensor), slots - tensor.shape[1], *tensor.shape[2:])
        widened.append(torch.cat((tensor, room), 1))
    return widened
