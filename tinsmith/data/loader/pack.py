"""Documents and chats laid into rows of `context` positions.

Documents are one stream of tokens, cut every `context` tokens: row i holds ids x[iC:(i+1)C] and the
targets one further, so that neighbouring rows share one boundary token and an epoch's rows, side by
side, are the stream: nothing is lost and nothing repeated. Attention never crosses documents, so
the last token of a document has no target.

Chats share rows too, but each begins at the start of a piece of its own: a chat that is longer than
a row goes on in another one, everything else is kept whole (but see `fit`). Here as well every
token occurs once, and every token that is to be learned is a target once.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.loader.binpack import best_fit
from tinsmith.data.prepare.shards import Shards


class Row(NamedTuple):
    """One row, each array (T,): int64, int64, bool, int64, int64. See Batch."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    mask: NDArray[np.bool_]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


class IndexedSamples(Protocol):
    """Samples by number: what a source shuffles."""

    size: int
    """How many samples: packed rows, pairs, prompts."""
    num_tokens: int
    """How many of the `size * context` positions hold a token."""
    num_split_chats: int
    """How many chats are longer than a row, and go on in another."""
    num_skipped_pieces: int
    """How many pieces of such chats are left out because nothing in them is to be learned."""

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """The rows of sample number `place`, 0 <= place < size: one, or the two of a pair."""
        ...


class DocumentRows:
    """Windows of a stream of documents."""

    def __init__(self, shards: Shards, seq_len: int):
        self._shards, self._context = shards, seq_len
        self.num_tokens = shards.tokens_total
        self.size = -(-self.num_tokens // seq_len)
        self.num_split_chats = self.num_skipped_pieces = 0

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Row number `place`."""
        return (self.get_row(index),)

    def get_row(self, index: int) -> Row:
        """Window number `place` of the stream; the last one may end in padding."""
        start = index * self._context
        stop = min(start + self._context, self.num_tokens)
        ids, targets, mask, begins = _window(self._shards, start, stop)
        return _padded(self._context, ids, targets, mask, np.cumsum(begins))


class ChatRows:
    """Chats, or pieces of long ones, several to a row."""

    def __init__(self, shards: Shards, seq_len: int):
        assert shards.masked, "chats carry a mask"
        self._shards, self._context = shards, seq_len
        self.num_split_chats = int((shards.document_lengths > seq_len).sum())
        starts, lengths, self.num_skipped_pieces = _pieces(shards, seq_len)
        self._fitted = best_fit(starts, lengths, seq_len)
        self.size = len(self._fitted.row_offsets) - 1
        self.num_tokens = int(self._fitted.lengths.sum())

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Row number `place`."""
        return (self.get_row(index),)

    def get_row(self, index: int) -> Row:
        """The pieces of row number `place`, side by side."""
        fitted = self._fitted
        span = slice(fitted.row_offsets[index], fitted.row_offsets[index + 1])
        starts, lengths = fitted.starts[span], fitted.lengths[span]
        parts = [self._piece(int(a), int(a + n)) for a, n in zip(starts, lengths, strict=True)]
        ids, targets, mask = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _padded(self._context, ids, targets, mask, np.repeat(np.arange(len(parts)), lengths))

    def _piece(self, start: int, stop: int) -> tuple[NDArray, NDArray, NDArray]:
        ids, targets, mask, _ = _window(self._shards, start, stop)
        learned = self._shards.mask(start + 1, min(stop + 1, self._shards.tokens_total))
        mask[: len(learned)] &= learned
        return ids, np.where(mask, targets, 0), mask


def _window(shards: Shards, start: int, stop: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Of the tokens [start, stop): ids, targets, which targets exist, and where a document begins.

    All (stop - start,). The first token never counts as a beginning: a row starts one anyway.
    """
    tokens = shards.tokens(start, min(stop + 1, shards.tokens_total))
    first, end = np.searchsorted(shards.document_starts, [start + 1, stop + 1])
    begins = np.zeros(stop - start + 1, dtype=bool)
    begins[shards.document_starts[first:end] - start] = True
    begins[-1] |= stop == shards.tokens_total
    exists = ~begins[1:]
    targets = np.append(tokens[1:], 0)[: stop - start]
    return tokens[: stop - start], np.where(exists, targets, 0), exists, begins[:-1]


def _pieces(shards: Shards, context: int) -> tuple[NDArray, NDArray, int]:
    """Starts and lengths of chats cut every `context` tokens; how many pieces taught nothing."""
    counts = -(-shards.document_lengths // context)
    chats = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(chats)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = shards.document_starts[chats] + number * context
    ends = (shards.document_starts + shards.document_lengths)[chats]
    lengths = np.minimum(ends - starts, context)
    teaches = np.ones(len(starts), dtype=bool)
    for piece in np.flatnonzero(counts[chats] > 1):
        following = min(starts[piece] + lengths[piece] + 1, ends[piece])
        teaches[piece] = shards.mask(int(starts[piece]) + 1, int(following)).any()
    return starts[teaches], lengths[teaches], int((~teaches).sum())


def _padded(
    context: int,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    mask: NDArray[np.bool_],
    segments: NDArray[np.int64],
) -> Row:
    """A row of `context` positions; positions are counted from 0 inside each segment."""
    positions = np.arange(len(ids)) - np.searchsorted(segments, segments)
    row = Row(ids, targets, mask, positions, segments)
    return row if len(ids) == context else pad_row(row, context)


def pad_row(row: Row, width: int) -> Row:
    """The row with padding behind it, `width` positions in all."""
    space = (0, width - len(row.ids))
    return Row(
        np.pad(row.ids, space),
        np.pad(row.targets, space),
        np.pad(row.mask, space),
        np.pad(row.positions, space),
        np.pad(row.segments, space, constant_values=-1),
    )
