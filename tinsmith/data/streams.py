"""Every kind of data as one thing: a stream of documents that can be read again and again. What is
read from files and from the Hub is here, what is made in `made.py`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import plain
from tinsmith.data import files, hub
from tinsmith.data.arc import open_tasks, read_tasks
from tinsmith.data.config import Arc, Chats, DataConfig, Hub, Shape, Stdlib, Tasks, Text
from tinsmith.data.documents import READERS, Document, Fetched, Origin, key_of, limited
from tinsmith.data.files import Reject
from tinsmith.data.made import from_rules, from_stdlib, from_tasks, lessons
from tinsmith.text.chat import BadRecord

VALIDATION_NAMES = ("valid", "val", "validation")


def open_origin(config: DataConfig, shape: Shape, key: str, fetched: Fetched) -> Origin:
    """Find what a section of a recipe names, without reading it yet. `key` names the section in
    messages.

    UserError where it is not there, or cannot give what `shape` asks for.
    """
    if isinstance(config, Stdlib):
        if shape == "pairs":
            raise UserError(f"{key}.kind: 'stdlib' has no pairs; use chats, tasks or hub")
        return from_stdlib(config, shape)
    if isinstance(config, Tasks):
        return from_tasks(config, shape)
    if isinstance(config, Arc):
        if shape in ("pairs", "prompts"):
            raise UserError(f"{key}.kind: 'arc' has no {shape}; use chats, tasks or hub")
        return from_rules(config) if config.path is None else _arc(config, config.path, key)
    if isinstance(config, Hub):
        return _hub(config, shape, fetched)
    if isinstance(config, Text) and shape != "documents":
        fitting = "chats, tasks or hub" if shape == "pairs" else "chats, tasks, stdlib or hub"
        aim = " to fine-tune on" if shape in ("chats", "answers") else ""
        raise UserError(f"{key}.kind: 'text' has no {shape}{aim}; use {fitting}")
    return _files(config, shape, key)


def _arc(config: Arc, path: str, key: str) -> Origin:
    found, solutions = open_tasks(path, config.solutions, (f"{key}.path", f"{key}.solutions"))
    stream = limited(lambda: lessons(config, read_tasks(found, solutions)), config.limit)
    identity = [plain(config), *map(_stamp, found), solutions]
    return Origin(_name(files.local(path)), config, identity, stream)


def _files(config: Text | Chats, shape: Shape, key: str) -> Origin:
    found = files.find(config.path, f"{key}.path")
    held_back: list[Path] = []
    if isinstance(config.validation, str):
        held_back = files.find(config.validation, f"{key}.validation")
    elif files.local(config.path).is_dir():
        found, held_back = _named_parts(found)
    if isinstance(config, Chats):
        for path in found + held_back:
            if path.name.endswith(".txt"):
                raise UserError(
                    f"{path}: chats are read from .jsonl, .jsonl.gz or .parquet, not from .txt"
                )
    stream = limited(lambda: _read(found, config, shape), config.limit)
    held = limited(lambda: _read(held_back, config, shape), config.limit)
    validation = held if held_back else None
    identity = [plain(config), *map(_stamp, found), "validation", *map(_stamp, held_back)]
    return Origin(_name(files.local(config.path)), config, identity, stream, validation)


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


def _read(paths: list[Path], config: Text | Chats, shape: Shape) -> Iterator[Document | Reject]:
    for path in paths:
        if path.name.endswith(".txt"):
            yield from (
                item if isinstance(item, Reject) else _text(item) for item in files.texts(path)
            )
        elif isinstance(config, Chats):
            yield from _records(files.rows(path), shape)
        else:
            yield from _fields(files.rows(path, [config.field]), config.field)


def _hub(config: Hub, shape: Shape, fetched: Fetched) -> Origin:
    def read() -> Iterator[Document | Reject]:
        rows = hub.rows(config, fetched(config))
        if shape == "documents" and config.field is not None:
            return _fields(rows, config.field)
        return _records(rows, shape)

    local = files.local(config.name)
    stamps = (
        [_stamp(path) for path in sorted(local.rglob("*")) if path.is_file()]
        if local.is_dir()
        else []
    )
    return Origin(local.name, config, [plain(config), *stamps], read)


def _text(item: files.Text) -> Document:
    return Document(item.text, item.text.encode(), item.file, item.line, item.first, item.last)


def _fields(rows: Iterator[files.Row | Reject], field: str) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            text = files.text_of(row.record, field)
            yield Document(text, text.encode(), row.file, row.line)
        except ValueError as error:
            yield Reject(row.file, row.line, str(error))


def _records(rows: Iterator[files.Row | Reject], shape: Shape) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            files.refuse_odd_text(row.record)
            content = READERS[shape](row.record)
            yield Document(content, key_of(content), row.file, row.line)
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
