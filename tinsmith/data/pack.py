"""Documents and chats laid into rows of `context` positions.

Documents are one stream of tokens, cut every `context` tokens: row i holds the ids x[iC:(i+1)C] and the targets one
further, so that rows share one boundary token and an epoch's rows, side by side, are the stream: nothing is lost and
nothing repeated. Attention never crosses documents, so the last token of a document has no target.

Chats are kept whole (cut on the right where longer than a row) and several share a row: best-fit decreasing, which
puts each example, longest first, into the fullest row that still has room for it.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.batch import Row
from tinsmith.data.shards import Shards


class Packed(Protocol):
    """Rows by number: what a source shuffles."""

    size: int
    """How many rows."""
    positions: int
    """How many of the `size * context` positions hold a token."""
    skipped: int
    """Examples left out because cutting them left nothing to train on."""

    def row(self, place: int) -> Row:
        """Row number `place`, 0 <= place < size."""
        ...


class DocumentRows:
    """Windows of a stream of documents."""

    def __init__(self, shards: Shards, context: int):
        self._shards, self._context = shards, context
        self.positions = shards.tokens_total
        self.size = -(-self.positions // context)
        self.skipped = 0

    def row(self, place: int) -> Row:
        """Window number `place` of the stream; the last one may end in padding."""
        context, shards = self._context, self._shards
        start = place * context
        stop = min(start + context, self.positions)
        used = stop - start
        tokens = shards.tokens(start, min(stop + 1, self.positions))
        begins = np.zeros(used + 1, dtype=bool)
        first, end = np.searchsorted(shards.documents, [start + 1, stop + 1])
        begins[shards.documents[first:end] - start] = True
        targets = np.zeros(used, dtype=np.int64)
        targets[: len(tokens) - 1] = tokens[1:]
        mask = ~begins[1:]
        if stop == self.positions:
            mask[-1] = False
        segments = np.cumsum(begins[:-1])
        return _padded(context, tokens[:used], np.where(mask, targets, 0), mask, segments)


class ChatRows:
    """Whole examples, several to a row."""

    def __init__(self, shards: Shards, context: int):
        assert shards.masked, "chats carry a mask"
        self._shards, self._context = shards, context
        self._lengths = np.minimum(shards.lengths, context)
        usable = _trainable(shards, context)
        self.skipped = int(len(usable) - usable.sum())
        examples = np.flatnonzero(usable)
        bins = best_fit_decreasing(self._lengths[examples], context)
        self._examples, self._edges = examples[bins.items], bins.edges
        self.size = len(bins.edges) - 1
        self.positions = int(self._lengths[examples].sum())

    def row(self, place: int) -> Row:
        """The examples of bin number `place`, side by side."""
        chosen = self._examples[self._edges[place] : self._edges[place + 1]]
        parts = [self._example(int(number)) for number in chosen]
        ids, targets, mask = (np.concatenate(column) for column in zip(*parts, strict=True))
        segments = np.repeat(np.arange(len(chosen)), self._lengths[chosen])
        return _padded(self._context, ids, targets, mask, segments)

    def _example(
        self, number: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        start = int(self._shards.documents[number])
        stop = start + int(self._lengths[number])
        ids = self._shards.tokens(start, stop)
        mask = np.append(self._shards.mask(start + 1, stop), False)
        return ids, np.where(mask, np.append(ids[1:], 0), 0), mask


class Bins(NamedTuple):
    """Bin b holds `items[edges[b]:edges[b + 1]]`; items (n,) and edges (bins + 1,)."""

    items: NDArray[np.int64]
    edges: NDArray[np.int64]


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> Bins:
    """Items of the given lengths (n,), each at most `capacity`, in few bins of `capacity`.

    Equal lengths keep their order, equal room prefers the newest bin: the result depends on nothing but `lengths`.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a bin with room r exists
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        if room > length:
            by_room[room - length].append(chosen)
            rooms |= 1 << (room - length)
    sizes = np.array([len(held) for held in bins], dtype=np.int64)
    items = np.array([item for held in bins for item in held], dtype=np.int64)
    return Bins(items, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _trainable(shards: Shards, context: int) -> NDArray[np.bool_]:
    """Which examples still have a trained target after the cut; only the long ones can have lost theirs."""
    usable = np.ones(len(shards.documents), dtype=bool)
    for number in np.flatnonzero(shards.lengths > context):
        start = int(shards.documents[number])
        usable[number] = shards.mask(start + 1, start + context).any()
    return usable


def _padded(
    context: int,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    mask: NDArray[np.bool_],
    segments: NDArray[np.int64],
) -> Row:
    """A row of `context` positions; positions are counted from 0 inside each segment."""
    used = len(ids)
    firsts = np.searchsorted(segments, segments)
    positions = np.arange(used) - firsts
    if used == context:
        return Row(ids, targets, mask, positions, segments)
    space = context - used
    return Row(
        np.pad(ids, (0, space)),
        np.pad(targets, (0, space)),
        np.pad(mask, (0, space)),
        np.pad(positions, (0, space)),
        np.pad(segments, (0, space), constant_values=-1),
    )
