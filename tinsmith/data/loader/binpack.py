"""Bin packing: chats, or pieces of them, are packed into rows of equal length with little padding.

Rows are filled one after the other. Each starts with the longest piece that is left. The rest of
the row is filled exactly by one or two pieces if possible, or else by the longest piece that fits.
No piece is cut, because the end of a chat without its question teaches a wrong answer. The packing
is deterministic.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class BinPacking(NamedTuple):
    """Row r contains the pieces row_offsets[r] to row_offsets[r + 1]. Piece p is the tokens from
    starts[p] to starts[p] + lengths[p] of the stream.

    `starts` and `lengths` are (pieces,) int64, `row_offsets` is (rows + 1,) int64.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_offsets: NDArray[np.int64]


def best_fit(starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> BinPacking:
    """Pack pieces (n,), each of 1 to `capacity` tokens, into rows of `capacity` positions."""
    pool = _Pool(starts, lengths, capacity)
    pieces: list[tuple[int, int]] = []
    row_offsets = [0]
    while pool.lengths:
        free = capacity
        while selected := pool.select_lengths(free):
            pieces += [(pool.pop(length), length) for length in selected]
            free -= sum(selected)
        row_offsets.append(len(pieces))
    table = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    return BinPacking(table[:, 0], table[:, 1], np.array(row_offsets, dtype=np.int64))


class _Pool:
    """Unpacked pieces by length, with bit sets of the lengths that occur: bit n of `lengths`, and
    bit capacity - n of `mirrored_lengths`, are set if there is a piece of n tokens.
    """

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int):
        self.capacity = capacity
        self.lengths = self.mirrored_lengths = 0
        self.starts: list[list[int]] = [[] for _ in range(capacity + 1)]
        for start, length in zip(starts[::-1].tolist(), lengths[::-1].tolist(), strict=True):
            self.push(start, length)

    def push(self, start: int, length: int) -> None:
        self.starts[length].append(start)
        self.lengths |= 1 << length
        self.mirrored_lengths |= 1 << (self.capacity - length)

    def pop(self, length: int) -> int:
        """Remove a piece of this length and return its start."""
        start = self.starts[length].pop()
        if not self.starts[length]:
            self.lengths &= ~(1 << length)
            self.mirrored_lengths &= ~(1 << (self.capacity - length))
        return start

    def select_lengths(self, free: int) -> tuple[int, ...]:
        """Return one or two lengths that fill `free` positions exactly, or else the longest that
        fits, or else ().
        """
        if free < self.capacity:
            if self.lengths >> free & 1:
                return (free,)
            pairs = self.lengths & (self.mirrored_lengths >> (self.capacity - free))
            if free % 2 == 0 and len(self.starts[free // 2]) == 1:
                pairs &= ~(1 << (free // 2))
            if pairs:
                longer = pairs.bit_length() - 1
                return (longer, free - longer)
        fitting = self.lengths & ((1 << (free + 1)) - 1)
        return (fitting.bit_length() - 1,) if fitting else ()
