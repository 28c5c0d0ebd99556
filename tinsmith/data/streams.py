"""Every kind of data as one thing: a stream of documents (texts or conversations) that can be read
again and again."""

import itertools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from tinsmith.core.errors import UserError
from tinsmith.core.parse import plain
from tinsmith.data import files, hub, stdlib, tasks
from tinsmith.data.config import Chats, DataConfig, Hub, Shape, Stdlib, Tasks, Text
from tinsmith.data.files import Reject
from tinsmith.text.chat import BadRecord, Conversation, normalise

VALIDATION_NAMES = ("valid", "val", "validation")


class Document(NamedTuple):
    """A text (or a piece of a long one) or a conversation, and where it came from."""

    content: str | Conversation
    key: bytes
    """What the split goes by; normally the content itself."""
    file: str
    line: int
    first: bool = True
    last: bool = True

    @property
    def text(self) -> str:
        """The content of a text document."""
        return cast(str, self.content)

    @property
    def bytes(self) -> int:
        """Bytes of its text."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(
            len(said.encode()) for m in self.content.messages for said in (m.content, m.reasoning)
        )


Stream = Callable[[], Iterator[Document | Reject]]
Fetched = Callable[[Hub], Path]
"""Gives the file with the rows of a Hub data set, which it fetches at the first call."""


class Origin(NamedTuple):
    """One source of a recipe, ready to be read."""

    name: str
    config: DataConfig
    identity: Any
    """Plain data that changes when the content does."""
    train: Stream
    """All documents, or those to train on where `validation` is given."""
    validation: Stream | None = None

    @property
    def described(self) -> str:
        """What the recipe names: the path, or else the name."""
        config = self.config
        return config.path if isinstance(config, Text | Chats) else self.name

    @property
    def fails(self) -> bool:
        """Whether a bad line ends everything instead of being left out."""
        return isinstance(self.config, Text | Chats | Hub) and self.config.on_bad_line == "fail"


def open_origin(config: DataConfig, shape: Shape, key: str, fetched: Fetched) -> Origin:
    """Find what a section of a recipe names, without reading it yet. `key` names the section in
    messages.

    UserError where it is not there, or cannot give what `shape` asks for.
    """
    if isinstance(config, Stdlib):
        return _stdlib(config, shape)
    if isinstance(config, Tasks):
        stream = _limited(lambda: _tasks(config, shape), config.limit)
        return Origin("tasks", config, plain(config), stream)
    if isinstance(config, Hub):
        return _hub(config, shape, fetched)
    if isinstance(config, Text) and shape == "chats":
        raise UserError(
            f"{key}.kind: 'text' has no chats to fine-tune on; use chats, tasks, stdlib or hub"
        )
    return _files(config, key)


def _stdlib(config: Stdlib, shape: Shape) -> Origin:
    found = list(stdlib.read(stdlib.modules()))
    kept: list[Document] = []

    def read() -> Iterator[Document]:
        if not kept:
            every = _stdlib_texts(found) if shape == "documents" else _stdlib_chats(found)
            kept.extend(itertools.islice(every, config.limit))
        return iter(kept)

    identity = [
        plain(config),
        platform.python_version(),
        len(found),
        sum(len(module.text) for module in found),
    ]
    return Origin("stdlib", config, identity, read)


def _stdlib_texts(found: list[stdlib.Module]) -> Iterator[Document]:
    for module in found:
        yield Document(module.text, module.name.encode(), module.name, 1)


def _stdlib_chats(found: list[stdlib.Module]) -> Iterator[Document]:
    """Chats split by file; a function that occurs in two files is taken once."""
    seen: set[str] = set()
    for module in found:
        for number, record in enumerate(stdlib.chats(module), 1):
            answer = record["messages"][-1]["content"]
            if answer not in seen:
                seen.add(answer)
                yield Document(normalise(record), module.name.encode(), module.name, number)


def _tasks(config: Tasks, shape: Shape) -> Iterator[Document]:
    for index in range(config.count):
        name = config.tasks[index % len(config.tasks)]
        task = tasks.generate(name, config.seed, index, digits=config.digits, length=config.length)
        content = task.text() if shape == "documents" else normalise(task.chat())
        # the split goes by what is asked, in whatever words
        solution = f"{task.name}\n{task.reasoning}\n{task.answer}"
        yield Document(content, solution.encode(), "tasks", index)


def _files(config: Text | Chats, key: str) -> Origin:
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
    stream = _limited(lambda: _read(found, config), config.limit)
    validation = _limited(lambda: _read(held_back, config), config.limit) if held_back else None
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


def _read(paths: list[Path], config: Text | Chats) -> Iterator[Document | Reject]:
    for path in paths:
        if path.name.endswith(".txt"):
            yield from (
                item if isinstance(item, Reject) else _text(item) for item in files.texts(path)
            )
        elif isinstance(config, Chats):
            yield from _chats(files.rows(path))
        else:
            yield from _fields(files.rows(path, [config.field]), config.field)


def _hub(config: Hub, shape: Shape, fetched: Fetched) -> Origin:
    def read() -> Iterator[Document | Reject]:
        rows = hub.rows(config, fetched(config))
        if shape == "documents" and config.field is not None:
            return _fields(rows, config.field)
        return _chats(rows)

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


def _chats(rows: Iterator[files.Row | Reject]) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            files.refuse_odd_text(row.record)
            conversation = normalise(row.record)
            yield Document(conversation, repr(conversation).encode(), row.file, row.line)
        except (BadRecord, ValueError) as error:
            yield Reject(row.file, row.line, str(error))


def _limited(stream: Stream, limit: int | None) -> Stream:
    """The stream up to the end of its `limit`-th document."""
    if limit is None:
        return stream

    def read() -> Iterator[Document | Reject]:
        left = limit
        for item in stream():
            yield item
            left -= isinstance(item, Document) and item.last
            if not left:
                return

    return read


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
