"""The base class of data sources, and the reading of records that several sources share."""

import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, Count, to_plain
from tinsmith.data import files
from tinsmith.data.documents import Document, DocumentStream, limit_documents
from tinsmith.data.files import Reject
from tinsmith.data.formats.base import DataFormat
from tinsmith.text.chat import BadRecord
from tinsmith.text.fields import Fields

OnBadLine = Literal["reject", "fail"]
SplitName = Literal["train", "validation", "test"]
_SPLIT_WORDS: dict[SplitName, re.Pattern[str]] = {
    "test": re.compile(r"-(test|(news|flores|dev)test)(s|ing|a|b)?(set|data)?-"),
    "validation": re.compile(
        r"-((val|valid|dev|eval|newsdev)(set|data|s)?|validation|development|evaluation|"
        r"(held|hold)-?out)-"
    ),
    "train": re.compile(r"-train(ing)?(set|data|val)?-"),
}
"""Patterns of the words that name a split, in a name whose words are joined by `-`. A name with
words of several splits belongs to the first of them.
"""
_DOCUMENTATION = re.compile(
    r"(readme|licen[sc]e|notice|copying|changelog|contributing|requirements)([\W_].*)?\.txt",
    re.IGNORECASE,
)
"""Names of files about a data set."""


class DataSource(NamedTuple):
    """One source of a recipe, ready to be read."""

    name: str
    config: "SourceConfig"
    fingerprint: Any
    """Plain data that changes when the content does."""
    train: DocumentStream
    """All documents, or those to train on if `validation` is given."""
    validation: DocumentStream | None = None
    path: str | None = None
    """The path in the recipe, for messages."""
    files: str | None = None
    """Which files of a folder are read for what, for messages."""
    fails_on_bad_line: bool = False
    """True if a bad line is an error, False if it is left out."""
    can_cut: bool = False
    """True if a single document may be cut in two, to have a validation part."""

    @property
    def display_name(self) -> str:
        """The path in the recipe, or else the name."""
        return self.path or self.name


class SourceContext(NamedTuple):
    """What a source needs to open, besides its config."""

    key: str
    """Recipe key of the source, for messages: "data", or "data.1" in a list."""
    download_dir: Path = Path()
    """Folder for files that a source downloads; deleted afterwards."""
    say: Callable[[str], None] = print
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """Keys of every source of the `data` section."""

    kind: str
    weight: float = 1.0
    """Share of training rows, relative to the other sources of the list."""
    validation: float | str = 0.05
    """Fraction of documents for validation; for text and chats, or else a path."""
    limit: Count | None = None
    """Largest number of documents or chats to read."""

    formats: ClassVar[tuple[str, ...] | None] = None
    """Names of the data formats that the source can give; None for every format."""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight={self.weight} must be above 0")
        if not isinstance(self.validation, str) and not 0 <= self.validation <= 0.5:
            raise ValueError(f"validation={self.validation} must be a fraction from 0 to 0.5")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")

    @classmethod
    def supports(cls, data_format: str) -> bool:
        """Return True if the source can give this data format."""
        return cls.formats is None or data_format in cls.formats

    def has_conversations(self, data_format: DataFormat) -> bool:
        """Return True if the source's samples are conversations in this data format."""
        return data_format.is_chat

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Find the data without reading them. UserError if they are not there."""
        raise NotImplementedError

    def describe_download(self) -> str | None:
        """Return the name of the data if reading them downloads them, otherwise None."""
        return None


def record_documents(
    records: Iterable[files.Record | Reject], data_format: DataFormat
) -> Iterator[Document | Reject]:
    """Read records in a data format. A record that cannot be used becomes a Reject."""
    for record in records:
        if isinstance(record, Reject):
            yield record
            continue
        try:
            files.check_text(record.data)
            fields = Fields(record.data)
            content = data_format.read(fields)
            key, unread = data_format.split_key(content), data_format.unread(fields)
            yield Document(content, key, record.file, record.line, unread=unread)
        except (BadRecord, ValueError) as error:
            yield Reject(record.file, record.line, str(error))


def text_documents(
    records: Iterable[files.Record | Reject], field: str
) -> Iterator[Document | Reject]:
    """Read the text field of records. A record without text becomes a Reject."""
    for record in records:
        if isinstance(record, Reject):
            yield record
            continue
        try:
            text = files.get_text(record.data, field)
            unread = (*record.unread, *(name for name in record.data if name != field))
            yield Document(text, text.encode(), record.file, record.line, unread=unread)
        except ValueError as error:
            yield Reject(record.file, record.line, str(error))


class FileSet(NamedTuple):
    """The files of a source on disk."""

    train: list[Path]
    validation: list[Path]
    left_out: list[Path]
    """Test files, documentation, and files without a split in their name beside training files."""

    def fingerprint(self) -> list[Any]:
        """Return size and modification time of every file."""
        return [*map(file_stamp, self.train), "validation", *map(file_stamp, self.validation)]

    def describe(self, folder: Path) -> str:
        """Return which files of a folder are read for what, in one line."""
        uses = {
            "train from": self.train,
            "validation from": self.validation,
            "not read:": self.left_out,
        }
        return "; ".join(
            f"{use} {_list_files(paths, folder)}" for use, paths in uses.items() if paths
        )


def find_split_files(path: str, validation: float | str, key: str) -> FileSet:
    """Find the files of `path` by split. A path to a file is for training.

    In a folder, `split_in_name` decides: files of the test split and documentation are left out, as
    are files that name no split if others are named for training. If `validation` is a path, its
    files are for validation instead. UserError if no file is left for training.
    """
    found = files.find_files(path, f"{key}.path")
    named = files.find_files(validation, f"{key}.validation") if isinstance(validation, str) else []
    folder = files.expand_path(path)
    if not folder.is_dir():
        return FileSet(found, named, [])
    named_paths = {file.resolve() for file in named}
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for file in found:
        if file.resolve() not in named_paths:
            is_documentation = _DOCUMENTATION.fullmatch(file.name)
            split = None if is_documentation else split_in_name(file.relative_to(folder))
            splits["documentation" if is_documentation else split].append(file)
    train = splits["train"] or splits[None]
    held_back = named or splits["validation"]
    read = {*train, *held_back}
    left_out = [file for file in found if file not in read and file.resolve() not in named_paths]
    if not train:
        raise UserError(
            f"{key}.path: {folder} has no file to train on, only "
            f"{_list_files(left_out + held_back, folder)}; name a file to train on it"
        )
    return FileSet(train, held_back, left_out)


def split_in_name(path: Path) -> SplitName | None:
    """Return the split that the name of a file or of a folder above it contains, or None.

    Words lie between characters that are no letters, or begin with a capital: `train-00000-of-1`,
    `qa.test.jsonl`, `dev/0.jsonl`, `dataTest`. The part of the path nearest to the suffix counts,
    but below a folder whose whole name is `test` or `validation` everything is held out.
    """
    *folders, _ = parts = path.parts
    for folder in folders:
        held_out = _split_in_words(folder)
        if held_out and held_out != "train" and folder.isalpha():
            return held_out
    for piece in reversed([piece for part in parts for piece in part.split(".")]):
        if split := _split_in_words(piece):
            return split
    return None


def _split_in_words(name: str) -> SplitName | None:
    """Return the split that the words of a name belong to, or None."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", "-", name).lower()
    for split, pattern in _SPLIT_WORDS.items():
        if pattern.search(f"-{words}-"):
            return split
    return None


def _list_files(paths: list[Path], folder: Path) -> str:
    """List up to four files by their path below the folder, and count the others."""
    names = [os.path.relpath(path, folder) for path in paths]
    more = [f"{len(names) - 3} more"] if len(names) > 4 else []
    return ", ".join((names[:3] if more else names) + more)


def open_file_set(
    config: "SourceConfig",
    path: str,
    file_set: FileSet,
    read: Callable[[Path], Iterator[Document | Reject]],
    *,
    fails_on_bad_line: bool,
    can_cut: bool = False,
) -> DataSource:
    """Open files with a reader of documents."""

    def stream(paths: list[Path]) -> DocumentStream:
        return limit_documents(
            lambda: itertools.chain.from_iterable(map(read, paths)), config.limit
        )

    folder = files.expand_path(path)
    return DataSource(
        name=source_name(folder),
        config=config,
        fingerprint=[to_plain(config), *file_set.fingerprint()],
        train=stream(file_set.train),
        validation=stream(file_set.validation) if file_set.validation else None,
        path=path,
        files=file_set.describe(folder) if folder.is_dir() else None,
        fails_on_bad_line=fails_on_bad_line,
        can_cut=can_cut,
    )


def source_name(path: Path) -> str:
    """Return a folder's name, or a file's name without suffixes. A file named train or data has the
    name of its folder.
    """
    whole = path.resolve()
    name = whole.name.split(".")[0]
    return whole.parent.name if name in ("train", "data") and whole.is_file() else name


def file_stamp(path: Path) -> list[Any]:
    """Return path, size and modification time of a file."""
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def unique_names(names: list[str]) -> list[str]:
    """Make names unique: the second of two equal names becomes `name-2`, and so on."""
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
