"""The first reading of a source: what is there, what is bad, and how it is to be split.

A first look at data, before anything is prepared: is it there, and does its first record
read?
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.progress import Progress
from tinsmith.data.config import DataConfig, DataFormat, HubData
from tinsmith.data.documents import DataSource, Document, DocumentStream
from tinsmith.data.files import Reject
from tinsmith.data.prepare.split import NO_SPLIT, SourceStats, Split, digest, plan_split
from tinsmith.data.sources import hub
from tinsmith.data.streams import open_source


class RejectLog:
    """`rejects.jsonl`: one object {file, line, reason} for each line that cannot be used."""

    def __init__(self, path: Path):
        self.count = 0
        self._file = path.open("w", encoding="utf-8")

    def add(self, source: DataSource, reject: Reject) -> None:
        """Note a bad line. UserError where the source asks to fail at the first."""
        if source.fails_on_bad_line:
            raise UserError(f"{format_reject(reject)}; mend it, or set data.on_bad_line: reject")
        self._file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        self.count += 1

    def __enter__(self) -> "RejectLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class ScanResult(NamedTuple):
    """A source after its first reading."""

    source: DataSource
    split: Split
    bytes: int
    """Bytes of text, both parts together."""
    rejected: int

    def split_documents(self) -> Iterator[tuple[bool, Document]]:
        """(whether it is for validation, document) of all usable documents."""
        yield from self.split.assign(_usable(self.source.train))
        if self.source.validation:
            yield from ((True, document) for document in _usable(self.source.validation))


def scan_source(
    source: DataSource, data_format: DataFormat, rejects: RejectLog, progress: Progress
) -> ScanResult:
    """Read everything once. UserError where nothing can be used."""
    before = rejects.count
    train = _scan(source, source.train, rejects, progress)
    held_back = _scan(source, source.validation, rejects, progress) if source.validation else None
    total = train.bytes + (held_back.bytes if held_back else 0)
    fraction = source.config.validation
    if held_back or isinstance(fraction, str):
        return ScanResult(source, NO_SPLIT, total, rejects.count - before)
    may_cut = data_format == "documents" and source.config.kind == "text"
    return ScanResult(
        source, plan_split(train, fraction, allow_cut=may_cut), total, rejects.count - before
    )


def format_reject(reject: Reject) -> str:
    """Format a reject as `file:line: reason`."""
    return f"{reject.file}:{reject.line}: {reject.reason}"


def _scan(
    origin: DataSource, stream: DocumentStream, rejects: RejectLog, progress: Progress
) -> SourceStats:
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
        why = (
            f"the first bad line is {format_reject(first_reject)}"
            if first_reject
            else "it is empty"
        )
        raise UserError(f"data: nothing in '{origin.display_name}' can be used; {why}")
    return SourceStats(documents, characters, total, lowest, highest)


def _usable(stream: DocumentStream) -> Iterator[Document]:
    return (item for item in stream() if isinstance(item, Document))


def check_data(sections: Sequence[DataConfig], data_format: DataFormat) -> list[str]:
    """A line per source; UserError for what is missing or cannot give `shape`. Fetches nothing."""
    lines = []
    for number, section in enumerate(sections):
        key = "data" if len(sections) == 1 else f"data.{number}"
        origin = open_source(section, data_format, key, _refuse)
        if isinstance(section, HubData):
            lines.append(f"{hub.label(section)}: will be fetched by `prepare`")
            continue
        first = next(iter(origin.train()), None)
        if first is None:
            raise UserError(f"{key}: '{origin.name}' holds nothing")
        if isinstance(first, Reject):
            lines.append(f"{origin.name}: {first.file}:{first.line}: {first.reason}")
        else:
            lines.append(f"{origin.name}: the first of its {data_format} reads well")
    return lines


def _refuse(config: HubData) -> Path:
    raise AssertionError(f"{config.name} is not fetched for a look")
