"""Text files -> windows of ids -> rows, so that every token but a document's first is predicted
exactly once.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinsmith.data import files
from tinsmith.data.batch import Batch, Row, collate
from tinsmith.data.files import Reject, Text
from tinsmith.text.tokenizer import Tokenizer


class Window(NamedTuple):
    """Consecutive ids of a document; those from place `first` on are to be predicted."""

    ids: list[int]
    first: int

    @property
    def inputs(self) -> int:
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

    def __iter__(self) -> Iterator[Text]:
        for item in self._items():
            if isinstance(item, Reject):
                self.rejects.append(item)
                continue
            yield item
            self.documents += item.last
            if self.documents == self._limit:
                return

    def _items(self) -> Iterator[Text | Reject]:
        if self._path.name.endswith(".txt"):
            yield from files.texts(self._path)
            return
        for row in files.rows(self._path, [self._field]):
            if isinstance(row, Reject):
                yield row
                continue
            try:
                yield Text(files.text_of(row.record, self._field), row.file, row.line)
            except ValueError as error:
                yield Reject(row.file, row.line, str(error))


def opening(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: the tokenizer's own mark of a beginning, if it has one that is
    not the mark of the end too.
    """
    first = None if tokenizer.bos is None else tokenizer.special(tokenizer.bos)
    return [] if first is None or first == tokenizer.end_of_text else [first]


def windows(
    texts: Iterable[Text], tokenizer: Tokenizer, context: int, stride: int
) -> Iterator[Window]:
    """Cut documents into windows of up to `context` inputs, `stride` <= `context` apart.

    A token that several windows hold is predicted in the first of them. Documents end with
    `<|endoftext|>`, as in training. A long one comes in pieces and is never held whole.
    """
    held: list[int] = []
    done = 1
    for text in texts:
        if text.first:
            held, done = opening(tokenizer) + tokenizer.encode(text.text), 1
        else:
            held = held + tokenizer.encode_inside(text.text)
        if text.last:
            held.append(tokenizer.end_of_text)
        start = 0
        while len(held) - start > context:
            yield Window(held[start : start + context + 1], done - start)
            done = start + context + 1
            start += stride
        if text.last and done < len(held):
            yield Window(held[start:], done - start)
        held, done = held[start:], done - start


def batches(
    source: Iterable[Window], context: int, batch_rows: int, number: int
) -> Iterator[Batch]:
    """Windows side by side in rows of at most `context` positions, each a segment of its own.

    `number` is what `Batch.source` says of every row.
    """
    rows: list[list[Window]] = []
    for row in _rows(source, context):
        rows.append(row)
        if len(rows) == batch_rows:
            yield _batch(rows, number)
            rows = []
    if rows:
        yield _batch(rows, number)


def _rows(source: Iterable[Window], context: int) -> Iterator[list[Window]]:
    row: list[Window] = []
    room = context
    for window in source:
        if window.inputs > room:
            yield row
            row, room = [], context
        row.append(window)
        room -= window.inputs
    if row:
        yield row


def _batch(rows: list[list[Window]], number: int) -> Batch:
    width = max(sum(window.inputs for window in row) for row in rows)
    return collate([_row(row, width) for row in rows], [number] * len(rows))


def _row(chosen: list[Window], width: int) -> Row:
    row = Row(*(np.zeros(width, dtype=kind) for kind in (np.int64, np.int64, bool, int, int)))
    row.segments[:] = -1
    begin = 0
    for segment, window in enumerate(chosen):
        place = slice(begin, begin + window.inputs)
        row.ids[place], row.targets[place] = window.ids[:-1], window.ids[1:]
        row.mask[place] = np.arange(1, window.inputs + 1) >= window.first
        row.positions[place] = np.arange(window.inputs)
        row.segments[place] = segment
        begin += window.inputs
    return row
