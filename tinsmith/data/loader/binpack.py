"""Pieces of text laid into rows of one length, so that next to nothing of a row stays empty.

Rows are filled one after the other, each beginning with the longest piece that is left. Room that
is left is filled exactly by one piece or by two where that is possible, else by the longest that
fits. Where nothing fits and more than 0.5 % of all positions so far would be lost, the end of the
longest piece is cut off to fill the row. The result depends on nothing but the arguments.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ALLOWED_WASTE = 0.005


class BinPacking(NamedTuple):
    """Row r holds the pieces edges[r] to edges[r + 1]; a piece is `lengths` tokens from `starts`
    on. All int64.

    `starts` and `lengths` are (pieces,), `edges` is (rows + 1,).
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_offsets: NDArray[np.int64]


def best_fit(starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> BinPacking:
    """Lay pieces (n,), each of 1 to `room` tokens, into rows of `room` positions."""
    pool = _Pool(starts, lengths, capacity)
    smallest_cut = max(2, capacity // 64)
    pieces: list[tuple[int, int]] = []
    edges = [0]
    wasted = 0
    while pool.present:
        left = capacity
        while left and pool.present:
            chosen = pool.choose(left)
            if chosen:
                pieces += [(pool.take(length), length) for length in chosen]
                left -= sum(chosen)
            elif left >= smallest_cut and wasted + left > ALLOWED_WASTE * capacity * len(edges):
                pieces.append((pool.cut(left), left))
                left = 0
            else:
                break
        wasted += left
        edges.append(len(pieces))
    table = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    return BinPacking(table[:, 0], table[:, 1], np.array(edges, dtype=np.int64))


class _Pool:
    """Pieces by length. Bit n of `present` is set where there is a piece of n tokens, bit room - n
    of `mirrored`."""

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], room: int):
        self.room = room
        self.present = self.mirrored = 0
        self.starts: list[list[int]] = [[] for _ in range(room + 1)]
        for start, length in zip(starts[::-1].tolist(), lengths[::-1].tolist(), strict=True):
            self.put(start, length)

    def put(self, start: int, length: int) -> None:
        self.starts[length].append(start)
        self.present |= 1 << length
        self.mirrored |= 1 << (self.room - length)

    def take(self, length: int) -> int:
        start = self.starts[length].pop()
        if not self.starts[length]:
            self.present &= ~(1 << length)
            self.mirrored &= ~(1 << (self.room - length))
        return start

    def choose(self, left: int) -> tuple[int, ...]:
        """One or two lengths that fill `left` exactly, else the longest that fits, else nothing."""
        if left < self.room:
            if self.present >> left & 1:
                return (left,)
            pairs = self.present & (self.mirrored >> (self.room - left))
            if left % 2 == 0 and len(self.starts[left // 2]) == 1:
                pairs &= ~(1 << (left // 2))
            if pairs:
                longer = pairs.bit_length() - 1
                return (longer, left - longer)
        fitting = self.present & ((1 << (left + 1)) - 1)
        return (fitting.bit_length() - 1,) if fitting else ()

    def cut(self, length: int) -> int:
        """Where the last `length` tokens of the longest piece start; the rest of it stays."""
        longest = self.present.bit_length() - 1
        start = self.take(longest)
        self.put(start, longest - length)
        return start + longest - length
