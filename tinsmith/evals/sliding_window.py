"""Split text files into sliding windows of token ids, and pack windows into rows.

Every token of a document except the first is predicted exactly once.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinsmith.data import files
from tinsmith.data.files import Reject, TextChunk
from tinsmith.data.loader.batch import Batch, Row, collate
from tinsmith.text.tokenizer import Tokenizer


class Window(NamedTuple):
    """Consecutive ids of a document; targets are those from index `first_target` on."""

    ids: list[int]
    first_target: int

    @property
    def num_inputs(self) -> int:
        """Number of input positions: the last id is only a target."""
        return len(self.ids) - 1


class TextReader:
    """Iterate over the usable texts of one file; then it has the number of documents and the bad
    lines.

    `field` holds the text of a record of a .jsonl or .parquet file; `limit` is the largest number
    of documents.
    """

    def __init__(self, path: Path, field: str = "text", limit: int | None = None):
        self._path, self._field, self._limit = path, field, limit
        self.documents = 0
        self.rejects: list[Reject] = []

    def __iter__(self) -> Iterator[TextChunk]:
        for item in self._items():
            if isinstance(item, Reject):
                self.rejects.append(item)
                continue
            yield item
            self.documents += item.last
            if self.documents == self._limit:
                return

    def _items(self) -> Iterator[TextChunk | Reject]:
        if self._path.name.endswith(".txt"):
            yield from files.read_texts(self._path)
            return
        for record in files.read_records(self._path, [self._field]):
            if isinstance(record, Reject):
                yield record
                continue
            try:
                yield TextChunk(files.get_text(record.data, self._field), record.file, record.line)
            except ValueError as error:
                yield Reject(record.file, record.line, str(error))


def sliding_windows(
    texts: Iterable[TextChunk], tokenizer: Tokenizer, seq_len: int, stride: int
) -> Iterator[Window]:
    """Split documents into windows of up to `seq_len` inputs, `stride` <= `seq_len` apart.

    A token in several windows is predicted in the first of them. Documents end with
    `<|endoftext|>`, as in training, and begin
    with the tokenizer's prefix (BOS). A long document comes in chunks and is never completely in
    memory.
    """
    ids: list[int] = []
    first_target = 1
    for text in texts:
        if text.first:
            ids, first_target = tokenizer.prefix + tokenizer.encode(text.text), 1
        else:
            ids = ids + tokenizer.encode_inside(text.text)
        if text.last:
            ids.append(tokenizer.end_of_text)
        start = 0
        while len(ids) - start > seq_len:
            yield Window(ids[start : start + seq_len + 1], first_target - start)
            first_target = start + seq_len + 1
            start += stride
        if text.last and first_target < len(ids):
            yield Window(ids[start:], first_target - start)
        ids, first_target = ids[start:], first_target - start


def pack_windows(
    source: Iterable[Window], seq_len: int, batch_size: int, source_id: int
) -> Iterator[Batch]:
    """Pack windows side by side into rows of at most `seq_len` positions, each a segment of its
    own.

    `source_id` is `Batch.source` of every row.
    """
    rows: list[list[Window]] = []
    for row in _rows(source, seq_len):
        rows.append(row)
        if len(rows) == batch_size:
            yield _batch(rows, source_id)
            rows = []
    if rows:
        yield _batch(rows, source_id)


def _rows(source: Iterable[Window], seq_len: int) -> Iterator[list[Window]]:
    row: list[Window] = []
    remaining = seq_len
    for window in source:
        if window.num_inputs > remaining:
            yield row
            row, remaining = [], seq_len
        row.append(window)
        remaining -= window.num_inputs
    if row:
        yield row


def _batch(rows: list[list[Window]], source_id: int) -> Batch:
    width = max(sum(window.num_inputs for window in row) for row in rows)
    return collate([_row(row, width) for row in rows], [source_id] * len(rows))


def _row(windows: list[Window], width: int) -> Row:
    row = Row(*(np.zeros(width, dtype=dtype) for dtype in (np.int64, np.int64, bool, int, int)))
    row.segments[:] = -1
    start = 0
    for segment, window in enumerate(windows):
        positions = slice(start, start + window.num_inputs)
        row.ids[positions], row.targets[positions] = window.ids[:-1], window.ids[1:]
        row.mask[positions] = np.arange(1, window.num_inputs + 1) >= window.first_target
        row.positions[positions] = np.arange(window.num_inputs)
        row.segments[positions] = segment
        start += window.num_inputs
    return row
