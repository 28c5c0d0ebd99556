"""The first reading of a source: what is there, what is bad, and how it is to be split."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.data.config import Shape
from tinsmith.data.documents import Document, Origin, Stream
from tinsmith.data.files import Reject
from tinsmith.data.progress import Progress
from tinsmith.data.split import NO_SPLIT, Scan, Split, digest, plan


class Rejects:
    """`rejects.jsonl`: one object {file, line, reason} for each line that cannot be used."""

    def __init__(self, path: Path):
        self.count = 0
        self._file = path.open("w", encoding="utf-8")

    def add(self, origin: Origin, reject: Reject) -> None:
        """Note a bad line. UserError where the source asks to fail at the first."""
        if origin.fails:
            raise UserError(f"{place(reject)}; mend it, or set data.on_bad_line: reject")
        self._file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        self.count += 1

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class Surveyed(NamedTuple):
    """A source after its first reading."""

    origin: Origin
    split: Split
    bytes: int
    """Bytes of text, both parts together."""
    rejected: int

    def sides(self) -> Iterator[tuple[bool, Document]]:
        """(whether it is for validation, document) of all usable documents."""
        yield from self.split.sides(_usable(self.origin.train))
        if self.origin.validation:
            yield from ((True, document) for document in _usable(self.origin.validation))


def survey(origin: Origin, shape: Shape, rejects: Rejects, progress: Progress) -> Surveyed:
    """Read everything once. UserError where nothing can be used."""
    before = rejects.count
    train = _scan(origin, origin.train, rejects, progress)
    held_back = _scan(origin, origin.validation, rejects, progress) if origin.validation else None
    total = train.bytes + (held_back.bytes if held_back else 0)
    fraction = origin.config.validation
    if held_back or isinstance(fraction, str):
        return Surveyed(origin, NO_SPLIT, total, rejects.count - before)
    may_cut = shape == "documents" and origin.config.kind == "text"
    return Surveyed(origin, plan(train, fraction, may_cut=may_cut), total, rejects.count - before)


def place(reject: Reject) -> str:
    """`file:line: reason`."""
    return f"{reject.file}:{reject.line}: {reject.reason}"


def _scan(origin: Origin, stream: Stream, rejects: Rejects, progress: Progress) -> Scan:
    """Count, find the range of digests, and report what is bad."""
    documents = characters = total = 0
    lowest, highest = 2**64, -1
    first_reject = None
    for item in stream():
        if isinstance(item, Reject):
            first_reject = first_reject or item
            rejects.add(origin, item)
            continue
        if item.first:
            number = digest(item)
            lowest, highest = min(lowest, number), max(highest, number)
        documents += item.last
        characters += len(item.content) if isinstance(item.content, str) else 0
        total += item.bytes
        progress.advance(item.bytes)
    if not documents:
        why = f"the first bad line is {place(first_reject)}" if first_reject else "it is empty"
        raise UserError(f"data: nothing in '{origin.described}' can be used; {why}")
    return Scan(documents, characters, total, lowest, highest)


def _usable(stream: Stream) -> Iterator[Document]:
    return (item for item in stream() if isinstance(item, Document))
