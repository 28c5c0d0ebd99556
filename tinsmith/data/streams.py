"""Every kind of data as one thing: a stream of documents that can be read again and again. What is
read from files and from the Hub is here, what is made in `made.py`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import to_plain
from tinsmith.data import files
from tinsmith.data.config import (
    ArcData,
    ChatsData,
    DataConfig,
    DataFormat,
    HubData,
    StdlibData,
    TasksData,
    TextData,
)
from tinsmith.data.documents import (
    READERS,
    DataSource,
    Document,
    HubFetcher,
    default_split_key,
    limit_documents,
)
from tinsmith.data.files import Reject
from tinsmith.data.made import (
    arc_documents,
    open_generated_puzzles,
    open_generated_tasks,
    open_stdlib,
)
from tinsmith.data.sources import hub
from tinsmith.data.sources.arc import open_tasks, read_tasks
from tinsmith.text.chat import BadRecord

VALIDATION_NAMES = ("valid", "val", "validation")


def open_source(
    config: DataConfig, data_format: DataFormat, key: str, fetcher: HubFetcher
) -> DataSource:
    """Find what a section of a recipe names, without reading it yet. `key` names the section in
    messages.

    UserError where it is not there, or cannot give what `shape` asks for.
    """
    if isinstance(config, StdlibData):
        if data_format == "pairs":
            raise UserError(f"{key}.kind: 'stdlib' has no pairs; use chats, tasks or hub")
        return open_stdlib(config, data_format)
    if isinstance(config, TasksData):
        return open_generated_tasks(config, data_format)
    if isinstance(config, ArcData):
        if data_format in ("pairs", "prompts"):
            raise UserError(f"{key}.kind: 'arc' has no {data_format}; use chats, tasks or hub")
        return (
            open_generated_puzzles(config)
            if config.path is None
            else _arc(config, config.path, key)
        )
    if isinstance(config, HubData):
        return _hub(config, data_format, fetcher)
    if isinstance(config, TextData) and data_format != "documents":
        fitting = "chats, tasks or hub" if data_format == "pairs" else "chats, tasks, stdlib or hub"
        aim = " to fine-tune on" if data_format in ("chats", "answers") else ""
        raise UserError(f"{key}.kind: 'text' has no {data_format}{aim}; use {fitting}")
    return _files(config, data_format, key)


def _arc(config: ArcData, path: str, key: str) -> DataSource:
    found, solutions = open_tasks(path, config.solutions, (f"{key}.path", f"{key}.solutions"))
    stream = limit_documents(
        lambda: arc_documents(config, read_tasks(found, solutions)), config.limit
    )
    identity = [to_plain(config), *map(_stamp, found), solutions]
    return DataSource(_name(files.expand_path(path)), config, identity, stream)


def _files(config: TextData | ChatsData, shape: DataFormat, key: str) -> DataSource:
    found = files.find_files(config.path, f"{key}.path")
    held_back: list[Path] = []
    if isinstance(config.validation, str):
        held_back = files.find_files(config.validation, f"{key}.validation")
    elif files.expand_path(config.path).is_dir():
        found, held_back = _named_parts(found)
    if isinstance(config, ChatsData):
        for path in found + held_back:
            if path.name.endswith(".txt"):
                raise UserError(
                    f"{path}: chats are read from .jsonl, .jsonl.gz or .parquet, not from .txt"
                )
    stream = limit_documents(lambda: _read(found, config, shape), config.limit)
    held = limit_documents(lambda: _read(held_back, config, shape), config.limit)
    validation = held if held_back else None
    identity = [to_plain(config), *map(_stamp, found), "validation", *map(_stamp, held_back)]
    return DataSource(_name(files.expand_path(config.path)), config, identity, stream, validation)


def _name(path: Path) -> str:
    """A folder's name, or a file's without what follows the dot; of `stories/train.txt` it is
    `stories`."""
    whole = path.resolve()
    name = whole.name.split(".")[0]
    return whole.parent.name if name in ("train", "data") and whole.is_file() else name


def _named_parts(found: list[Path]) -> tuple[list[Path], list[Path]]:
    """A folder with train.* and valid.* (or val.*, validation.*) files says itself what is held
    back."""
    train = [path for path in found if path.name.split(".")[0] == "train"]
    held_back = [path for path in found if path.name.split(".")[0] in VALIDATION_NAMES]
    return (train, held_back) if train and held_back else (found, [])


def _read(
    paths: list[Path], config: TextData | ChatsData, shape: DataFormat
) -> Iterator[Document | Reject]:
    for path in paths:
        if path.name.endswith(".txt"):
            yield from (
                item if isinstance(item, Reject) else _text(item) for item in files.read_texts(path)
            )
        elif isinstance(config, ChatsData):
            yield from _records(files.read_records(path), shape)
        else:
            yield from _fields(files.read_records(path, [config.field]), config.field)


def _hub(config: HubData, shape: DataFormat, fetched: HubFetcher) -> DataSource:
    def read() -> Iterator[Document | Reject]:
        rows = hub.read_records(config, fetched(config))
        if shape == "documents" and config.field is not None:
            return _fields(rows, config.field)
        return _records(rows, shape)

    local = files.expand_path(config.name)
    stamps = (
        [_stamp(path) for path in sorted(local.rglob("*")) if path.is_file()]
        if local.is_dir()
        else []
    )
    return DataSource(local.name, config, [to_plain(config), *stamps], read)


def _text(item: files.TextChunk) -> Document:
    return Document(item.text, item.text.encode(), item.file, item.line, item.first, item.last)


def _fields(rows: Iterator[files.Record | Reject], field: str) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            text = files.get_text(row.data, field)
            yield Document(text, text.encode(), row.file, row.line)
        except ValueError as error:
            yield Reject(row.file, row.line, str(error))


def _records(
    rows: Iterator[files.Record | Reject], shape: DataFormat
) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            files.check_text(row.data)
            content = READERS[shape](row.data)
            yield Document(content, default_split_key(content), row.file, row.line)
        except (BadRecord, ValueError) as error:
            yield Reject(row.file, row.line, str(error))


def _stamp(path: Path) -> list[Any]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def unique_names(names: list[str]) -> list[str]:
    """The same names, the second of two equal ones as `name-2` and so on."""
    seen: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        seen.append(next(candidate for candidate in candidates if candidate not in seen))
    return seen
