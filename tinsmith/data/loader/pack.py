"""Sequence packing: documents and chats in rows of `seq_len` positions.

Documents are packed as one stream of tokens, cut every `seq_len` tokens. With T = seq_len, row i
has the ids x[iT:(i+1)T] and the targets x[iT+1:(i+1)T+1], so the rows of an epoch are exactly the
stream, with every token once. Attention never crosses documents, so the last token of a document
has no target.

Chats are packed whole, several to a row. Only a chat that is longer than a row continues in another
row. Every token occurs once, and every trained token is a target once.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.loader.binpack import best_fit
from tinsmith.data.prepare.shards import Shards


class Row(NamedTuple):
    """One row of a Batch. All arrays are (T,) int64, except for `mask`, which is bool."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    mask: NDArray[np.bool_]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


class IndexedSamples(Protocol):
    """Random access to the samples of one source: packed rows, pairs or prompts."""

    size: int
    """Number of samples."""
    num_tokens: int
    """Number of the `size * seq_len` positions that are not padding."""
    num_split_chats: int
    """Number of chats that are longer than a row and continue in another one."""
    num_skipped_pieces: int
    """Number of pieces of such chats that are left out because no token in them is trained."""

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return the rows of sample `index`, 0 <= index < size: one, or the two of a pair."""
        ...


class DocumentRows:
    """Rows cut from a stream of documents."""

    def __init__(self, shards: Shards, seq_len: int):
        self._shards, self._seq_len = shards, seq_len
        self.num_tokens = shards.tokens_total
        self.size = -(-self.num_tokens // seq_len)
        self.num_split_chats = self.num_skipped_pieces = 0

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return packed row `index`."""
        return (self.get_row(index),)

    def get_row(self, index: int) -> Row:
        """Return packed row `index`; the last one may end in padding."""
        start = index * self._seq_len
        stop = min(start + self._seq_len, self.num_tokens)
        ids, targets, mask, is_start = _read_window(self._shards, start, stop)
        return _build_row(self._seq_len, ids, targets, mask, np.cumsum(is_start))


class ChatRows:
    """Rows of chats, or pieces of long chats, packed several to a row."""

    def __init__(self, shards: Shards, seq_len: int):
        assert shards.masked, "chats carry a mask"
        self._shards, self._seq_len = shards, seq_len
        self.num_split_chats = int((shards.document_lengths > seq_len).sum())
        starts, lengths, self.num_skipped_pieces = _split_chats(shards, seq_len)
        self._packing = best_fit(starts, lengths, seq_len)
        self.size = len(self._packing.row_offsets) - 1
        self.num_tokens = int(self._packing.lengths.sum())

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return packed row `index`."""
        return (self.get_row(index),)

    def get_row(self, index: int) -> Row:
        """Return packed row `index`: its pieces, one after the other, each a segment."""
        packing = self._packing
        pieces = slice(packing.row_offsets[index], packing.row_offsets[index + 1])
        starts, lengths = packing.starts[pieces], packing.lengths[pieces]
        parts = [self._read_piece(int(a), int(a + n)) for a, n in zip(starts, lengths, strict=True)]
        ids, targets, mask = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        segments = np.repeat(np.arange(len(parts)), lengths)
        return _build_row(self._seq_len, ids, targets, mask, segments)

    def _read_piece(self, start: int, stop: int) -> tuple[NDArray, NDArray, NDArray]:
        """Return ids, targets and mask of the tokens [start, stop)."""
        ids, targets, mask, _ = _read_window(self._shards, start, stop)
        trained = self._shards.mask(start + 1, min(stop + 1, self._shards.tokens_total))
        mask[: len(trained)] &= trained
        return ids, np.where(mask, targets, 0), mask


def _read_window(
    shards: Shards, start: int, stop: int
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return ids, targets, a mask of the targets that exist, and a mask of the tokens that start a
    document, for the tokens [start, stop).

    All are (stop - start,). The first token is never marked as a start, because every row starts a
    segment anyway.
    """
    tokens = shards.tokens(start, min(stop + 1, shards.tokens_total))
    first, end = np.searchsorted(shards.document_starts, [start + 1, stop + 1])
    is_start = np.zeros(stop - start + 1, dtype=bool)
    is_start[shards.document_starts[first:end] - start] = True
    is_start[-1] |= stop == shards.tokens_total
    has_target = ~is_start[1:]
    targets = np.append(tokens[1:], 0)[: stop - start]
    return tokens[: stop - start], np.where(has_target, targets, 0), has_target, is_start[:-1]


def _split_chats(shards: Shards, seq_len: int) -> tuple[NDArray, NDArray, int]:
    """Cut chats into pieces of at most `seq_len` tokens and skip the pieces without a trained
    token. Return starts and lengths of the pieces, and the number of skipped pieces.
    """
    counts = -(-shards.document_lengths // seq_len)
    chats = np.repeat(np.arange(len(counts)), counts)
    index_in_chat = np.arange(len(chats)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = shards.document_starts[chats] + index_in_chat * seq_len
    ends = (shards.document_starts + shards.document_lengths)[chats]
    lengths = np.minimum(ends - starts, seq_len)
    has_trained = np.ones(len(starts), dtype=bool)
    for piece in np.flatnonzero(counts[chats] > 1):
        stop = min(starts[piece] + lengths[piece] + 1, ends[piece])
        has_trained[piece] = shards.mask(int(starts[piece]) + 1, int(stop)).any()
    return starts[has_trained], lengths[has_trained], int((~has_trained).sum())


def _build_row(
    seq_len: int,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    mask: NDArray[np.bool_],
    segments: NDArray[np.int64],
) -> Row:
    """Build a row of `seq_len` positions. `positions` count from 0 in each segment."""
    positions = np.arange(len(ids)) - np.searchsorted(segments, segments)
    row = Row(ids, targets, mask, positions, segments)
    return row if len(ids) == seq_len else pad_row(row, seq_len)


def pad_row(row: Row, width: int) -> Row:
    """Pad a row on the right to `width` positions."""
    padding = (0, width - len(row.ids))
    return Row(
        np.pad(row.ids, padding),
        np.pad(row.targets, padding),
        np.pad(row.mask, padding),
        np.pad(row.positions, padding),
        np.pad(row.segments, padding, constant_values=-1),
    )
