"""Text files -> windows of ids -> rows, so that every token but a document's first is predicted
exactly once.
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
    """Consecutive ids of a document; those from place `first_target` on are to be predicted."""

    ids: list[int]
    first_target: int

    @property
    def num_inputs(self) -> int:
        """Positions it takes: the last id is only a target."""
        return len(self.ids) - 1


class TextReader:
    """The usable texts of one file; afterwards, how many documents and which bad lines there were.

    `field` holds the text of a row of a .jsonl or .parquet file; `limit` documents at most.
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
        for row in files.read_records(self._path, [self._field]):
            if isinstance(row, Reject):
                yield row
                continue
            try:
                yield TextChunk(files.get_text(row.data, self._field), row.file, row.line)
            except ValueError as error:
                yield Reject(row.file, row.line, str(error))


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: the tokenizer's own mark of a beginning, if it has one that is
    not the mark of the end too.
    """
    first = None if tokenizer.bos is None else tokenizer.special(tokenizer.bos)
    return [] if first is None or first == tokenizer.end_of_text else [first]


def sliding_windows(
    texts: Iterable[TextChunk], tokenizer: Tokenizer, seq_len: int, stride: int
) -> Iterator[Window]:
    """Cut documents into windows of up to `context` inputs, `stride` <= `context` apart.

    A token that several windows hold is predicted in the first of them. Documents end with
    `<|endoftext|>`, as in training. A long one comes in pieces and is never held whole.
    """
    held: list[int] = []
    done = 1
    for text in texts:
        if text.first:
            held, done = bos_ids(tokenizer) + tokenizer.encode(text.text), 1
        else:
            held = held + tokenizer.encode_inside(text.text)
        if text.last:
            held.append(tokenizer.end_of_text)
        start = 0
        while len(held) - start > seq_len:
            yield Window(held[start : start + seq_len + 1], done - start)
            done = start + seq_len + 1
            start += stride
        if text.last and done < len(held):
            yield Window(held[start:], done - start)
        held, done = held[start:], done - start


def pack_windows(
    source: Iterable[Window], seq_len: int, batch_size: int, source_id: int
) -> Iterator[Batch]:
    """Windows side by side in rows of at most `context` positions, each a segment of its own.

    `number` is what `Batch.source` says of every row.
    """
    rows: list[list[Window]] = []
    for row in _rows(source, seq_len):
        rows.append(row)
        if len(rows) == batch_size:
            yield _batch(rows, source_id)
            rows = []
    if rows:
        yield _batch(rows, source_id)


def _rows(source: Iterable[Window], context: int) -> Iterator[list[Window]]:
    row: list[Window] = []
    room = context
    for window in source:
        if window.num_inputs > room:
            yield row
            row, room = [], context
        row.append(window)
        room -= window.num_inputs
    if row:
        yield row


def _batch(rows: list[list[Window]], number: int) -> Batch:
    width = max(sum(window.num_inputs for window in row) for row in rows)
    return collate([_row(row, width) for row in rows], [number] * len(rows))


def _row(chosen: list[Window], width: int) -> Row:
    row = Row(*(np.zeros(width, dtype=kind) for kind in (np.int64, np.int64, bool, int, int)))
    row.segments[:] = -1
    begin = 0
    for segment, window in enumerate(chosen):
        place = slice(begin, begin + window.num_inputs)
        row.ids[place], row.targets[place] = window.ids[:-1], window.ids[1:]
        row.mask[place] = np.arange(1, window.num_inputs + 1) >= window.first_target
        row.positions[place] = np.arange(window.num_inputs)
        row.segments[place] = segment
        begin += window.num_inputs
    return row
