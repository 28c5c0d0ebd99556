"""KV caches: `KVCache` holds every token of a row, `RotatingKVCache` the last `window` ones.

Both hold any number of tensors per token (keys and values, or a latent and its rotary key) for rows
of different lengths. `RowState` tracks the length of each row and where its current document
begins. A document is a run of one segment id, and only the current one can be attended to, so these
two numbers per row are enough for packed documents.

Legend: B rows, T tokens of this call, S keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.attention.span import INF, Span
from tinsmith.nn.contract import CacheFull, CannotTruncate


class SlotPositions(NamedTuple):
    """Positions of the tokens of one call in their rows, which may begin in earlier calls."""

    cache_position_BT: Tensor
    """Position in the row, without padding. A padding token has that of the token before it."""
    start_BT: Tensor
    """Position of the first token of the same document."""
    valid_BT: Tensor | None
    """False for padding. None: there is no padding."""


class RowState:
    """Lengths and current documents of a batch of rows."""

    def __init__(self, batch_size: int, device: torch.device):
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.document_starts = torch.zeros_like(self.lengths)
        self.document_ids = torch.zeros_like(self.lengths)
        self.max_length = 0
        """The largest length, known without reading the device."""
        self.is_uniform = True
        """True if all rows have the same length and one document, so that causality is the only
        mask.
        """

    def append_positions(
        self, count: int, segments_BT: Tensor | None, capacity: int
    ) -> SlotPositions:
        """Append `count` tokens to every row and return their positions.

        Padding (-1 in `segments_BT`) is not appended. Raise CacheFull, and change nothing, if a row
        would exceed `capacity` tokens.
        """
        if segments_BT is None or not count:
            positions_BT = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
            self.advance(count, capacity)
            starts_BT = self.document_starts[:, None].expand_as(positions_BT)
            return SlotPositions(positions_BT, starts_BT, None)
        valid_BT = segments_BT >= 0
        added = valid_BT.sum(1)
        self._check_capacity(self.max_length + count, self.lengths + added, capacity)
        positions = self._positions(segments_BT, valid_BT)
        newest_B1 = last_valid_index(valid_BT)[:, -1:]
        has_valid = newest_B1[:, 0] >= 0
        ids = segments_BT.gather(1, newest_B1.clamp(min=0))[:, 0]
        starts = positions.start_BT.gather(1, newest_B1.clamp(min=0))[:, 0]
        self.document_ids = ids.where(has_valid, self.document_ids)
        self.document_starts = starts.where(has_valid, self.document_starts)
        self.lengths = self.lengths + added
        self._refresh()
        return positions

    def advance(self, count: int, capacity: int) -> None:
        """Append `count` tokens of its current document to every row, or raise CacheFull."""
        lengths = self.lengths + count
        self._check_capacity(self.max_length + count, lengths, capacity)
        self.lengths, self.max_length = lengths, self.max_length + count

    def _check_capacity(self, bound: int, lengths: Tensor, capacity: int) -> None:
        """Raise CacheFull if a length exceeds the capacity; `bound` is at least the largest one."""
        if bound > capacity and len(lengths) and int(lengths.max()) > capacity:
            sizes = f"a row of {int(lengths.max())} tokens, a cache with room for {capacity}"
            raise CacheFull(f"{sizes}: make it larger, or the row shorter")

    def _positions(self, segments_BT: Tensor, valid_BT: Tensor) -> SlotPositions:
        """Return the positions of new tokens. The last document of a row may continue."""
        previous_BT = torch.cat(
            (torch.full_like(segments_BT[:, :1], -1), last_valid_index(valid_BT)[:, :-1]), 1
        )
        previous_ids_BT = segments_BT.gather(1, previous_BT.clamp(min=0)).where(
            previous_BT >= 0, self.document_ids[:, None]
        )
        is_first_of_row = (previous_BT < 0) & (self.lengths[:, None] == 0)
        is_start = valid_BT & ((segments_BT != previous_ids_BT) | is_first_of_row)
        positions_BT = self.lengths[:, None] + valid_BT.cumsum(1) - 1
        starts_BT = positions_BT.where(is_start, self.document_starts[:, None]).cummax(1).values
        return SlotPositions(positions_BT, starts_BT, valid_BT)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if a row would lose its whole current document, because the start of
        the one before is not stored.
        """
        if bool((lengths > self.lengths).any()) or bool((lengths < 0).any()):
            raise ValueError(
                f"cannot truncate rows of {self.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        loses_document = (
            (lengths <= self.document_starts)
            & (self.document_starts > 0)
            & (lengths < self.lengths)
        )
        if bool(loses_document.any()):
            raise CannotTruncate(
                "a row would lose its whole current document, and earlier ones are not stored: "
                "process the row again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Keep the first `lengths[b]` tokens of row b."""
        self.lengths = lengths.clone()
        self._refresh()

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.lengths, self.document_starts, self.document_ids = (
            self.lengths[rows],
            self.document_starts[rows],
            self.document_ids[rows],
        )
        self._refresh()

    def join(self, other: "RowState") -> None:
        """Append the rows of `other`."""
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.document_starts = torch.cat((self.document_starts, other.document_starts))
        self.document_ids = torch.cat((self.document_ids, other.document_ids))
        self._refresh()

    def _refresh(self) -> None:
        """Recompute the attributes that are kept off the device."""
        lengths = self.lengths.tolist()
        self.max_length = max(lengths, default=0)
        self.is_uniform = len(set(lengths)) <= 1 and not bool(self.document_starts.any())


class StoredKeys:
    """Tensors (B, slots, *shape) and the state of their rows; base of `KVCache` and
    `RotatingKVCache`.
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
        """(B,) tokens appended per row."""
        return self.row_state.lengths

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.tensors = [tensor[rows] for tensor in self.tensors]
        self.row_state.select(rows)

    def nbytes(self) -> int:
        """Return rows * slots * numbers per token * bytes per number."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def write(self, slot_BT: Tensor, mask_BT: Tensor | None, new: tuple[Tensor, ...]) -> None:
        """Store new (B, T, *shape) tensors in slots where `mask_BT` is True (None: everywhere)."""
        if mask_BT is None:
            row = torch.arange(len(slot_BT), device=slot_BT.device)[:, None]
            for tensor, added in zip(self.tensors, new, strict=True):
                tensor[row, slot_BT] = added.to(tensor.dtype)
            return
        row, column = mask_BT.nonzero(as_tuple=True)
        for tensor, added in zip(self.tensors, new, strict=True):
            tensor[row, slot_BT[row, column]] = added[row, column].to(tensor.dtype)


class KVCache(StoredKeys):
    """Holds every token of a row, up to a capacity."""

    def append(self, segments_BT: Tensor | None, *new: Tensor) -> tuple[list[Tensor], Span]:
        """Append (B, T, *shape) tensors. Return those of all stored tokens, (B, S, *shape), and the
        span of the new ones.
        """
        begin, count = self.row_state.max_length, new[0].shape[1]
        if segments_BT is None and self.row_state.is_uniform:
            self.row_state.advance(count, self.slots)
            for tensor, added in zip(self.tensors, new, strict=True):
                tensor[:, begin : begin + count] = added
            return [tensor[:, : begin + count] for tensor in self.tensors], Span()
        positions = self.row_state.append_positions(count, segments_BT, self.slots)
        self.write(positions.cache_position_BT, positions.valid_BT, new)
        used = max(self.row_state.max_length, 1)
        return [tensor[:, :used] for tensor in self.tensors], Span(*span_bounds(positions))

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise if `truncate` would. A mixer with several caches checks all of them before it
        truncates the first.
        """
        self.row_state.check_truncate(lengths.to(self.lengths.device, torch.long))

    def truncate(self, lengths: Tensor) -> None:
        """Remove the newest tokens, or raise CannotTruncate and change nothing."""
        self.check_truncate(lengths)
        self.row_state.truncate(lengths.to(self.lengths.device, torch.long))

    def join(self, other: "KVCache") -> None:
        """Append the rows of `other`; the larger capacity is kept."""
        slots = max(self.slots, other.slots)
        pairs = zip(_pad_slots(self.tensors, slots), _pad_slots(other.tensors, slots), strict=True)
        self.tensors = [torch.cat(pair) for pair in pairs]
        self.slots = slots
        self.row_state.join(other.row_state)


class RotatingKVCache(KVCache):
    """Holds the last `window` tokens of a row: the token at position p is in slot p mod window.

    If the capacity is smaller than the window, no token is ever dropped. Until a token is dropped,
    it behaves like `KVCache`.
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
        """Append (B, T, *shape) tensors. Return those that can be attended to, (B, S, *shape), and
        the span of the new ones.

        Several new tokens are returned after the stored ones, all in order of positions. Their
        spans are then intervals of keys, so that no (T, S) mask is needed.
        """
        count = new[0].shape[1]
        if self.row_state.max_length + count <= self.slots:
            return super().append(segments_BT, *new)
        shift = self.slots - self.row_state.lengths[:, None]
        stored = self._in_order() if count != 1 else []
        positions = self.row_state.append_positions(count, segments_BT, self.capacity)
        is_kept = positions.cache_position_BT >= self.row_state.lengths[:, None] - self.slots
        if positions.valid_BT is not None:
            is_kept = is_kept & positions.valid_BT
        slot_BT = positions.cache_position_BT % self.slots
        if count == 1:
            self.write(slot_BT, is_kept if positions.valid_BT is not None else None, new)
            low, high = span_bounds(positions, self.slots)
            return self.tensors, Span(low, high, self._slot_positions(self.row_state.lengths))
        self.write(slot_BT, is_kept, new)
        tokens = new if positions.valid_BT is None else _padding_last(positions.valid_BT, new)
        keys = [
            torch.cat((old, added.to(old.dtype)), 1)
            for old, added in zip(stored, tokens, strict=True)
        ]
        low, high = span_bounds(positions, self.slots)
        return keys, Span(low + shift, high + shift)

    def _in_order(self) -> list[Tensor]:
        """Return the stored tokens (B, slots, *shape), newest last. Shorter rows have arbitrary
        values before theirs.
        """
        slot = torch.arange(self.slots, device=self.lengths.device)
        row = torch.arange(len(self.lengths), device=slot.device)[:, None]
        return [tensor[row, (self.lengths[:, None] + slot) % self.slots] for tensor in self.tensors]

    def _slot_positions(self, lengths: Tensor) -> Tensor:
        """Return (B, slots): the position of the token in each slot, -1 if it is empty."""
        slot = torch.arange(self.slots, device=lengths.device)
        newest = lengths[:, None] - 1
        position = newest - (newest - slot) % self.slots
        return position.where(position >= 0, -1)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if a shorter row has already dropped tokens."""
        super().check_truncate(lengths)
        is_shorter = lengths.to(self.lengths.device) < self.lengths
        if bool((is_shorter & (self.lengths > self.slots)).any()):
            raise CannotTruncate(
                f"a window of {self.slots} tokens has already dropped earlier ones: "
                "process the row again from its start"
            )

    def join(self, other: "RotatingKVCache") -> None:
        """Append the rows of `other`, which has the same window; the larger capacity is kept.

        The numbers of slots differ only if one capacity is smaller than the window. Then its tokens
        are in order, and keep their slots.
        """
        super().join(other)
        self.capacity = max(self.capacity, other.capacity)


def _padding_last(valid_BT: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move the padding of every row behind its tokens, which keep their order."""
    order_BT = (~valid_BT).int().argsort(dim=1, stable=True)
    row = torch.arange(len(order_BT), device=order_BT.device)[:, None]
    return tuple(tensor[row, order_BT] for tensor in tensors)


def last_valid_index(valid_BT: Tensor) -> Tensor:
    """Return (B, T): the index of the newest valid token at or before t, -1 if there is none."""
    index = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    return index.where(valid_BT, -1).cummax(1).values


def span_bounds(positions: SlotPositions, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Return low and high of the span of each token: from the start of its document, or `window`
    tokens back, up to itself. Padding attends to all keys.
    """
    low, high = positions.start_BT, positions.cache_position_BT
    if window is not None:
        low = torch.maximum(low, high - window + 1)
    if positions.valid_BT is not None:
        low, high = low.where(positions.valid_BT, -INF), high.where(positions.valid_BT, INF)
    return low, high


def _pad_slots(tensors: list[Tensor], slots: int) -> list[Tensor]:
    """Return the tensors with zeros appended up to `slots` slots."""
    return [
        torch.cat(
            (tensor, tensor.new_zeros(len(tensor), slots - tensor.shape[1], *tensor.shape[2:])), 1
        )
        for tensor in tensors
    ]
