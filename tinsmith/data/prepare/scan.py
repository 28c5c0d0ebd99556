"""Scan a source before it is prepared: count documents, collect bad lines, plan the split."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.progress import Progress
from tinsmith.data.documents import Document, DocumentStream
from tinsmith.data.files import Reject
from tinsmith.data.formats import FormatName
from tinsmith.data.prepare.split import NO_SPLIT, SourceStats, Split, digest, plan_split
from tinsmith.data.sources import DataConfig, DataSource, SourceContext, open_source


class RejectLog:
    """`rejects.jsonl`: one object {file, line, reason} for each line that cannot be used."""

    def __init__(self, path: Path):
        self.count = 0
        self.reasons: dict[int, Counter[str]] = defaultdict(Counter)
        """Number of bad lines by their reason, for every source by its `id`."""
        self._file = path.open("w", encoding="utf-8")

    def add(self, source: DataSource, reject: Reject) -> None:
        """Record a bad line. UserError if the source fails on bad lines."""
        if source.fails_on_bad_line:
            raise UserError(
                f"{format_reject(reject)}; correct the line, or set data.on_bad_line: reject"
            )
        self._file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        self.count += 1
        self.reasons[id(source)][reject.reason] += 1

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
    """The result of scanning one source."""

    source: DataSource
    split: Split
    bytes: int
    """Bytes of text of both splits."""
    rejected: int
    unread: Counter[str]
    """Number of records by the name of a field in them that is never read."""

    def split_documents(self) -> Iterator[tuple[bool, Document]]:
        """Yield (is for validation, document) for all usable documents."""
        yield from self.split.assign(_usable(self.source.train))
        if self.source.validation:
            yield from ((True, document) for document in _usable(self.source.validation))


def scan_source(source: DataSource, rejects: RejectLog, progress: Progress) -> ScanResult:
    """Read a source once. UserError if nothing in it can be used."""
    before, unread = rejects.count, Counter[str]()
    train, held_back = (
        _scan(source, stream, rejects, unread, progress) if stream else None
        for stream in (source.train, source.validation)
    )
    assert train is not None
    total = train.bytes + (held_back.bytes if held_back else 0)
    fraction = source.config.validation
    if held_back or isinstance(fraction, str):
        return ScanResult(source, NO_SPLIT, total, rejects.count - before, unread)
    split = plan_split(train, fraction, allow_cut=source.can_cut)
    return ScanResult(source, split, total, rejects.count - before, unread)


def format_reject(reject: Reject) -> str:
    """Format a reject as `file:line: reason`."""
    return f"{reject.file}:{reject.line}: {reject.reason}"


def _scan(
    source: DataSource,
    stream: DocumentStream,
    rejects: RejectLog,
    unread: Counter[str],
    progress: Progress,
) -> SourceStats:
    """Count documents and fields never read, find the range of digests, and record bad lines."""
    documents = characters = total = 0
    lowest, highest = 2**64, -1
    first_reject = None
    for item in stream():
        if isinstance(item, Reject):
            first_reject = first_reject or item
            rejects.add(source, item)
            continue
        if item.first:
            number = digest(item)
            lowest, highest = min(lowest, number), max(highest, number)
        unread.update(item.unread)
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
        raise UserError(f"data: nothing in '{source.display_name}' can be used; {why}")
    return SourceStats(documents, characters, total, lowest, highest)


def _usable(stream: DocumentStream) -> Iterator[Document]:
    return (item for item in stream() if isinstance(item, Document))


CHECKED_RECORDS = 100
"""Number of records of a source that a dry run reads."""


def check_data(configs: Sequence[DataConfig], data_format: FormatName) -> list[str]:
    """Read the first records of every source and return lines about them. Nothing is downloaded.

    UserError if data are missing or cannot give `data_format`, or if none of the first records can
    be used.
    """
    lines = []
    for index, config in enumerate(configs):
        key = "data" if len(configs) == 1 else f"data.{index}"
        source = open_source(config, data_format, SourceContext(key))
        if (name := config.describe_download()) is not None:
            lines.append(f"{name}: will be downloaded by `tinsmith prepare`")
            continue
        if source.files is not None:
            lines.append(f"{source.name}: {source.files}")
        records = list(islice(source.train(), CHECKED_RECORDS))
        rejects = [record for record in records if isinstance(record, Reject)]
        if not records:
            raise UserError(f"{key}: '{source.name}' is empty")
        if len(rejects) == len(records):
            raise UserError(
                f"{key}: none of the first {len(records)} records of '{source.name}' can be used; "
                f"the first is {format_reject(rejects[0])}"
            )
        used = len(records) - len(rejects)
        line = f"{source.name}: {used} of the first {len(records)} {data_format} can be used"
        lines.append(line + (f"; {format_reject(rejects[0])}" if rejects else ""))
    return lines
